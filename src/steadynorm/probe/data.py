"""The inputs of a split, without the model: their scale, and whether its batches are alike.

Batches are compared by random projections of their samples. Were samples dealt out at random, the means of batches
would vary by the variance of samples over the size of the batch; F is the ratio of the two. How large it gets by chance
is asked of the same samples, dealt out anew a thousand times: it depends on the data and on the number of batches.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from steadynorm.probe.samples import sample_count, tensors_in
from steadynorm.probe.training_facts import Inputs, Likeness

# Random directions of the input in which batches are compared, and values of a sample that these look at.
PROJECTIONS = 64
MOST_VALUES = 4096
SEED = 0
# Below 15 batches the F of chance alone reached 2.95; more samples than these say nothing new.
FEWEST_BATCHES, MOST_SAMPLES = 15, 2048
PERMUTATIONS, DEALS_AT_ONCE = 999, 32
# A feature that varies by less than this is a constant.
CONSTANT_VARIANCE = 1e-12
# Deviation beside the largest one from which on a feature is as good as not there for what is being trained.
DROWNED = 0.01
# Of more features than these some are looked at, evenly spread.
MOST_FEATURES = 512


@dataclass
class Sketch:
    """Random projections of the samples, batch by batch, and sums over all values."""

    projected: list[Tensor] = field(default_factory=list)
    values: list[tuple[float, float, float, float]] = field(default_factory=list)
    features: list[Tensor] = field(default_factory=list)
    shape: torch.Size | None = None
    is_ragged: bool = False
    _directions: Tensor | None = None
    _picked: Tensor | None = None

    @property
    def is_enough(self) -> bool:
        """Whether more batches would say nothing new."""
        return len(self.projected) >= FEWEST_BATCHES or sum(map(len, self.projected)) >= MOST_SAMPLES

    def add(self, inputs: Any) -> None:
        """Take in the first tensor of floating-point numbers of a batch that has a row for each sample."""
        count = sample_count(inputs)
        found = [t for t in tensors_in(inputs) if t.is_floating_point() and t.dim() > 1 and t.shape[0] == count]
        if not found or not found[0].numel():
            return
        x = found[0].detach().float()
        # Beside a mask, some of the values are padding, which may be anything.
        if not any(t.dtype == torch.bool for t in tensors_in(inputs)):
            self.values.append((float(x.mean()), float(x.square().mean()), float(x.min()), float(x.max())))
        if self.shape is not None and x.shape[1:] != self.shape:
            self.is_ragged = True
            return
        self.shape = x.shape[1:]
        rows = x.flatten(1)
        if x.dim() == 2:
            self.features.append(rows)
        if self._directions is None:
            generator = torch.Generator().manual_seed(SEED)
            picked = torch.randperm(rows.shape[1], generator=generator)[:MOST_VALUES]
            self._picked = picked.to(x.device)
            self._directions = torch.randn(len(picked), PROJECTIONS, generator=generator).to(x.device)
        self.projected.append((rows[:, self._picked] @ self._directions).double().cpu())

    def inputs(self) -> Inputs | None:
        """Scale of the inputs over all batches that were taken in; None if there was none."""
        if not self.values:
            return None
        mean, square, low, high = (torch.tensor(column).double() for column in zip(*self.values, strict=True))
        deviation = float((square.mean() - mean.mean() ** 2).clamp(min=0).sqrt())
        constant, drowned = 0, 0.0
        if self.features and sum(map(len, self.features)) > 1:
            table = torch.cat(self.features).double()
            constant = int((table.var(0) < CONSTANT_VARIANCE).sum())
            drowned = _drowned(table[:, :: 1 + table.shape[1] // MOST_FEATURES])
        return Inputs(float(mean.mean()), deviation, float(low.min()), float(high.max()), constant, drowned)

    def likeness(self) -> Likeness | None:
        """How alike the batches are; None where that cannot be said."""
        batches = [rows for rows in self.projected if len(rows) > 1]
        if self.is_ragged or len(batches) < 4:
            return None
        rows = torch.cat(batches)
        rows = rows[:, rows.std(0) > 0]
        if not rows.numel():
            return None
        rows = ((rows - rows.mean(0)) / rows.std(0)).float()
        sizes = torch.tensor([len(b) for b in batches])
        owner = torch.repeat_interleave(torch.arange(len(batches)), sizes)
        found = float(_ratios(rows, owner[None], sizes))
        generator = torch.Generator().manual_seed(SEED)
        deals = torch.rand(PERMUTATIONS, len(rows), generator=generator).argsort(1)
        chance = torch.cat([_ratios(rows, owner[some], sizes) for some in deals.split(DEALS_AT_ONCE)])
        return Likeness(
            ratio=found,
            chance=float(chance.sort().values[int(0.99 * PERMUTATIONS)]),
            p=(1 + int((chance >= found).sum())) / (1 + PERMUTATIONS),
            batches=len(batches),
            samples=len(rows),
        )


def _drowned(table: Tensor) -> float:
    """Share of the features of a table that the one of the largest deviation drowns."""
    # Counts, rare categories and the borders of images hold one value for the most part, and vary little by nature.
    is_sparse = (table == table.mode(0).values).double().mean(0) > 0.5
    deviations = table.var(0).sqrt()[~is_sparse]
    deviations = deviations[deviations.square() >= CONSTANT_VARIANCE]
    return float((deviations < DROWNED * deviations.max()).double().mean()) if len(deviations) > 1 else 0.0


def _ratios(rows: Tensor, owners: Tensor, sizes: Tensor) -> Tensor:
    """Variance between batches over that within them, as the F of an analysis of variance, over all directions.

    Args:
        rows: (samples, directions), centred.
        owners: (deals, samples): which batch a sample belongs to, in each of several ways to deal them out.
        sizes: samples of each batch.
    """
    count, samples = len(sizes), len(rows)
    is_of = torch.nn.functional.one_hot(owners, count).transpose(1, 2).to(rows.dtype)
    sums = (is_of.reshape(-1, samples) @ rows).reshape(len(owners), count, -1)
    between = (sums.square().sum(2) / sizes).sum(1)
    within = rows.square().sum() - between
    return between / (count - 1) / (within / max(samples - count, 1)).clamp(min=1e-30)
