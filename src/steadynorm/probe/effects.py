"""What a change to a model does to its output, in units of the task: loss, metric, predictions that change."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from steadynorm import moments
from steadynorm.blame import in_a_line
from steadynorm.errors import InputError, SteadynormError
from steadynorm.moments import Moments
from steadynorm.probe.facts import Effect
from steadynorm.probe.samples import join, sample_count, scores, shapes, take, tensors_in
from steadynorm.probe.trace import Forward, inputs_of, run

Loss = Callable[[Any, Any], Tensor]
Metrics = Callable[[Any, Any], dict[str, float]]


@dataclass(frozen=True)
class Task:
    """How outputs are judged, where that is known."""

    loss: Loss | None = None
    metrics: Metrics | None = None

    def judge(self, output: Any, batch: Any) -> tuple[float | None, str, float | None]:
        """The loss, and the name and value of the first metric.

        Raises:
            InputError: loss or metrics cannot be computed: the caller's mistake, not a fact about the model.
        """
        try:
            with torch.no_grad():
                loss = None if self.loss is None else float(self.loss(output, batch))
                found = {} if self.metrics is None else self.metrics(output, batch)
            name = next(iter(found), "")
            return loss, name, float(found[name]) if name else None
        except SteadynormError:
            raise
        except Exception as error:
            raise InputError(
                f"loss or metrics raised {in_a_line(error)}: expected loss(output, batch) -> scalar tensor and "
                "metrics(output, batch) -> dict[str, float]."
            ) from error


UNJUDGED = Task()


# An output that does not vary at all still has a finite relative difference.
TINY_VARIANCE = 1e-20


class Spread:
    """Square difference of two outputs against the variance, over samples, of the second."""

    def __init__(self) -> None:
        self.square, self.values = 0.0, 0
        self.moments: list[Moments] = []

    def add(self, before: Tensor, after: Tensor) -> None:
        """Count one batch, both (samples, values)."""
        if before.shape != after.shape:
            return  # lengths that follow the data: nothing to compare
        self.square += float((before - after).square().sum())
        self.values += before.numel()
        found = moments.of(after.unsqueeze(2))
        if self.moments and self.moments[0].mean.shape == found.mean.shape:
            found = moments.merge([self.moments.pop(), found])
        self.moments.append(found)

    @property
    def relative_square(self) -> float:
        """Mean square of the difference over the variance; infinite if the difference is not finite."""
        if not math.isfinite(self.square):
            return math.inf
        variances = torch.cat([found.var for found in self.moments]) if self.moments else torch.zeros(1)
        return self.square / max(self.values, 1) / max(float(variances.mean()), TINY_VARIANCE)


@dataclass
class _Tally:
    """Sums over the samples, for one pair of states of the model."""

    samples: int = 0
    spread: Spread = field(default_factory=Spread)
    variation: float = 0.0
    predictions: int = 0
    changed: int = 0
    judged: dict[str, float] = field(default_factory=dict)
    metric_name: str = ""

    def add(self, before: Any, after: Any, batch: Any, count: int, task: Task) -> None:
        self.samples += count
        self.spread.add(rows(before, count), rows(after, count))
        if found := disagreement(before, after, batch):
            self.variation += count * found[0]
            self.changed += found[1]
            self.predictions += found[2]
        for which, output in (("before", before), ("after", after)):
            loss, self.metric_name, metric = task.judge(output, batch)
            for name, value in (("loss", loss), ("metric", metric)):
                if value is not None:
                    self.judged[f"{name} {which}"] = self.judged.get(f"{name} {which}", 0.0) + count * value

    def effect(self, null: float | None = None) -> Effect:
        def pair(name: str) -> tuple[float, float] | None:
            if f"{name} before" not in self.judged:
                return None
            return self.judged[f"{name} before"] / self.samples, self.judged[f"{name} after"] / self.samples

        return Effect(
            samples=self.samples,
            distance=self.variation / self.samples if self.predictions else math.sqrt(self.spread.relative_square),
            relative_square=self.spread.relative_square,
            null=null,
            changed=self.changed / self.predictions if self.predictions else None,
            loss=pair("loss"),
            metric=pair("metric"),
            metric_name=self.metric_name,
        )


def between(
    model: nn.Module,
    batches: Sequence[Any],
    forward: Forward,
    befores: Sequence[Callable[[], None]],
    after: Callable[[], None],
    *,
    task: Task = UNJUDGED,
    null: float | None = None,
) -> list[Effect]:
    """The effect of each state in `befores` against the state `after`, on the same batches.

    Args:
        befores, after: functions that put the model into a state. All are run on a batch before the next batch comes,
            so that no more than two outputs are held.
    """
    tallies = [_Tally() for _ in befores]
    for batch in batches:
        count = sample_count(inputs_of(batch, forward)) or 1
        after()
        reference = run(model, batch, forward)
        for before, tally in zip(befores, tallies, strict=True):
            before()
            tally.add(run(model, batch, forward), reference, batch, count, task)
    return [tally.effect(null) for tally in tallies]


def of_mates(model: nn.Module, batches: Sequence[Any], forward: Forward, task: Task = UNJUDGED) -> Effect | None:
    """The effect of giving the first half of every batch another second half, that of a batch far away in the data."""
    tally = _Tally()
    for i, batch in enumerate(batches):
        partner = batches[(i + len(batches) // 2) % len(batches)]
        count = sample_count(inputs_of(batch, forward))
        if count is None or count < 2 or shapes(partner) != shapes(batch):
            continue
        half = list(range(count // 2))
        rest = list(range(count // 2, count)) if partner is not batch else [0] * (count - len(half))
        mixed = join(take(batch, half), take(partner, rest))
        outputs = [run(model, b, forward) for b in (batch, mixed)]
        if all(sample_count(next(tensors_in(output), None)) == count for output in outputs):
            # A loss knows the output in the type in which it comes, which only plain ones keep.
            is_plain = isinstance(outputs[0], Tensor | tuple | list)
            before, after = (take(output, half) for output in outputs)
            tally.add(before, after, take(batch, half), len(half), task if is_plain else UNJUDGED)
    return tally.effect() if tally.samples else None


def of_inputs(
    model: nn.Module, batches: Sequence[Any], forward: Forward, correct: Callable[[Any], Any], task: Task = UNJUDGED
) -> Effect | None:
    """The effect of the inputs as they are, against batches that were corrected."""
    tally = _Tally()
    for batch in batches:
        count = sample_count(inputs_of(batch, forward)) or 1
        before, after = run(model, batch, forward), run(model, correct(batch), forward)
        tally.add(before, after, batch, count, task)
    return tally.effect() if tally.samples else None


def disagreement(before: Any, after: Any, batch: Any) -> tuple[float, int, int] | None:
    """Total variation of the class probabilities, mean over predictions, how many predictions differ, and of how many.

    None where the outputs are not class scores.
    """
    a, b = scores(before, batch), scores(after, batch)
    if a is None or b is None:
        return None
    p, q = (t.double().softmax(1) for t in (a, b))
    variation = ((p - q).abs().sum(1) / 2).nan_to_num(nan=1.0)
    # argmax of NaN is some class or other: a row of NaN predicts nothing.
    differ = (a.argmax(1) != b.argmax(1)) | (a.isnan().any(1) != b.isnan().any(1))
    return float(variation.mean()), int(differ.sum()), differ.numel()


def rows(output: Any, count: int) -> Tensor:
    """The floating-point values of an output as (count, values), or each as a row where they do not come by sample."""
    found = [t.double() for t in tensors_in(output) if t.is_floating_point()] or [torch.zeros(0, 1).double()]
    if all(t.dim() and t.shape[0] == count for t in found):
        return torch.cat([t.reshape(count, -1) for t in found], 1)
    return torch.cat([t.reshape(-1, 1) for t in found])
