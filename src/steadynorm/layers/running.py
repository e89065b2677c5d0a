"""Running statistics of a layer, moved once a batch."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from steadynorm import functional
from steadynorm.moments import Moments

STATISTICS = ("running_mean", "running_var")


class Running(NamedTuple):
    """What is remembered for one set of channels: mean (C,), unbiased variance (C,), and the batches behind them ()."""

    mean: Tensor
    var: Tensor
    batches: Tensor | None


def update_(running: Running, moments: Moments, momentum: float | None, *, guard: bool, debias: bool = False) -> None:
    """Move `running` towards a batch, in place; fewer than two values say nothing about a variance and do not enter."""
    if isinstance(moments.count, Tensor):
        # How many a mask leaves, only the device knows.
        moments = Moments(moments.mean, moments.var, torch.where(moments.count > 1, moments.count, 0))
    if debias and momentum and running.batches is not None:
        _update_debiased_(running, moments, momentum, running.batches, guard)
        return
    functional.update_running_(
        running.mean, running.var, moments, momentum, num_batches_tracked=running.batches, guard=guard
    )


def _update_debiased_(running: Running, moments: Moments, momentum: float, batches: Tensor, guard: bool) -> None:
    """Move `running` so that the share of its initial values is taken out of it.

    The plain average r after t batches holds (1 − m)^t of r_0. (r − (1 − m)^t · r_0) / (1 − (1 − m)^t), step by step,
    is a moving average of its own, in which batch t has the weight m / (1 − (1 − m)^t): the first replaces r_0.

    Source: Kingma & Ba, Adam (2015), section 3.
    """
    if torch._C._are_functorch_transforms_active():
        return
    before = batches.clone()
    # A momentum of 1 hands out the batch itself; whether it entered, its count says.
    mean, var = torch.zeros_like(moments.mean), torch.zeros_like(moments.var)
    functional.update_running_(mean, var, moments, 1.0, num_batches_tracked=batches, guard=guard)
    share = -torch.expm1(batches.clamp(min=1).to(mean.dtype) * math.log1p(-momentum)) if momentum < 1 else 1.0
    for statistic, new in ((running.mean, mean), (running.var, var)):
        old = statistic.to(new.dtype)
        statistic.copy_(torch.where(batches > before, old + momentum / share * (new - old), old))
