"""torch's own kernels, for small float32 tensors on the CPU: there Python is what a normalization waits for.

They take the mean off last, x·invstd − mean·invstd, which costs the digits of a mean that is many deviations large.
What they found is looked at, and where a mean is far from zero there is no result: the caller takes another way.

Every condition here is paid for by each call, in caches that the rest of a network has emptied: a few attributes cost
as much as the kernel of 32 rows.
"""

from ctypes import addressof, c_double, c_int64
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, float32
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling
from torch.nn import Parameter

from steadynorm.kernels import numba_cpu
from steadynorm.kernels.backends import forced
from steadynorm.kernels.batch_plans import CPU
from steadynorm.kernels.cpu import build, offsets

SMALL = 1 << 17
"""Values up to which the calls of an autograd function from Python cost more than torch's own kernel takes in all."""
SMALL_IMAGES = 1 << 20
"""The same for group norm, whose kernel is slower: at twice as many values ours is the faster one again."""
SMALL_PLANES = 1 << 15
"""The same for the statistics of a batch (N, C, *), which torch takes in three sweeps."""
FEW_ROWS = 256
"""Rows up to which torch's sums of the gradients of weight and bias, in float32, are as good as ours."""

_layer, _group, _batch = torch.native_layer_norm, torch.native_group_norm, torch.native_batch_norm


def layer(
    x: Tensor, shape: tuple[int, ...] | torch.Size, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor | None:
    """Layer normalization over the last dimensions, of sizes `shape`; None where it is not for torch's kernel.

    Nothing is checked beforehand that torch checks itself: its error is None too.
    """
    if (kernels := _kernels_for(x, SMALL, eps)) is None:
        return None
    try:
        y, mean, invstd = _layer(x, shape, weight, bias, eps)
    except RuntimeError:
        return None
    rows = mean.numel()
    if rows > FEW_ROWS or rows == x.numel() or kernels.is_far(mean.data_ptr(), invstd.data_ptr(), rows):
        return None
    return y


def group(x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor | None:
    """Group normalization of `x` (N, C, *) in plain memory order; None where it is not for torch's kernel, as above."""
    if (kernels := _kernels_for(x, SMALL_IMAGES, eps)) is None:
        return None
    values = x.numel()
    # Of a bias without a weight torch's backward pass raises.
    is_odd = weight is None and bias is not None
    if values == 0 or x.dim() < 2 or is_odd or not (_is_dense(weight) and _is_dense(bias)):
        return None
    n, c = x.shape[:2]
    try:
        y, mean, invstd = _group(x, weight, bias, n, c, values // (n * c), num_groups, eps)
    except (RuntimeError, TypeError):
        return None
    count = mean.numel()
    if count == values or kernels.is_far(mean.data_ptr(), invstd.data_ptr(), count):
        return None
    return y


def batch(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor] | None:
    """Normalization of `x` (N, C, *) by its batch: y, and mean and var in float64; None as above.

    A trace of torch.jit would hold the memory of mean and var, and not what is written there.
    """
    if (kernels := _kernels_for(x, SMALL, eps)) is None:
        return None
    values, rank = x.numel(), x.dim()
    if values == 0 or rank < 2 or (rank > 2 and values > SMALL_PLANES) or torch._C._get_tracing_state() is not None:
        return None
    count = x.shape[1]
    if not _are_of(count, weight, bias):
        return None
    try:
        y, mean, invstd = _batch(x, weight, bias, None, None, True, 0.0, eps)
    except RuntimeError:
        return None
    wide, added = torch.empty(count, dtype=torch.float64, device=CPU), _number(eps)
    var = torch.empty_like(wide)
    is_far = kernels.widen(mean.data_ptr(), invstd.data_ptr(), addressof(added), wide.data_ptr(), var.data_ptr(), count)
    return None if is_far or y.stride() != x.stride() else (y, wide, var)


def given(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor | None:
    """Normalization of `x` (N, C, *) by statistics that are constants; None as above."""
    if (kernels := _kernels_for(x, SMALL, eps)) is None:
        return None
    if x.numel() == 0 or x.dim() < 2 or mean.dtype is not float32 or var.dtype is not float32:
        return None
    count, added = x.shape[1], _number(eps)
    if not (_are_of(count, weight, bias) and _are_of(count, mean, var)):
        return None
    if kernels.is_far_from(mean.data_ptr(), var.data_ptr(), addressof(added), count):
        return None
    if torch.is_grad_enabled():
        # What the backward pass reads must not move with the running statistics.
        mean, var = mean.detach().clone(), var.detach().clone()
    try:
        y: Tensor = _batch(x, weight, bias, mean, var, False, 0.0, eps)[0]
    except RuntimeError:
        return None
    return y if y.stride() == x.stride() else None


def _is_plain(x: Tensor) -> bool:
    """Whether `x` is contiguous float32 on the CPU, and nobody looks at the call but autograd.

    That Dynamo traces is asked before any size is, which it would take for a condition.
    """
    return (
        type(x) is Tensor
        and x.dtype is float32
        and x.is_cpu
        and x.is_contiguous()
        and not is_dynamo_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and forced() is None
    )


def _is_dense(parameter: Tensor | None) -> bool:
    """Whether torch's kernel of group norm reads a parameter rightly, which it takes to be contiguous."""
    return parameter is None or parameter.is_contiguous()


def _are_of(channels: int, one: Tensor | None, two: Tensor | None) -> bool:
    """Whether torch's kernel of batch norm reads two vectors rightly, which it does not look at itself.

    A second vector without a first is not for it: of a bias without a weight it has no second derivatives.
    """
    return (one is None and two is None) or (
        one is not None and _is_vector(one, channels) and (two is None or _is_vector(two, channels))
    )


def _is_vector(given: Tensor, channels: int) -> bool:
    kind = type(given)
    return (kind is Tensor or kind is Parameter) and (
        given.shape == (channels,) and given.is_contiguous() and given.is_cpu
    )


class _Kernels(NamedTuple):
    """See `kernels.cpu.offsets`."""

    is_far: Any
    is_far_from: Any
    widen: Any


@cache
def _kernels() -> _Kernels | None:
    """The kernels that look at what torch found; None without Numba."""
    if numba_cpu.why_not():
        return None
    return _Kernels(
        build.load("is_far", offsets.make_is_far, build.quick_entry(3, c_int64)),
        build.load("is_far_from", offsets.make_is_far_from, build.quick_entry(4, c_int64)),
        build.load("widen", offsets.make_widen, build.quick_entry(6, c_int64)),
    )


def _kernels_for(x: Tensor, most: int, eps: float) -> _Kernels | None:
    """The kernels that look at what torch finds, where a call of up to `most` values is for torch at all."""
    return _kernels() if _is_plain(x) and x.numel() <= most and eps >= 0 else None


@lru_cache(maxsize=64)
def _number(value: float) -> c_double:
    """A number that has an address, for kernels, which take integers only."""
    return c_double(value)
