"""BatchRenorm1d, 2d, 3d: batch normalization drawn towards the running statistics, within limits."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steadynorm import functional
from steadynorm.errors import InputError
from steadynorm.layers import checks
from steadynorm.layers.batch import BatchNorm
from steadynorm.layers.running import Running
from steadynorm.moments import Moments, on_device

Limits = Callable[[Tensor], tuple[Tensor | float, Tensor | float]]


@dataclass(frozen=True)
class RenormLimits:
    """The limits of r and d as they grow with the batches seen: rmax from 1, dmax from 0, each along a line.

    Up to `start` batches they are 1 and 0: plain batch norm. From there rmax grows to its last value at
    `rmax_until` batches, dmax at `dmax_until`. The defaults are those of the paper.

    Source: Ioffe, Batch Renormalization (2017), section 4.
    """

    rmax: float = 3.0
    dmax: float = 5.0
    start: int = 5_000
    rmax_until: int = 40_000
    dmax_until: int = 25_000

    def __post_init__(self) -> None:
        _ensure_limits("RenormLimits", self.rmax, self.dmax)
        if not 0 <= self.start <= min(self.rmax_until, self.dmax_until):
            raise InputError(
                "RenormLimits: start must be at least 0 and at most rmax_until and dmax_until, in batches, got"
                f" {self.start}, {self.rmax_until} and {self.dmax_until}."
            )

    def __call__(self, batches: Tensor) -> tuple[Tensor, Tensor]:
        """rmax and dmax after `batches` ()."""
        shares = [_share(batches, self.start, until) for until in (self.rmax_until, self.dmax_until)]
        return 1 + (self.rmax - 1) * shares[0], self.dmax * shares[1]


def _share(batches: Tensor, start: int, until: int) -> Tensor:
    """0 up to `start` and 1 from `until` on, a line between them."""
    if until == start:
        return (batches >= start).float()
    return ((batches - start) / (until - start)).clamp(0, 1)


def _ensure_limits(where: str, rmax: float, dmax: float) -> None:
    # Infinite ones are allowed: no limit. NaN is not.
    if not rmax >= 1:
        raise InputError(f"{where}: rmax must be at least 1, at which it does nothing, got {rmax}.")
    if not dmax >= 0:
        raise InputError(f"{where}: dmax must be at least 0, at which it does nothing, got {dmax}.")


class BatchRenorm(BatchNorm):
    """What the batch renormalizations of every rank share; see `BatchRenorm2d`."""

    limits: tuple[float, float] | Limits = RenormLimits()
    shown = ("limits", *BatchNorm.shown)
    # Running statistics as the last forward pass met them: it moves them, and its recomputation has to find them again.
    _met: Running | None = None

    def __init__(
        self, num_features: int, *args: Any, limits: tuple[float, float] | Limits = RenormLimits(), **kwargs: Any
    ) -> None:
        self.limits = limits  # before the settings are checked
        super().__init__(num_features, *args, **kwargs)

    def limits_now(self) -> tuple[float, float]:
        """rmax and dmax for the next batch. Waits for the device."""
        running = self._running()
        assert running is not None
        rmax, dmax = self._limits(running)
        return float(rmax), float(dmax)

    def _by_batch(
        self, x: Tensor, running: Running | None, weight: Tensor | None, bias: Tensor | None, extras: dict[str, Any]
    ) -> tuple[Tensor, Moments]:
        moments = functional.moments(x, extras["mask"])
        if running is None:
            return functional.normalize_batch(x, weight, bias, moments=moments, **extras)
        r, d = self._correction(moments, self._as_met(running))
        # y = weight · (x̂ · r + d) + bias, as one scale and one shift; r and d are constants to the gradients.
        if weight is not None:
            wide = weight.to(r.dtype)
            d = wide * d if bias is None else bias.to(r.dtype) + wide * d
            r = wide * r
        elif bias is not None:
            d = d + bias.to(r.dtype)
        dtype = torch.promote_types(x.dtype, torch.float32)
        return functional.normalize_batch(x, r.to(dtype), d.to(dtype), moments=moments, **extras)

    def _correction(self, moments: Moments, running: Running) -> tuple[Tensor, Tensor]:
        """r (C,) and d (C,): what leads from normalization by the batch to that by the running statistics, clipped."""
        rmax, dmax = self._limits(running)
        mean, var = running.mean.to(moments.mean.dtype), running.var.to(moments.var.dtype)
        r = ((moments.var + self.eps) / (var + self.eps)).sqrt()
        d = (moments.mean - mean) / (var + self.eps).sqrt()
        rmax, dmax = (on_device(limit, r) for limit in (rmax, dmax))
        return r.clamp(1 / rmax, rmax).detach(), d.clamp(-dmax, dmax).detach()

    def _limits(self, running: Running) -> tuple[Tensor | float, Tensor | float]:
        if isinstance(self.limits, tuple):
            return self.limits
        assert running.batches is not None
        rmax, dmax = self.limits(running.batches)
        if isinstance(rmax, Tensor) or isinstance(dmax, Tensor):
            # What is on the device is not looked at, but held.
            rmax, dmax = (on_device(limit, running.mean) for limit in (rmax, dmax))
            return rmax.clamp(min=1), dmax.clamp(min=0)
        _ensure_limits(checks.name(self), rmax, dmax)
        return rmax, dmax

    def _as_met(self, running: Running) -> Running:
        """`running`; in a backward pass, where activation checkpointing computes again, as the forward pass met it."""
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return running
        if torch._C._current_graph_task_id() == -1 or self._met is None:
            self._met = Running(*(t.clone() if t is not None else None for t in running))  # type: ignore[arg-type]
        return self._met

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_met": None}

    def _check_settings(self) -> None:
        super()._check_settings()
        if not self.track_running_stats:
            raise InputError(f"{checks.name(self)} is drawn towards running statistics: track_running_stats is needed.")
        if isinstance(self.limits, tuple) and len(self.limits) == 2 and all(map(_is_number, self.limits)):
            _ensure_limits(checks.name(self), *self.limits)
        elif not callable(self.limits):
            raise InputError(
                f"{checks.name(self)}: limits must be (rmax, dmax), or a function of the batches seen that gives both"
                f" (RenormLimits), got {self.limits!r}."
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not math.isnan(value)


class BatchRenorm1d(BatchRenorm, nn.BatchNorm1d):
    """`BatchRenorm2d` for (N, C) and (N, C, L)."""

    ranks = (2, 3)


class BatchRenorm2d(BatchRenorm, nn.BatchNorm2d):
    """Batch renormalization over (N, C, H, W): for small batches, and for training that agrees with evaluation.

    y = activation(weight · (x̂ · r + d) + bias + residual),  x̂ = (x − mean) / sqrt(var + eps)
    r = clip(sqrt(var + eps) / sqrt(running_var + eps), 1 / rmax, rmax)
    d = clip((mean − running_mean) / sqrt(running_var + eps), −dmax, dmax)

    r and d count as constants in the gradients. Inside the limits y is what evaluation gives; at r = 1, d = 0 it is
    batch norm. What is remembered, evaluation and the state_dict are those of a plain batch norm: the running
    variance, not a deviation, and how far the limits have grown is num_batches_tracked.

    Args:
        num_features, ...: as `BatchNorm2d`; running statistics are needed.
        limits: (rmax, dmax) that stay as they are, or a function of the number of batches seen () that gives both:
            `RenormLimits`, or one of your own.

    Source: Ioffe, Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized Models (2017),
    Algorithm 1.
    """

    ranks = (4,)


class BatchRenorm3d(BatchRenorm, nn.BatchNorm3d):
    """`BatchRenorm2d` for (N, C, D, H, W)."""

    ranks = (5,)
