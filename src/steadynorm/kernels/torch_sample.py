"""torch's own kernels, for small float32 tensors on the CPU: there Python is what a normalization waits for.

They take the mean off last, x·invstd − mean·invstd, which costs the digits of a mean that is many deviations large.
What they found is looked at, and where a mean is far from zero there is no result: the caller takes another way.

Every condition here is paid for by each call, in a cache that the rest of the network has emptied: a few attributes
cost as much as the kernel of 32 rows. So nothing is asked that torch asks itself, or that its results show.
"""

from typing import Any

import torch
from torch import Tensor, float32
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

from steadynorm.kernels import numba_cpu
from steadynorm.kernels.backends import forced
from steadynorm.kernels.cpu import build, offsets

SMALL = 1 << 17
"""Values up to which the calls of an autograd function from Python cost more than torch's own kernel takes in all."""
SMALL_IMAGES = 1 << 20
"""The same for group norm, whose kernel is slower: at twice as many values ours is the faster one again."""
FEW_ROWS = 256
"""Rows up to which torch's sums of the gradients of weight and bias, in float32, are as good as ours."""

_layer, _group = torch.native_layer_norm, torch.native_group_norm


def layer(
    x: Tensor, shape: tuple[int, ...] | torch.Size, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor | None:
    """Layer normalization over the last dimensions, of sizes `shape`; None where it is not for torch's kernel.

    Nothing is checked beforehand that torch checks itself: its error is None too.
    """
    # A tensor of a subclass, or one that a functional transform wraps, has no memory to look at afterwards.
    if type(x) is not Tensor or x.dtype is not float32 or not x.is_cpu or not x.is_contiguous() or not eps >= 0:
        return None
    values = x.numel()
    if values > SMALL or forward_ad._current_level >= 0 or is_dynamo_compiling() or forced() is not None:
        return None
    try:
        y, mean, invstd = _layer(x, shape, weight, bias, eps)
        rows = mean.numel()
        if rows > FEW_ROWS or rows == values or type(mean) is not Tensor:
            return None
        return None if _is_far(mean.data_ptr(), invstd.data_ptr(), rows) else y
    except (RuntimeError, TypeError):
        return None


def group(x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor | None:
    """Group normalization of `x` (N, C, *) in plain memory order; None where it is not for torch's kernel, as above."""
    if type(x) is not Tensor or x.dtype is not float32 or not x.is_cpu or not x.is_contiguous() or not eps >= 0:
        return None
    values = x.numel()
    if values > SMALL_IMAGES or forward_ad._current_level >= 0 or is_dynamo_compiling() or forced() is not None:
        return None
    if values == 0 or x.dim() < 2:
        return None
    n, c = x.shape[:2]
    try:
        y, mean, invstd = _group(x, weight, bias, n, c, values // (n * c), num_groups, eps)
        count = mean.numel()
        if count == values or type(mean) is not Tensor:
            return None
        return None if _is_far(mean.data_ptr(), invstd.data_ptr(), count) else y
    except (RuntimeError, TypeError):
        return None


def _load(mean: int, invstd: int, count: int) -> int:
    """The kernel's first call: it is compiled, or everything counts as far where it cannot be."""
    global _is_far
    _is_far = _everything if numba_cpu.why_not() else build.load("is_far", offsets.make_is_far, offsets.ENTRY)
    return int(_is_far(mean, invstd, count))


def _everything(mean: int, invstd: int, count: int) -> int:
    return 1


_is_far: Any = _load
"""Whether any of `count` means is far from zero, of addresses; see `offsets.make_is_far`."""
