"""Moments: mean, biased variance and count of a set of values, and the two ways to combine them.

`merge` is exact for any split and order of the values; `ema` forgets. Whatever pools statistics (kernels, ranks,
micro-batches, recalibration) goes through one of the two. The Bessel factor is here and nowhere else.

`momentum` is the weight of the *new* batch, as in PyTorch; Keras and Flax mean the weight of the old value.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Mean (group,), biased variance (group,) and count of the values behind them.

    `count` is an int where every group saw the same number of values, else a tensor: () or (group,).
    Mean and variance are float32 or better; kernels give float64, in which merging loses nothing that matters.
    """

    mean: Tensor
    var: Tensor
    count: int | Tensor

    @property
    def unbiased_var(self) -> Tensor:
        """The variance with Bessel's factor n / (n − 1); for a single value its biased variance, zero."""
        count = self.count
        if isinstance(count, Tensor):
            count = count.to(self.var.dtype)
            return self.var * (count / (count - 1).clamp(min=1))
        return self.var * (count / max(count - 1, 1))

    @classmethod
    def from_unbiased(cls, mean: Tensor, unbiased_var: Tensor, count: int | Tensor) -> Self:
        """Moments whose `unbiased_var` is the one given: Bessel's factor taken back, (n − 1) / n."""
        if isinstance(count, Tensor):
            n = count.to(unbiased_var.dtype)
            return cls(mean, unbiased_var * ((n - 1).clamp(min=1) / torch.where(n > 0, n, 1)), count)
        return cls(mean, unbiased_var * (max(count - 1, 1) / max(count, 1)), count)

    def invstd(self, eps: float) -> Tensor:
        """1 / sqrt(var + eps)."""
        return torch.rsqrt(self.var + eps)


def on_device(number: float | Tensor, like: Tensor) -> Tensor:
    """A number as a tensor in the dtype and on the device of `like`: made there, since a copy would wait for it."""
    return number.to(like) if isinstance(number, Tensor) else like.new_full((), number)


def of(x: Tensor) -> Moments:
    """Moments of `x` (outer, group, inner) per group, in float64 and plain PyTorch."""
    x = x.double()
    count = x.shape[0] * x.shape[2]
    if count == 0:
        empty = x.new_zeros(x.shape[1])
        return Moments(empty, empty.clone(), 0)
    mean = x.mean(dim=(0, 2))
    return Moments(mean, (x - mean[None, :, None]).square().mean(dim=(0, 2)), count)


def merge(parts: Iterable[Moments]) -> Moments:
    """Moments of all values of `parts`, exactly as if they had come as one batch.

    mean = Σ n·mean / Σ n;  var = Σ n·(var + (mean_part − mean)²) / Σ n

    Empty parts add nothing, whatever their mean and variance hold. Merging nothing but empty parts gives count 0.

    Source: Chan, Golub & LeVeque, Algorithms for Computing the Sample Variance, Am. Stat. 37 (1983), eq. 2.1.
    """
    merged: Moments | None = None
    for part in parts:
        merged = part if merged is None else _merge_two(merged, part)
    if merged is None:
        raise ValueError("merge got no moments: give at least one")
    return merged


def merge_rows(parts: Moments) -> Moments:
    """What `merge` makes of the rows of `parts`, all at once.

    Args:
        parts: mean and variance (rows, group); count the same in every row, or (rows,), or (rows, group).

    Returns: Moments (group,), with an int for a count where `parts` has one.
    """
    rows = len(parts.mean)
    if isinstance(parts.count, int) and parts.count * rows:
        equal = parts.mean.mean(0)
        return Moments(equal, (parts.var + (parts.mean - equal).square()).mean(0), parts.count * rows)
    count = on_device(parts.count, parts.mean)
    n = count.expand(rows, 1) if count.dim() == 0 else count.reshape(rows, -1)
    total = n.sum(0)
    share = n / torch.where(total > 0, total, 1)
    mean, var = (torch.where(n > 0, t, 0) for t in (parts.mean, parts.var))
    # Differences from a mean are small where means are large.
    pivot = mean.mean(0)
    merged = pivot + (share * torch.where(n > 0, mean - pivot, 0)).sum(0)
    spread = (share * torch.where(n > 0, var + (mean - merged).square(), 0)).sum(0)
    merged = torch.where(total > 0, merged, 0)
    if not isinstance(parts.count, Tensor):
        return Moments(merged, spread, parts.count * rows)
    return Moments(merged, spread, total if count.dim() == 2 else total.squeeze(0))


def _merge_two(a: Moments, b: Moments) -> Moments:
    if isinstance(a.count, int) and isinstance(b.count, int):
        if b.count == 0:
            return a
        if a.count == 0:
            return b
        share: float | Tensor = b.count / (a.count + b.count)
        delta = b.mean - a.mean
        return Moments(
            a.mean + delta * share,
            a.var + (b.var - a.var) * share + delta.square() * (share * (1 - share)),
            a.count + b.count,
        )
    count_a, count_b = on_device(a.count, a.mean), on_device(b.count, a.mean)
    total = count_a + count_b
    share = count_b / total.clamp(min=1)
    delta = torch.where(count_b > 0, torch.where(count_a > 0, b.mean - a.mean, b.mean), 0)
    mean_a = torch.where(count_a > 0, a.mean, 0)
    spread = torch.where((count_a > 0) & (count_b > 0), delta.square() * (share * (1 - share)), 0)
    var = torch.where(count_a > 0, a.var, 0) * (1 - share) + torch.where(count_b > 0, b.var, 0) * share
    return Moments(mean_a + delta * share, var + spread, total)


def ema_(
    running_mean: Tensor,
    running_var: Tensor,
    batch: Moments,
    momentum: float | None,
    *,
    num_batches_tracked: Tensor | None = None,
    guard: bool = True,
) -> None:
    """Move running statistics towards a batch, in place: running += momentum · (batch − running).

    The variance that is remembered is the unbiased one, as in torch.nn.

    Args:
        running_mean, running_var: (group,), changed in place.
        batch: moments of the new batch.
        momentum: weight of the new batch; None gives every batch the same weight (a cumulative average), for which
            `num_batches_tracked` is needed.
        num_batches_tracked: (), counts the batches that entered.
        guard: a batch whose mean or variance is not finite in any group changes nothing and is not counted. Decided on
            the device, without a host synchronisation.

    An empty batch changes nothing and is not counted, guarded or not.
    """
    mean, var = batch.mean, batch.unbiased_var
    if isinstance(batch.count, Tensor):
        enters = (batch.count > 0).any()
    elif batch.count == 0:
        return
    else:
        enters = torch.ones((), dtype=torch.bool, device=mean.device)
    if guard:
        enters = enters & (torch.isfinite(mean) & torch.isfinite(var)).all()
    if num_batches_tracked is not None:
        num_batches_tracked.add_(enters)
    weight: float | Tensor
    if momentum is not None:
        weight = momentum
    elif num_batches_tracked is None:
        raise ValueError("momentum=None needs num_batches_tracked: give the counter, or a momentum in [0, 1]")
    else:
        weight = num_batches_tracked.to(mean.dtype).clamp(min=1).reciprocal()
    for running, new in ((running_mean, mean), (running_var, var)):
        old = running.to(mean.dtype)
        running.copy_(torch.where(enters, old + weight * (new - old), old))
