"""fold: batch norms become part of the layers around them, exactly, or with a reason why not."""

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

from steadynorm import layers
from steadynorm.convert.change import Change, Converted
from steadynorm.deploy import flow, units
from steadynorm.deploy.difference import Forward, OutputDifference, compare, default_tolerance, first_parting
from steadynorm.deploy.folding import Folding, make_torchs
from steadynorm.deploy.places import Places, Refused, Step
from steadynorm.errors import DifferenceError, InputError
from steadynorm.kernels import backend
from steadynorm.samples import map_tensors, tensors_in
from steadynorm.selection import Selection, select
from steadynorm.training.evaluation import call, unwrapped

TURNED = "what follows wants its output in a memory order that its input does not have"


@dataclass(frozen=True, repr=False)
class Difference:
    """How far the outputs of a folded model are from those of the model it was made of.

    Args:
        outputs: in the dtype of the model, over the example batches.
        float64: of the model in float64, with the same folds carried out in float64: what is there besides rounding.
        not_in_float64: why that could not be measured; empty where it was.
    """

    outputs: tuple[OutputDifference, ...]
    float64: tuple[OutputDifference, ...]
    not_in_float64: str = ""

    def __repr__(self) -> str:
        lines = [str(output) for output in self.outputs]
        lines += [f"in float64: {output}" for output in self.float64]
        return "\n".join(lines + ([f"not compared in float64: {self.not_in_float64}"] if self.not_in_float64 else []))


@dataclass(frozen=True, repr=False)
class Folded(Change):
    """The Change of a fold, which `unfold` can take back.

    Args:
        folding: the norms that are gone, and what the layers were that took them in.
    """

    folding: Folding | None = None


def fold(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    leave: Selection | None = None,
    tolerance: float | None = None,
    forward: Forward | None = None,
) -> Folded:
    """A plain torch.nn copy of `model` for evaluation, with its batch norms folded into the layers beside them.

    after a layer:   W' = scale · W,  c' = scale · c + shift
    before a layer:  W' = W · scale,  c' = c + Σ W · shift
    scale = weight / sqrt(running_var + eps),  shift = bias − scale · running_mean,  in float64, rounded once

    Where norms stand is taken from what happens when the batches run, not from the order of definition and not from a
    tracer: every call of every layer, and every other use of every tensor, known by its storage, seen by a mode over
    the functions of torch and one over its operators. A norm is folded only where, in every call of every batch, all
    that the layer makes goes to that norm and nowhere else: no other operator, in-place change, output of the model, or
    reference that outlives the pass. Views in between must keep channels. So control flow may depend on the data.

    What cannot be seen: a path that no batch takes; a read through a pointer kept from before, without a call of torch;
    work in threads. The two models are run on all batches and compared, which shows what is wrong on the paths that
    they take; for another path give a batch that takes it.

    Args:
        model: in evaluation mode; it is not changed.
        batches: examples that lead through every part of the model; kept in memory, and gone through several times.
        leave: norms that are not folded: a pattern for paths, a class, a function of path and layer, or several.
        tolerance: the largest relative difference of an output; by default `default_tolerance`, sqrt(machine epsilon)
            of its dtype.
        forward: called as forward(model, batch), in place of model(batch), model(*args) or model(**dict).

    Returns: the folded model; what was folded, and what was not and why; the difference. An `nn.Identity`, or what is
        left to do (an activation, an addition, padding), stands where a norm was, so that the other names stay.
        Parametrized weights are plain. `unfold` takes it back.

    Raises:
        InputError: a model in training mode, or one that cannot be copied; no batches.
        DifferenceError: the folded model does not compute what the model does, with the numbers; nothing is returned.
    """
    batches, forward = [*batches], forward or call
    _check(model, batches)
    plain, made_plain = _plain_copy(model)
    chosen = select(units.normalizations(plain), leave, "fold(leave=)", "normalization") if leave is not None else []
    kept = {path: "left out by leave=" for path, _ in chosen}
    folding, left = _fold(plain, batches, forward, kept)
    steps = folding.steps
    record = _record(folding.model, units.units(folding.model), batches, forward, steps)
    folded, log, needs = make_torchs(folding.model, record)
    difference = _differences(plain, folded, steps, batches, forward, tolerance)
    left |= {path: f"{left[path]}; {reason}" if path in left else reason for path, reason in needs.items()}
    apart = tuple(dict.fromkeys(step.layer if step.side == "after" else step.norm for step in steps))
    folding.wide.clear()
    return Folded(folded, (*made_plain, *folding.log, *log), left, "folded", difference, apart, folding)


def _check(model: nn.Module, batches: Sequence[Any]) -> None:
    if unwrapped(model) is not model:
        raise InputError(f"fold got a {type(model).__name__}: give the model inside of it.")
    if model.training:
        raise InputError("fold got a model in training mode, in which norms use the batch: call model.eval() first.")
    if not batches:
        raise InputError("fold got no batch: give examples that lead through every part of the model.")
    if torch_module._has_any_global_hook():
        raise InputError("fold found hooks on all modules of the process, which see every tensor: take them off first.")
    if any(isinstance(getattr(one, "_orig_mod", None), nn.Module) for one in model.modules()):
        raise InputError("fold found a compiled module inside of the model: fold first, then compile.")


def _plain_copy(model: nn.Module) -> tuple[nn.Module, list[Converted]]:
    """A copy of the model whose weights are not computed from others any more."""
    try:
        plain = copy.deepcopy(model)
    except Exception as error:
        raise InputError(f"fold cannot copy the model: {type(error).__name__}: {error}") from error
    log = [
        Converted((f"{path}.{name}".lstrip("."),), "parametrized", "plain")
        for path, module in plain.named_modules()
        if parametrize.is_parametrized(module)
        for name in module.parametrizations
    ]
    return layers.make_plain(plain), log


def _fold(
    plain: nn.Module, batches: Sequence[Any], forward: Forward, kept: dict[str, str]
) -> tuple[Folding, dict[str, str]]:
    """Fold until nothing more can be: a norm that is gone may have stood between another and its layer."""
    folding, unfit, merging = Folding(copy.deepcopy(plain)), dict[str, str](), False
    model = folding.model
    while True:
        modules = units.units(model)
        try:
            record = _record(model, modules, batches, forward, folding.steps)
        except DifferenceError as error:
            stays = _asked(error.__cause__, folding) or {step.norm: TURNED for step in folding.steps if step.turns}
            if not stays:
                raise
            return _fold(plain, batches, forward, kept | stays)
        places = Places(modules, record, merging=merging)
        left, found, taken = dict[str, str](), list[Step](), set[str]()
        for path, norm in units.normalizations(model):
            reason = kept.get(path) or unfit.get(path) or units.why_not(norm)
            try:
                step = places.of(path) if not reason else None
            except Refused as refusal:
                reason = str(refusal)
            if reason or step is None:
                left[path] = reason
            # A layer takes one norm a round, and none that goes itself: the recording holds for the model as it was.
            elif step.layer not in taken and step.norm not in taken and step.layer not in kept:
                taken |= {step.layer, step.norm}
                found.append(step)
        for step in found:
            try:
                folding.take(step)
            except Refused as refusal:
                unfit[step.norm] = str(refusal)
        if not found and merging:
            return folding, left
        # What two norms in a row can be is one norm, where no layer takes either.
        merging = not found


def _asked(error: BaseException | None, folding: Folding) -> dict[str, str]:
    """The norm of which the model's code wants an attribute that what stands in its place has not."""
    asked = getattr(error, "obj", None) if isinstance(error, AttributeError) else None
    if not isinstance(asked, nn.Module):
        return {}
    paths = {path for path, one in folding.model.named_modules(remove_duplicate=False) if one is asked}
    reason = f"code of the model asks it for its attribute {getattr(error, 'name', '')}"
    return {step.norm: reason for step in folding.steps if step.norm in paths}


def _differences(
    plain: nn.Module,
    folded: nn.Module,
    steps: list[Step],
    batches: Sequence[Any],
    forward: Forward,
    tolerance: float | None,
) -> Difference:
    """The difference in the dtype of the model and in float64; an error where one is over the tolerance."""
    apart = frozenset(step.layer if step.side == "after" else step.norm for step in steps)
    outputs = _held(plain, folded, batches, forward, tolerance, apart, "")
    wide = copy.deepcopy(plain).double()
    wide_batches = [map_tensors(lambda t: t.double() if t.is_floating_point() else t, batch) for batch in batches]
    narrow = _Narrow()
    try:
        # The reference is plain PyTorch: a second witness, and no kernels have to be compiled for one pass.
        with backend("reference"), narrow:
            compare(wide, wide, wide_batches[:1], forward)
    except Exception as error:
        return Difference(outputs, (), f"the model does not run in float64: {type(error).__name__}: {error}")
    twin = Folding(copy.deepcopy(wide))
    for step in steps:
        twin.take(step)
    bar = max(default_tolerance(narrow.dtype), default_tolerance(torch.float64)) if tolerance is None else tolerance
    with backend("reference"):
        float64 = _held(wide, twin.model, wide_batches, forward, bar, apart, " in float64")
    return Difference(outputs, float64)


def _held(
    a: nn.Module,
    b: nn.Module,
    batches: Sequence[Any],
    forward: Forward,
    tolerance: float | None,
    apart: frozenset[str],
    where: str,
) -> tuple[OutputDifference, ...]:
    """The differences, if all are within the tolerance."""
    try:
        outputs = compare(a, b, batches, forward)
    except Exception as error:
        raise _raised(error, where) from error
    if not outputs:
        raise InputError("fold found no tensor in what the model returns: nothing could be compared.")
    over = [output for output in outputs if not output.is_within(tolerance)]
    if over:
        worst = max(over, key=lambda output: output.relative)
        first = first_parting(a, b, batches[worst.batch], forward, tolerance, apart)
        bar = default_tolerance(worst.dtype) if tolerance is None else tolerance
        raise DifferenceError(
            f"the folded model differs{where} from the model by more than {bar:.1e}: {worst}; they part at"
            f" {first or 'the model itself'}. Nothing was folded. leave= keeps a norm; tolerance= allows more."
        )
    return outputs


def _record(
    model: nn.Module, modules: dict[str, nn.Module], batches: Sequence[Any], forward: Forward, steps: list[Step]
) -> flow.Record:
    try:
        return flow.record(model, modules, batches, forward)
    except Exception as error:
        if not steps:  # the model as it was given
            raise
        raise _raised(error, "") from error


def _raised(error: Exception, where: str) -> DifferenceError:
    return DifferenceError(
        f"the folded model raised{where}, where the model did not: {type(error).__name__}: {error}. Its code may want a"
        " norm where none is: leave= leaves it as it is. Nothing was folded."
    )


class _Narrow(TorchDispatchMode):
    """The narrowest floating dtype in which something is computed: a model may cast by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.dtype = torch.float64

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in _floating(output):
            if torch.finfo(tensor.dtype).eps > torch.finfo(self.dtype).eps:
                self.dtype = tensor.dtype
        return output


def _floating(value: Any) -> Iterator[torch.Tensor]:
    yield from (tensor for tensor in tensors_in(value) if tensor.is_floating_point())
