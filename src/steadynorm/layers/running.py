"""Running statistics of a layer: kept in float32 at least, and moved once a batch."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from steadynorm import functional
from steadynorm.moments import Moments

STATISTICS = ("running_mean", "running_var")


class Running(NamedTuple):
    """What is remembered for one set of channels: mean (C,), unbiased variance (C,), and the batches behind them ()."""

    mean: Tensor
    var: Tensor
    batches: Tensor | None


class WideStatistics(nn.Module):
    """A layer whose running_mean and running_var are float32 at least, whatever the module is cast to.

    Below float32 they stop moving: a step of momentum · difference is lost in the rounding.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = {name: self._buffers.get(name) for name in STATISTICS}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name] if old is not None else None
            if old is not None and new is not None and _is_narrow(new):
                # Where the move goes, without the rounding.
                self._buffers[name] = old.to(new.device, torch.float32)
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._widen_statistics()

    def _widen_statistics(self) -> None:
        for name in STATISTICS:
            buffer = self._buffers.get(name)
            if buffer is not None and _is_narrow(buffer):
                self._buffers[name] = buffer.float()


def wide(parameter: Tensor) -> Tensor:
    """A weight or bias that several parts of a batch use, in float32 at least: its gradients add up unrounded."""
    return parameter.to(torch.promote_types(parameter.dtype, torch.float32))


def _is_narrow(x: Tensor) -> bool:
    return x.is_floating_point() and torch.finfo(x.dtype).bits < 32


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
