"""torch's own kernels, for small float32 tensors on the CPU: there Python is what a normalization waits for.

They take the mean off last, x·invstd − mean·invstd, which costs the digits of a mean that is many deviations large.
What they found is looked at, and where a mean is far from zero there is no result: the caller takes another way.
"""

import ctypes
from functools import cache, lru_cache
from threading import get_ident
from typing import Any

import torch
from torch import Tensor

from steadynorm.kernels import backends, numba_cpu
from steadynorm.kernels.cpu import build, offsets

SMALL = 1 << 17
"""Values up to which the calls of an autograd function from Python cost more than torch's own kernel takes in all."""
SMALL_IMAGES = 1 << 20
"""The same for group norm, whose kernel is slower: at twice as many values ours is the faster one again."""
FEW_ROWS = 256
"""Rows up to which torch's sums of the gradients of weight and bias, in float32, are as good as ours."""


def layer(
    x: Tensor, shape: tuple[int, ...] | torch.Size, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor | None:
    """Layer normalization over the last dimensions, of sizes `shape`; None where it is not for torch's kernel.

    Nothing is checked beforehand that torch checks itself: its error is None too.
    """
    if not _is_plain(x) or x.numel() > SMALL or not eps >= 0:
        return None
    try:
        y, mean, invstd = torch.native_layer_norm(x, shape, weight, bias, eps)
    except RuntimeError:
        return None
    rows = mean.numel()
    return None if rows > FEW_ROWS or rows == x.numel() or _is_far(mean, invstd, rows) else y


def group(x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor | None:
    """Group normalization of `x` (N, C, *) in plain memory order; None where it is not for torch's kernel, as above."""
    if not _is_plain(x) or x.numel() > SMALL_IMAGES or x.dim() < 2 or not eps >= 0:
        return None
    n, c = x.shape[:2]
    try:
        y, mean, invstd = torch.native_group_norm(x, weight, bias, n, c, x.numel() // max(n * c, 1), num_groups, eps)
    except (RuntimeError, TypeError):
        return None
    count = mean.numel()
    return None if count == x.numel() or _is_far(mean, invstd, count) else y


def _is_plain(x: Tensor) -> bool:
    """Whether `x` is contiguous float32 on the CPU, and nobody looks at the call but autograd."""
    return (
        type(x) is Tensor
        and x.dtype is torch.float32
        and x.is_cpu
        and x.is_contiguous()
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
        and not backends.is_forced()
        and not numba_cpu.why_not()
    )


@cache
def _kernel() -> Any:
    return build.load("is_far", offsets.make_is_far)


@lru_cache(maxsize=64)
def _arguments(thread: int) -> tuple[Any, int]:
    values = (ctypes.c_int64 * 4)()
    return values, ctypes.addressof(values)


def _is_far(mean: Tensor, invstd: Tensor, count: int) -> bool:
    values, address = _arguments(get_ident())
    values[offsets.MEANS], values[offsets.INVSTDS], values[offsets.COUNT] = mean.data_ptr(), invstd.data_ptr(), count
    _kernel()(address)
    return bool(values[offsets.IS_FAR])
