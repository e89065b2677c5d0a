"""Which preparation of the inputs a model was trained with: the first batch norm remembers it.

The statistics that the first norm has stored are those of the first layer's outputs on the training inputs. Each of the
usual preparations is done to the inputs, the model is run up to that norm, and what reaches it is held against what is
stored: the right one fits, all others do not (11 of 11 named in a test with ResNet-18; the runner-up 4 times worse).
Where none fits and the training batches are known, so is what they have: a mean and a deviation of the data's own.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from steadynorm import models, moments
from steadynorm.moments import Moments
from steadynorm.probe import effects
from steadynorm.probe.batches import first_samples
from steadynorm.probe.drift import divergence
from steadynorm.probe.effects import Task
from steadynorm.probe.facts import CHANCE_FACTOR, MATERIAL_DIVERGENCE, Call, Correction, Norm
from steadynorm.probe.samples import map_tensors, tensors_in
from steadynorm.probe.trace import Forward, Watcher, inputs_of, run, watching
from steadynorm.training.layer_inputs import of_rows

SAMPLES = 128
# How much better than the runner-up a correction must fit to be named.
RUNNER_UP_FACTOR = 3.0
# How far, in deviations, or how much wider or narrower than in training inputs are that nobody prepared; less may be
# the data's own.
FAR, MUCH_WIDER = 1.0, 2.0

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
MNIST = (0.1307,), (0.3081,)

Correct = Callable[[Tensor], Tensor]


class _Reached(BaseException):
    """The norm was reached: the rest of the model need not run."""


class _At(Watcher):
    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path
        self.parts: list[Moments] = []

    def enter(self, path: str, module: nn.Module, inputs: Any) -> None:
        super().enter(path, module, inputs)
        if path == self.path:
            given = next(tensors_in(inputs))
            self.parts.append(moments.merge_rows(of_rows(given, None)))
            raise _Reached


def correction(
    model: nn.Module,
    batches: Sequence[Any],
    forward: Forward,
    task: Task,
    norms: Mapping[str, Norm],
    calls: Sequence[Call],
    trained: Sequence[Any] = (),
) -> Correction | None:
    """The one usual preparation of the inputs that makes them those that the first norm has learned; None if none.

    Args:
        trained: training batches, whose mean and deviation are tried where no usual preparation fits.
    """
    path = next((call.path for call in calls if call.path in norms), "")
    norm = norms.get(path)
    if norm is None or not norm.learns or norm.state_fault or len({c.path for c in calls if c.path == path}) != 1:
        return None
    few = first_samples(batches, forward, SAMPLES)
    first = _first(few[0], forward) if few else None
    if first is None or first.dim() < 2:
        return None
    layer = model.get_submodule(path)
    stored = models.running_statistics(layer)

    def misfit(correct: Correct) -> tuple[float, float]:
        parts = [_reaching(model, batch, forward, path, correct) for batch in few]
        halves = [moments.merge(some) for some in (parts[::2], parts[1::2]) if some]
        pool, eps = moments.merge(halves), norm.eps or 0.0
        (a, b) = ((half.mean, half.unbiased_var) for half in (halves[0], halves[-1]))
        null = divergence(a, b, eps)
        if pool.mean.shape != stored[0].shape:
            return torch.inf, 0.0
        return divergence(stored, (pool.mean, pool.unbiased_var), eps), null

    as_given, null = misfit(lambda x: x)
    if as_given <= max(MATERIAL_DIVERGENCE, CHANCE_FACTOR * null):
        return None
    known = corrections(first)
    misfits = sorted((misfit(correct)[0], name) for name, correct in known.items())
    (best, name), runner_up = misfits[0], misfits[1][0]
    enough = max(MATERIAL_DIVERGENCE, CHANCE_FACTOR * null)
    if best > enough or best * RUNNER_UP_FACTOR > min(runner_up, as_given):
        own = _as_in_training(few, first_samples(trained, forward, SAMPLES), forward)
        fits = [(misfit(correct)[0], name) for name, correct in own.items()]
        # Of all values, or of each channel: the former where it does.
        fits = [fit for fit in fits if fit[0] <= enough and fit[0] * RUNNER_UP_FACTOR <= min(misfits[0][0], as_given)]
        if not fits:
            return None
        (best, name), runner_up = fits[0], misfits[0][0]
        known |= own
    effect = effects.of_inputs(model, few, forward, lambda batch: _corrected(batch, forward, known[name]), task)
    return Correction(path, name, as_given, best, runner_up, len(known), effect)


def _as_in_training(few: Sequence[Any], trained: Sequence[Any], forward: Forward) -> dict[str, Correct]:
    """Mean and deviation of the training inputs, of all values and of each channel, where those given are far."""
    here, there = ([_first(batch, forward) for batch in some] for some in (few, trained))
    rows = [[x.movedim(1, -1).flatten(0, -2).double() for x in some if x is not None] for some in (here, there)]
    if not all(rows) or len({part.shape[1] for some in rows for part in some}) != 1:
        return {}
    a, b = (torch.cat(some) for some in rows)
    found: dict[str, Correct] = {}
    for whose, axis in (("all values", None), ("each channel", 0)):
        (mean, deviation), (to_mean, to_deviation) = ((x.mean(axis), x.std(axis)) for x in (a, b))
        wider = (deviation / to_deviation).log().abs()
        is_far = ((mean - to_mean).abs() > FAR * to_deviation) | (wider >= math.log(MUCH_WIDER))
        if bool(is_far.double().mean() < 0.5) or not bool((deviation > 0).all() and (to_deviation > 0).all()):
            continue
        numbers = (
            "" if axis == 0 else f", {to_mean:.3g} and {to_deviation:.3g} instead of {mean:.3g} and {deviation:.3g}"
        )
        name = f"give {whose} the mean and the deviation of the training inputs{numbers}"
        found[name] = _moved(mean, deviation, to_mean, to_deviation)
    return found


def _moved(mean: Tensor, deviation: Tensor, to_mean: Tensor, to_deviation: Tensor) -> Correct:
    def correct(x: Tensor) -> Tensor:
        shape = (1, -1) + (1,) * (x.dim() - 2)
        scale = to_deviation / deviation
        return x * scale.view(shape).to(x) + (to_mean - mean * scale).view(shape).to(x)

    return correct


def corrections(x: Tensor) -> dict[str, Correct]:
    """The usual preparations that inputs like `x` (N, C, ...) may lack, or have had once too often, by name."""
    found: dict[str, Correct] = {
        "divide by 255": lambda x: x / 255,
        "multiply by 255": lambda x: x * 255,
        "take 2 x - 1, from 0 to 1 to -1 to 1": lambda x: 2 * x - 1,
        "take (x + 1) / 2, from -1 to 1 to 0 to 1": lambda x: (x + 1) / 2,
        "take x / 127.5 - 1, from 0 to 255 to -1 to 1": lambda x: x / 127.5 - 1,
        "take (x + 1) 127.5, from -1 to 1 to 0 to 255": lambda x: (x + 1) * 127.5,
        "invert, 1 - x": lambda x: 1 - x,
        "invert, 255 - x": lambda x: 255 - x,
    }
    named = {"ImageNet's": IMAGENET, "CIFAR-10's": CIFAR} if x.shape[1] == 3 else {"MNIST's": MNIST}
    for name, (mean, deviation) in named.items():
        found |= _with(name, *_standardised(mean, deviation, x))
    if x.shape[1] == 3 and x.dim() == 4:
        (do, undo), (other, back) = _standardised(*IMAGENET, x), _standardised(*CIFAR, x)
        found["swap red and blue"] = lambda x: x.flip(1)
        found["swap red and blue and divide by 255"] = lambda x: x.flip(1) / 255
        found["swap red and blue under ImageNet's mean and deviation"] = lambda x: do(undo(x).flip(1))
        found["take ImageNet's mean and deviation in place of CIFAR-10's"] = lambda x: do(back(x))
        found["take CIFAR-10's mean and deviation in place of ImageNet's"] = lambda x: other(undo(x))
    return found


def _with(name: str, do: Correct, undo: Correct) -> dict[str, Correct]:
    """The preparations that take a mean and a deviation, or take them back."""
    return {
        f"subtract {name} mean and divide by its deviation": do,
        f"divide by 255, subtract {name} mean and divide by its deviation": lambda x: do(x / 255),
        f"undo {name} mean and deviation, which were taken twice or not meant": undo,
        f"undo {name} mean and deviation and multiply by 255": lambda x: undo(x) * 255,
        f"undo a mean and deviation of 0.5 and take {name}": lambda x: do((x + 1) / 2),
        f"undo {name} mean and deviation and take 0.5 and 0.5": lambda x: 2 * undo(x) - 1,
    }


def _standardised(mean: Sequence[float], deviation: Sequence[float], x: Tensor) -> tuple[Correct, Correct]:
    shape = (1, -1) + (1,) * (x.dim() - 2)
    center, scale = (torch.tensor(values, device=x.device).view(shape) for values in (mean, deviation))
    return lambda x: (x - center.to(x)) / scale.to(x), lambda x: x * scale.to(x) + center.to(x)


def _first(batch: Any, forward: Forward) -> Tensor | None:
    return next((t for t in tensors_in(inputs_of(batch, forward)) if t.is_floating_point()), None)


def _corrected(batch: Any, forward: Forward, correct: Correct) -> Any:
    first = _first(batch, forward)
    return map_tensors(lambda tensor: correct(tensor) if tensor is first else tensor, batch)


def _reaching(model: nn.Module, batch: Any, forward: Forward, path: str, correct: Correct) -> Moments:
    watcher = _At(path)
    try:
        with watching(model, watcher):
            run(model, _corrected(batch, forward, correct), forward)
    except _Reached:
        pass
    return watcher.parts[0]
