"""Running statistics of a layer: kept in float32 at least, and moved once a batch."""

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


def _is_narrow(x: Tensor) -> bool:
    return x.is_floating_point() and torch.finfo(x.dtype).bits < 32


def update_(running: Running, moments: Moments, momentum: float | None, *, guard: bool) -> None:
    """Move `running` towards a batch, in place; fewer than two values say nothing about a variance and do not enter."""
    if isinstance(moments.count, Tensor):
        # How many a mask leaves, only the device knows.
        moments = Moments(moments.mean, moments.var, torch.where(moments.count > 1, moments.count, 0))
    functional.update_running_(
        running.mean, running.var, moments, momentum, num_batches_tracked=running.batches, guard=guard
    )
