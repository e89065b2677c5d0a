"""What a change to a model does to its output, in units of the task: loss, metric, predictions that change."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from steadynorm.blame import in_a_line
from steadynorm.errors import InputError, SteadynormError
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


@dataclass
class _Tally:
    """Sums over the samples, for one pair of states of the model."""

    samples: int = 0
    distance: float = 0.0
    squares: float = 0.0
    predictions: int = 0
    changed: int = 0
    judged: dict[str, float] = field(default_factory=dict)
    metric_name: str = ""

    def add(self, before: Any, after: Any, batch: Any, count: int, task: Task) -> None:
        self.samples += count
        share, changed, predictions = compare(before, after, batch)
        self.squares += count * relative_square(before, after)
        self.distance += count * share
        self.changed += changed
        self.predictions += predictions
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
            distance=self.distance / max(self.samples, 1),
            relative_square=self.squares / max(self.samples, 1),
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


def compare(before: Any, after: Any, batch: Any) -> tuple[float, int, int]:
    """The distance of two outputs (see `Effect`), how many predictions differ, and of how many."""
    a, b = scores(before, batch), scores(after, batch)
    if a is None or b is None:
        return math.sqrt(relative_square(before, after)), 0, 0
    p, q = (t.double().softmax(1) for t in (a, b))
    variation = ((p - q).abs().sum(1) / 2).nan_to_num(nan=1.0)
    # argmax of NaN is some class or other: a row of NaN predicts nothing.
    differ = (a.argmax(1) != b.argmax(1)) | (a.isnan().any(1) != b.isnan().any(1))
    return float(variation.mean()), int(differ.sum()), differ.numel()


def relative_square(before: Any, after: Any) -> float:
    """Mean square of the difference of two outputs over the variance of the second; infinite if not finite."""
    pairs = [
        (a.double().flatten(), b.double().flatten())
        for a, b in zip(tensors_in(before), tensors_in(after), strict=False)
        if a.is_floating_point() and a.shape == b.shape and a.numel()
    ]
    if not pairs:
        return 0.0
    a, b = (torch.cat(side) for side in zip(*pairs, strict=True))
    square, spread = float((a - b).square().mean()), float(b.var(unbiased=False))
    if not math.isfinite(square):
        return math.inf
    return square / max(spread, TINY_VARIANCE)


# An output that does not vary at all still has a finite relative difference.
TINY_VARIANCE = 1e-20
