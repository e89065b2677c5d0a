"""Layer normalization: over the last dimensions, or over the channels of (N, C, *)."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from steadynorm import grouping as grouping_
from steadynorm.functional import shapes
from steadynorm.functional.sample import Settings, normalize_sample, under_autocast
from steadynorm.grouping import dense_like
from steadynorm.kernels import backends, ops

WIDE = (torch.float32, torch.float64)
SMALL = 1 << 17
"""Values up to which the calls of an autograd function from Python cost more than torch's own kernel takes in all."""
FEW_ROWS = 256
"""Rows up to which torch's sums of the gradients of weight and bias, in float32, are as good as ours."""


def normalize_layer(
    x: Tensor,
    dims: int,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float,
    addend: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`layer_norm` over the last `dims` dimensions, without its checks: y and x + addend (x without one)."""
    wide = under_autocast(x)
    if addend is not None and (wide is not x or torch.compiler.is_exporting()):
        # The sum is taken in the dtype of x, and only then widened.
        x, addend = x + addend, None
        wide = under_autocast(x)
    if torch.compiler.is_exporting():
        return F.layer_norm(x, x.shape[x.dim() - dims :], weight, bias, eps), x
    if addend is None and _is_small(x, dims, weight, bias):
        return _normalize_small(x, dims, weight, bias, eps), x
    dense, grouping = grouping_.layer(wide, dims)
    y, total, *_ = normalize_sample(dense, weight, bias, Settings(grouping, eps), addend=addend)
    return dense_like(y, x), x if addend is None else dense_like(total, x)


def _is_small(x: Tensor, dims: int, weight: Tensor | None, bias: Tensor | None) -> bool:
    return (
        not ops.is_traced(x)
        and x.numel() <= SMALL
        and math.prod(x.shape[:-dims]) <= FEW_ROWS
        and x.is_contiguous()
        and x.device.type == "cpu"
        and x.dtype in WIDE
        and (weight is None or weight.dtype == x.dtype)
        and (bias is None or bias.dtype == x.dtype)
        and not backends.is_forced()
    )


def _normalize_small(x: Tensor, dims: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """By torch's own kernel, which loses the digits of a large mean: it is taken off first.

    What is taken off is a constant to the gradient, since no constant of a row changes its result.
    """
    shape = x.shape[x.dim() - dims :]
    means = x.detach().mean(tuple(range(-dims, 0)), keepdim=True)
    return F.layer_norm(x - means, shape, weight, bias, eps)


def layer_norm(
    x: Tensor,
    normalized_shape: int | tuple[int, ...] | list[int] | torch.Size,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    addend: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Layer normalization with the signature of `torch.nn.functional.layer_norm`, and an addend.

    y = weight · (s − mean) / sqrt(var + eps) + bias,  s = x + addend

    Args:
        x: (*, *normalized_shape), floating point, any memory order; channels-last stays channels-last.
        normalized_shape: the last dimensions of `x`, which share statistics.
        weight, bias: of that shape, or None.
        eps: added to the variance, in its unit.
        addend: of the shape of `x`: what a transformer adds before it normalises.

    Returns: y in the shape of `x`; with an addend (y, x + addend).

    Source: Ba, Kiros & Hinton, Layer Normalization (2016), eq. 4.
    """
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    shapes.check_last(_who, x, shape, weight, bias)
    shapes.check_width(_who, math.prod(shape))
    shapes.check_eps(_who, eps)
    shapes.check_same_shape(_who, "addend", addend, x)
    y, total = normalize_layer(x, len(shape), weight, bias, eps=eps, addend=addend)
    return y if addend is None else (y, total)


def _who() -> str:
    return "layer_norm"


def normalize_positions(x: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float) -> Tensor:
    """Layer normalization of `x` (N, C, *) over its channels: one statistic per sample and position.

    Args:
        x: in plain or channels-last order, which stays.
        weight, bias: (C,) or None.

    Returns: y (N, C, *).
    """
    if torch.compiler.is_exporting():
        return F.layer_norm(x.movedim(1, -1), x.shape[1:2], weight, bias, eps).movedim(-1, 1)
    dense, grouping = grouping_.positions(under_autocast(x))
    return normalize_sample(dense, weight, bias, Settings(grouping, eps))[0]
