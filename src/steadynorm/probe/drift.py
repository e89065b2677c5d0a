"""Stored statistics against those of the data, and what the difference costs.

The data's statistics are taken in one pass with the batch norms, and nothing else, in training mode: every layer then
sees inputs that were normalised by their own batch, so that one stale layer does not make all layers after it look
stale. (Measured in evaluation mode, a reset layer was located in 27 of 54 cases; in training mode, in 54 of 54.)

Source: Wu & Johnson, Rethinking "Batch" in BatchNorm, arXiv 2105.07576, section 3 (PreciseBN). Unlike there, batches
are pooled as moments with their counts, so that the result does not depend on how the data was batched.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import mode
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from steadynorm import models, moments
from steadynorm.errors import InputError
from steadynorm.moments import Moments
from steadynorm.probe import effects
from steadynorm.probe.batches import first_samples
from steadynorm.probe.effects import Task
from steadynorm.probe.facts import Drift, Effect, Norm, Values
from steadynorm.probe.samples import sample_count
from steadynorm.probe.trace import Forward, ForwardRaised, Watcher, inputs_of, run, watching
from steadynorm.probe.training_facts import Shared
from steadynorm.training.layer_inputs import normalized_input, of_rows

Statistics = dict[str, tuple[Tensor, Tensor]]
"""Running mean and variance by path of the layer."""

# All stale layers together get no more passes over the evaluation batches than this: many stale layers, fewer samples
# for each, but never fewer than these. What chance does is known from as many as are given here.
EFFECT_PASSES, FEWEST_SAMPLES, CHANCE_SAMPLES = 3, 16, 128
# Variances of so few batches say nothing about how they vary.
FEWEST_BATCHES = 4


@dataclass
class Recalibration:
    """Moments of the inputs of the layers over all batches, in two halves of the data.

    Args:
        halves: by path, (half, other half).
        means: by path, moments of the means of samples: how much samples differ from one another.
        shared: by path, of the layers that a pass calls several times.
        rows_per_sample, values_per_row: by path, of the call with the fewest.
        batches: by path, moments of whole batches that have one count.
    """

    halves: dict[str, tuple[Moments, Moments]] = field(default_factory=dict)
    means: dict[str, Moments] = field(default_factory=dict)
    rows_per_sample: dict[str, float] = field(default_factory=dict)
    values_per_row: dict[str, float] = field(default_factory=dict)
    shared: dict[str, Shared] = field(default_factory=dict)
    batches: dict[str, list[Moments]] = field(default_factory=dict)

    def pooled(self, path: str) -> Moments:
        """Moments of one layer's inputs over all batches."""
        return moments.merge(self.halves[path])

    def statistics(self, paths: Iterable[str], half: int | None = None) -> Statistics:
        """What the running statistics should be, of all the data or of one half of it."""
        found = {path: self.pooled(path) if half is None else self.halves[path][half] for path in paths}
        return {path: (m.mean, m.unbiased_var) for path, m in found.items()}

    def refreshed(self, paths: Iterable[str]) -> Statistics:
        """Statistics of all the data for those of `paths` where they are finite."""
        found = self.statistics(paths)
        return {path: pair for path, pair in found.items() if all(bool(t.isfinite().all()) for t in pair)}

    def values(self, path: str) -> Values:
        """How many values stand behind one statistic."""
        rows, per_row = self.rows_per_sample[path], self.values_per_row[path]
        spread, between = self.pooled(path).unbiased_var, self.means[path].unbiased_var
        lives = spread > 0
        if int(self.means[path].count) < 2 or not bool(lives.any()):
            return Values(path, rows * per_row)
        if per_row == 1:
            return Values(path, rows, rows, self._tails(path, 1.0))
        # The mean of n_eff unrelated values has the variance var / n_eff: one row is worth var(all) / var(row means).
        resemblance = float((between[lives] / spread[lives]).median())
        independent = min(per_row, 1 / resemblance) if resemblance > 0 else per_row
        return Values(path, rows * per_row, rows * independent, self._tails(path, independent / per_row))

    def _tails(self, path: str, independent: float) -> float | None:
        """See `Values`; the variance of n values of a normal distribution varies by 2 / (n - 1) of its square.

        Args:
            independent: share of the values that count as independent.
        """
        parts = self.batches.get(path, [])
        if len(parts) < FEWEST_BATCHES:
            return None
        var = torch.stack([part.var for part in parts])
        lives = var.mean(0) > 0
        varies = (var.var(0) / var.mean(0).square())[lives]
        return float(varies.median()) * (int(parts[0].count) * independent - 1) / 2 if bool(lives.any()) else None


def _shared(calls: Sequence[tuple[list[Moments], list[Moments]]], eps: float) -> Shared:
    """How far the calls of one layer are from their pool, and how far halves of one call are from each other."""
    of_calls = [(moments.merge(a or b), moments.merge(b or a)) for a, b in calls]
    pool = moments.merge([half for halves in of_calls for half in halves])
    farthest = null = 0.0
    for halves in of_calls:
        pair, (a, b) = moments.merge(list(halves)), halves
        farthest = max(farthest, divergence((pair.mean, pair.var), (pool.mean, pool.var), eps))
        null = max(null, divergence((a.mean, a.var), (b.mean, b.var), eps))
    return Shared(len(calls), farthest, null)


class _Collector(Watcher):
    def __init__(self, model: nn.Module, paths: Sequence[str], is_single: bool) -> None:
        super().__init__()
        self.eps = {path: float(getattr(model.get_submodule(path), "eps", None) or 0.0) for path in paths}
        self.paths, self.is_single = set(paths), is_single
        self.parts: dict[str, tuple[list[Moments], list[Moments]]] = {path: ([], []) for path in paths}
        self.found = Recalibration()
        # By path, and the place of the call among those of the layer in one pass.
        self.places: dict[str, int] = {}
        self.calls: dict[str, list[tuple[list[Moments], list[Moments]]]] = {path: [] for path in paths}
        self.batch, self.samples = 0, 1

    def enter(self, path: str, module: nn.Module, inputs: Any) -> None:
        super().enter(path, module, inputs)
        if path not in self.paths:
            return
        x, mask = normalized_input(module, *inputs)
        if x.dim() < 2 or x.shape[1] != models.running_statistics(module)[0].numel() or not x.numel():
            return  # nothing, or a subclass with its channels elsewhere
        rows = of_rows(x, mask)
        place = self.places[path] = self.places.get(path, -1) + 1
        if place == len(self.calls[path]):
            self.calls[path].append(([], []))
        for half in (0, 1) if self.is_single else (self.batch % 2,):
            part = moments.merge_rows(_every_second(rows, half) if self.is_single else rows)
            self.parts[path][half].append(part)
            self.calls[path][place][half].append(part)
        means = moments.merge_rows(_without_spread(rows))
        known = self.found.means.get(path)
        self.found.means[path] = means if known is None else moments.merge([known, means])
        values = x.numel() / max(x.shape[0] * x.shape[1], 1)
        for kept, value in (
            (self.found.rows_per_sample, x.shape[0] / self.samples),
            (self.found.values_per_row, values),
        ):
            kept[path] = min(value, kept.get(path, value))

    def result(self) -> Recalibration:
        for path, (a, b) in self.parts.items():
            if a or b:  # a layer that is never called has nothing to say
                halves = (moments.merge(a or b), moments.merge(b or a))
                self.found.halves[path] = halves
                self.found.batches[path] = [] if self.is_single else _alike([*a, *b])
            if len(self.calls[path]) > 1:
                self.found.shared[path] = _shared(self.calls[path], self.eps[path])
        return self.found


def _alike(parts: Sequence[Moments]) -> list[Moments]:
    """Those that have the count that most have, where counts are plain numbers."""
    counts = [part.count for part in parts if isinstance(part.count, int)]
    return [part for part in parts if part.count == mode(counts)] if len(counts) == len(parts) else []


def with_dropout(
    model: nn.Module,
    batches: Sequence[Any],
    forward: Forward,
    stale: Sequence[str],
    stored: "Stored",
    norms: dict[str, Norm],
) -> dict[str, float]:
    """Divergence of the stored statistics of the stale layers from those of the data with dropout switched on."""
    dropping = [path for path, m in model.named_modules() if isinstance(m, _DropoutNd) and m.p > 0]
    if not dropping or not stale:
        return {}
    try:
        with training_mode(model, dropping):
            found = recalibrate(model, batches, forward, list(stored.layers))
    finally:
        stored.put()
    data = found.statistics(path for path in stale if path in found.halves)
    return {path: divergence(stored.original[path], pair, norms[path].eps or 0.0) for path, pair in data.items()}


def recalibrate(model: nn.Module, batches: Sequence[Any], forward: Forward, paths: Sequence[str]) -> Recalibration:
    """Moments of what reaches the layers `paths`, with these layers in training mode and all else in evaluation mode.

    Their running statistics move as in training; the caller puts them back (see `Stored`).
    """
    collector = _Collector(model, paths, is_single=len(batches) == 1)
    with training_mode(model, paths), watching(model, collector):
        for i, batch in enumerate(batches):
            collector.batch, collector.places = i, {}
            collector.samples = sample_count(inputs_of(batch, forward)) or 1
            run(model, batch, forward)
    return collector.result()


@contextmanager
def training_mode(model: nn.Module, paths: Iterable[str]) -> Iterator[None]:
    """The layers `paths` in training mode, by themselves: neither what they contain nor an overridden `train()`."""
    layers = [model.get_submodule(path) for path in paths]
    before = [layer.training for layer in layers]
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer, was_training in zip(layers, before, strict=True):
            layer.training = was_training


def _every_second(rows: Moments, first: int) -> Moments:
    count = rows.count if isinstance(rows.count, int) else rows.count[first::2]
    return Moments(rows.mean[first::2], rows.var[first::2], count)


def _without_spread(rows: Moments) -> Moments:
    """Every row that has values as one value, its mean."""
    count = 1 if isinstance(rows.count, int) else (rows.count > 0).double()
    return Moments(rows.mean, torch.zeros_like(rows.var), count)


class Stored:
    """The statistics that a model came with, and any others put in their place, in place."""

    def __init__(self, model: nn.Module, paths: Iterable[str]) -> None:
        self.layers = {path: model.get_submodule(path) for path in paths}
        self.original: Statistics = {}
        for path, layer in self.layers.items():
            mean, var = models.running_statistics(layer)
            self.original[path] = (mean.clone(), var.clone())

    def put(self, *statistics: Statistics) -> None:
        """The original statistics, but for those given; a later one wins."""
        merged = dict(self.original)
        for some in statistics:
            merged.update(some)
        with torch.no_grad():
            for path, (mean, var) in merged.items():
                running_mean, running_var = models.running_statistics(self.layers[path])
                running_mean.copy_(mean)
                running_var.copy_(var)

    def without(self, path: str) -> Statistics:
        """The original statistics of one layer."""
        return {path: self.original[path]}


def divergence(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], eps: float) -> float:
    """Jeffreys' divergence of two normal distributions, KL(a‖b) + KL(b‖a), mean over channels; infinite if broken.

    J = ½ (var_a / var_b + var_b / var_a − 2 + (mean_a − mean_b)² (1 / var_a + 1 / var_b))

    `eps` is added to the variances, as the layer does: a channel without variance has no say.
    Source: Jeffreys, An invariant form for the prior probability, Proc. R. Soc. A 186 (1946).
    """
    (mean_a, var_a), (mean_b, var_b) = ((m.double(), v.double() + eps) for m, v in (a, b))
    per_channel = (var_a / var_b + var_b / var_a - 2 + (mean_a - mean_b).square() * (1 / var_a + 1 / var_b)) / 2
    mean = float(per_channel.mean())
    return mean if math.isfinite(mean) and bool((var_a > 0).all()) else math.inf


def drifts(recalibration: Recalibration, stored: Stored, norms: dict[str, Norm]) -> dict[str, Drift]:
    """Each layer's stored statistics against the recalibrated ones."""
    found = {}
    for path, halves in recalibration.halves.items():
        eps = norms[path].eps or 0.0
        mean, var = (t.double() for t in stored.original[path])
        data = recalibration.statistics([path])[path]
        deviation = (data[1] + eps).sqrt()
        ratio = ((var + eps) / (data[1] + eps)).clamp(min=1e-12)
        farthest = ratio.log().abs().nan_to_num(nan=math.inf).argmax()
        a, b = ((half.mean, half.unbiased_var) for half in halves)
        residue = norms[path].residue
        begun = (mean / (1 - residue), (var - residue).clamp(min=0) / (1 - residue))
        found[path] = Drift(
            path=path,
            divergence=divergence((mean, var), data, eps),
            null=divergence(a, b, eps),
            mean_shift=float(((mean - data[0]).abs() / deviation).max()),
            variance_ratio=float(ratio[farthest]),
            without_beginning=divergence(begun, data, eps) if residue else None,
            stored=_by_channel(mean, var),
            measured=_by_channel(*data),
        )
    return found


def _by_channel(mean: Tensor, var: Tensor) -> tuple[tuple[float, float], ...]:
    return tuple(zip(mean.tolist(), var.tolist(), strict=True))


def effects_of(
    model: nn.Module,
    batches: Sequence[Any],
    forward: Forward,
    task: Task,
    stale: Sequence[str],
    stored: Stored,
    recalibration: Recalibration,
) -> tuple[dict[str, Effect], Effect]:
    """What the stored statistics of the stale layers cost: of each alone, and of all at once.

    For one layer, the other stale ones are recalibrated before and after: with several, exchanging a single one in a
    model that stays broken would say nothing.
    """
    refreshed = recalibration.statistics(stale)
    halves = [recalibration.statistics(stale, half) for half in (0, 1)]

    def state(*statistics: Statistics) -> Callable[[], None]:
        return lambda: stored.put(*statistics)

    some = first_samples(batches, forward, CHANCE_SAMPLES)
    (chance,) = effects.between(model, some, forward, [state(halves[0])], state(halves[1]))
    null = chance.distance
    (together,) = effects.between(model, batches, forward, [state()], state(refreshed), task=task, null=null)
    if len(stale) == 1:
        return {stale[0]: together}, together
    total = sum(sample_count(inputs_of(batch, forward)) or 1 for batch in batches)
    few = first_samples(batches, forward, max(FEWEST_SAMPLES, EFFECT_PASSES * total // len(stale)))
    befores = [state(refreshed, stored.without(path)) for path in stale]
    try:
        alone = effects.between(model, few, forward, befores, state(refreshed), task=task, null=null)
    except (InputError, ForwardRaised):  # of a part of a batch; a whole one was seen to run
        alone = effects.between(model, batches[:1], forward, befores, state(refreshed), task=task, null=null)
    return dict(zip(stale, alone, strict=True)), together


def training_gap(
    model: nn.Module,
    batches: Sequence[Any],
    forward: Forward,
    task: Task,
    stored: Stored,
    recalibration: Recalibration,
) -> Effect:
    """Training mode against evaluation mode with recalibrated statistics, on the same batches."""
    paths = list(recalibration.halves)
    refreshed = recalibration.statistics(paths)

    def train() -> None:
        for path in paths:
            stored.layers[path].training = True

    def evaluate() -> None:
        for path in paths:
            stored.layers[path].training = False
        stored.put(refreshed)

    (gap,) = effects.between(model, batches, forward, [train], evaluate, task=task)
    evaluate()
    stored.put()
    return gap
