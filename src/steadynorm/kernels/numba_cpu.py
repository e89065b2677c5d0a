"""The kernels for CPU tensors: explicit vectors compiled by Numba (kernels/cpu/), one trip to memory where one will do.

Two layouts, two sets of kernels: planes (inner > 1) and rows (inner = 1). Each is compiled once for a dtype and an
activation, on first use, and kept on disk.
"""

import ctypes
import math
from functools import cache, lru_cache
from importlib.util import find_spec
from threading import get_ident
from typing import Any

import torch
from torch import Tensor

from steadynorm.grouping import Grouping
from steadynorm.kernels import numba_small, reference
from steadynorm.kernels.batch_plans import (
    CPU,
    SERIAL_BELOW,
    STORAGE,
    compiled,
    is_readable,
    last_level_cache,
    plan,
    readable,
)
from steadynorm.kernels.cpu import arguments as at
from steadynorm.kernels.cpu import build
from steadynorm.kernels.cpu.memory import empty_like
from steadynorm.moments import Moments

SMOOTH = frozenset({"hardswish", "silu", "gelu", "elu"})  # whose g is cheaper to keep than to compute again


def why_not(x: Tensor | None = None, *, masked: bool = False) -> str:
    """Why this backend cannot run here, or cannot take `x`; empty where it can."""
    missing = _missing()
    if missing or x is None:
        return missing
    if not x.is_cpu:
        return f"the tensor is on {x.device}"
    if x.dtype not in STORAGE:
        return f"the tensor is {x.dtype}"
    if masked:
        return "masks are not compiled yet"
    if x.numel() == 0:
        return "the tensor is empty"
    return ""


@cache
def _missing() -> str:
    absent = [name for name in ("numba", "llvmlite") if find_spec(name) is None]
    return f"{' and '.join(absent)} not installed" if absent else ""


class Call:
    """One call on one tensor: its plan, its arguments, and the memory they point to."""

    __slots__ = ("address", "alive", "integers", "is_rows", "plan", "x")

    def __init__(
        self,
        x: Tensor,
        grouping: Grouping,
        eps: float,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        is_given: bool = False,
    ) -> None:
        self.x, self.is_rows = x, grouping.is_rows
        self.plan = made = plan(grouping, x.dtype, eps, is_given, torch.get_num_threads())
        self.integers = values = at.Integers.from_buffer_copy(made.template)
        self.address = ctypes.addressof(values)
        scratch = torch.empty(made.scratch_bytes, dtype=torch.uint8, device=CPU)
        self.alive = [scratch]
        values[at.X] = values[at.PIVOT] = x.data_ptr()
        values[at.COLUMNS], values[at.SCRATCH] = scratch.data_ptr(), scratch.data_ptr() + made.columns_bytes
        if made.fold > 1:
            first_row = torch.as_strided(x, (grouping.group,), (1,), x.storage_offset())
            pivots = first_row.repeat(made.fold)
            self.alive.append(pivots)
            values[at.PIVOT] = pivots.data_ptr()
        for place, size, parameter in ((at.WEIGHT, at.WEIGHT_BYTES, weight), (at.BIAS, at.BIAS_BYTES, bias)):
            value = readable(parameter)
            if value is not None:
                self.alive.append(value)
                values[place], values[size] = value.data_ptr(), value.element_size()

    def point(self, place: int, tensor: Tensor | None) -> None:
        """Give the kernels the address of a tensor; None is address 0."""
        self.integers[place] = 0 if tensor is None else tensor.data_ptr()

    def set_streaming(self, output: Tensor, tensors: int) -> None:
        """Let the output bypass the caches if the `tensors` that a pass touches are more than they hold."""
        size = output.element_size()
        if output.numel() * size * tensors >= last_level_cache():
            is_aligned = not self.is_rows or output.data_ptr() % (16 * size) == 0
            self.integers[at.STREAMS] = self.plan.is_streamable and is_aligned

    def run(self, kind: str, stages: int, *variant: str | bool | None) -> None:
        """Launch a kernel on this call's threads."""
        self.integers[at.TICKET] = self.integers[at.WORKERS] = 0
        self.integers[at.STAGES] = stages
        build.run(compiled(kind, self.x.dtype, *variant), self.address, self.plan.threads)

    def columns(self, stages: int) -> None:
        """Do the rows' work between the sweeps."""
        self.integers[at.STAGES] = stages
        compiled("rows_columns", self.x.dtype)(self.address)


def _statistics(group: int) -> tuple[Tensor, Tensor]:
    return torch.empty(group, dtype=torch.float64, device=CPU), torch.empty(group, dtype=torch.float64, device=CPU)


def _is_small(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether a fused call is for `numba_small`."""
    return x.numel() < SERIAL_BELOW and is_readable(weight) and is_readable(bias)


def _take_moments(call: Call, mean: Tensor, var: Tensor) -> None:
    call.point(at.MEAN, mean)
    call.point(at.VAR, var)


def moments(x: Tensor, grouping: Grouping, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See the contract in `steadynorm.kernels`."""
    call = Call(x, grouping, 0.0)
    mean, var = _statistics(grouping.group)
    _take_moments(call, mean, var)
    if grouping.is_rows:
        call.run("rows_statistics", 0)
        call.columns(at.TO_MOMENTS)
    else:
        call.run("planes_forward", at.STATISTICS, None, False)
    return mean, var


def normalize(
    x: Tensor,
    grouping: Grouping,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    eps: float = 1e-5,
    activation: str | None = None,
) -> Tensor:
    """See the contract in `steadynorm.kernels`."""
    if _is_small(x, weight, bias) and is_readable(mean) and is_readable(var):
        return numba_small.normalize(x, grouping, mean, var, weight, bias, residual, eps, activation)
    call = Call(x, grouping, eps, weight, bias)
    mean, var = mean.double().contiguous(), var.double().contiguous()
    _take_moments(call, mean, var)
    y = empty_like(x)
    call.point(at.Y, y)
    call.point(at.RESIDUAL, residual)
    call.set_streaming(y, 2 + (residual is not None))
    if grouping.is_rows:
        call.columns(at.TO_COEFFICIENTS)
        call.run("rows_normalize", 0, activation, residual is not None)
    else:
        call.run("planes_forward", at.NORMALIZE, activation, residual is not None)
    return y


def forward(
    x: Tensor,
    grouping: Grouping,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    eps: float = 1e-5,
    activation: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See the contract in `steadynorm.kernels`."""
    if _is_small(x, weight, bias):
        return numba_small.forward(x, grouping, weight, bias, residual, eps, activation)
    call = Call(x, grouping, eps, weight, bias)
    mean, var = _statistics(grouping.group)
    _take_moments(call, mean, var)
    y = empty_like(x)
    call.point(at.Y, y)
    call.point(at.RESIDUAL, residual)
    call.set_streaming(y, 2 + (residual is not None))
    if grouping.is_rows:
        call.run("rows_statistics", 0)
        call.columns(at.TO_MOMENTS | at.TO_COEFFICIENTS)
        call.run("rows_normalize", 0, activation, residual is not None)
    else:
        call.run("planes_forward", at.STATISTICS | at.NORMALIZE, activation, residual is not None)
    return y, mean, var


def side_of(activation: str | None, residual: Tensor | None, y: Tensor | None) -> str:
    """What beside x tells where the derivative is taken; see planes.make_backward."""
    if activation is None:
        return ""
    return "output" if y is not None else "residual" if residual is not None else ""


def kept_gradient(activation: str | None, residual: Tensor | None, y: Tensor | None) -> bool:
    """Whether g is kept between the two passes back, because it costs more to make again."""
    return activation is not None and (activation in SMOOTH or residual is not None or y is not None)


def _begin_backward(
    call: Call,
    dy: Tensor,
    mean: Tensor,
    var: Tensor,
    residual: Tensor | None,
    y: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Point a call to everything that both passes back read; returns dweight and dbias, to be filled."""
    dweight, dbias = torch.empty_like(mean), torch.empty_like(mean)
    _take_moments(call, mean, var)
    call.point(at.DY, dy)
    call.point(at.SIDE, residual if y is None else y)
    call.point(at.DWEIGHT, dweight)
    call.point(at.DBIAS, dbias)
    return dweight, dbias


def backward_sums(
    dy: Tensor,
    x: Tensor,
    grouping: Grouping,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    y: Tensor | None = None,
    mask: Tensor | None = None,
    eps: float = 1e-5,
    activation: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See the contract in `steadynorm.kernels`."""
    call = Call(x, grouping, eps, weight, bias)
    mean, var = mean.double().contiguous(), var.double().contiguous()
    dweight, dbias = _begin_backward(call, dy, mean, var, residual, y)
    g = empty_like(x)
    call.point(at.G, g)
    if grouping.is_rows:
        call.columns(at.TO_COEFFICIENTS)
        call.run("rows_sums", 0, activation, side_of(activation, residual, y), True)
        call.columns(at.TO_SUMS)
    else:
        call.run("planes_backward", at.SUMS, activation, side_of(activation, residual, y), True)
    return g, dweight, dbias


def backward_input(
    g: Tensor,
    x: Tensor,
    grouping: Grouping,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    dweight: Tensor,
    dbias: Tensor,
    count: Tensor | None,
    mask: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """See the contract in `steadynorm.kernels`."""
    call = Call(x, grouping, eps, weight, is_given=count is None)
    if count is not None:
        at.Floats.from_buffer(call.integers)[at.PER_COUNT] = 1.0 / max(float(count), 1.0)
    return _input_gradient(call, g, mean, var, dweight, dbias)


def _input_gradient(
    call: Call,
    dy: Tensor,
    mean: Tensor,
    var: Tensor,
    dweight: Tensor,
    dbias: Tensor,
    side: Tensor | None = None,
    activation: tuple[str | None, str] = (None, ""),
) -> Tensor:
    """dx in one sweep, for sums that are known.

    Args:
        activation: and what beside x tells where its derivative is taken, which is `side`.
    """
    mean, var, dweight, dbias = (t.double().contiguous() for t in (mean, var, dweight, dbias))
    _take_moments(call, mean, var)
    call.point(at.DWEIGHT, dweight)
    call.point(at.DBIAS, dbias)
    call.point(at.DY, dy)
    call.point(at.SIDE, side)
    dx = empty_like(call.x)
    call.point(at.DX, dx)
    call.set_streaming(dx, 3 + (side is not None))
    if call.is_rows:
        call.columns(at.TO_COEFFICIENTS | at.TO_BACK)
        call.run("rows_input", 0, *activation, False)
    else:
        call.run("planes_backward", at.INPUT, *activation, False)
    return dx


def backward(
    dy: Tensor,
    x: Tensor,
    grouping: Grouping,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    y: Tensor | None = None,
    mask: Tensor | None = None,
    eps: float = 1e-5,
    activation: str | None = None,
    is_given: bool = False,
    needs_dresidual: bool = False,
    needs_affine: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """See the contract in `steadynorm.kernels`."""
    mean, var = mean.double().contiguous(), var.double().contiguous()
    side = residual if y is None else y
    dresidual = empty_like(x) if needs_dresidual else None
    keeps_g = kept_gradient(activation, residual, y)
    variant = activation, side_of(activation, residual, y), needs_dresidual or keeps_g
    if _is_small(x, weight, bias):
        found = numba_small.backward(dy, x, grouping, mean, var, weight, bias, side, eps, is_given, variant, dresidual)
        return *found, dresidual
    call = Call(x, grouping, eps, weight, bias, is_given)
    if is_given and not (needs_affine or needs_dresidual):
        sums = torch.zeros_like(mean), torch.zeros_like(mean)
        return _input_gradient(call, dy, mean, var, *sums, side, variant[:2]), *sums, None
    dweight, dbias = _begin_backward(call, dy, mean, var, residual, y)
    dx = empty_like(x)
    call.point(at.DX, dx)
    g = dresidual if dresidual is not None else (dx if keeps_g else None)
    call.point(at.G, g)
    # What was just read is written over: streaming stores would only push it out of the cache first.
    if g is not dx:
        call.set_streaming(dx, 3 + 2 * (g is not None))
    if grouping.is_rows:
        call.columns(at.TO_COEFFICIENTS)
        call.run("rows_sums", 0, *variant)
        call.columns(at.TO_SUMS | at.TO_COEFFICIENTS | at.TO_BACK)
        call.run("rows_input", 0, *variant)
    else:
        call.run("planes_backward", at.SUMS | at.INPUT, *variant)
    return dx, reference.as_gradient(dweight, weight), reference.as_gradient(dbias, bias), dresidual


def ema_(
    running_mean: Tensor,
    running_var: Tensor,
    batch: Moments,
    momentum: float | None,
    *,
    num_batches_tracked: Tensor | None = None,
    guard: bool = True,
) -> None:
    """See `steadynorm.moments.ema_`."""
    count = batch.count
    if not _is_plain(running_mean, running_var, batch, momentum, num_batches_tracked):
        reference.ema_(running_mean, running_var, batch, momentum, num_batches_tracked=num_batches_tracked, guard=guard)
        return
    if count == 0:
        return
    values, floats, address = _update_arguments(get_ident())
    values[at.GROUP] = running_mean.numel()
    values[at.X], values[at.Y] = running_mean.data_ptr(), running_var.data_ptr()
    values[at.WEIGHT_BYTES] = running_mean.element_size()
    values[at.MEAN], values[at.VAR] = batch.mean.data_ptr(), batch.var.data_ptr()
    values[at.COUNTER] = 0 if num_batches_tracked is None else num_batches_tracked.data_ptr()
    values[at.GUARDS] = guard
    floats[at.COUNT] = count
    floats[at.MOMENTUM] = math.nan if momentum is None else momentum
    compiled("running_update", torch.float64)(address)


@lru_cache(maxsize=64)
def _update_arguments(thread: int) -> tuple[Any, Any, int]:
    """A thread's own arguments for the kernel of `ema_`: as integers, as floats, and where they are."""
    values = at.Integers()
    return values, at.Floats.from_buffer(values), ctypes.addressof(values)


def _is_plain(
    running_mean: Tensor, running_var: Tensor, batch: Moments, momentum: float | None, counter: Tensor | None
) -> bool:
    """Whether the kernel of `ema_` can read all of this where it is."""
    dtype, mean, var = running_mean.dtype, batch.mean, batch.var
    return (
        type(batch.count) is int
        and mean.dtype is torch.float64
        and var.dtype is torch.float64
        and mean.is_contiguous()
        and var.is_contiguous()
        and running_var.dtype is dtype
        and (dtype is torch.float32 or dtype is torch.float64)
        and running_mean.is_contiguous()
        and running_var.is_contiguous()
        and (momentum is not None if counter is None else counter.dtype is torch.int64)
    )
