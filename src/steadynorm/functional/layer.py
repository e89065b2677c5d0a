"""Layer normalization: over the last dimensions, or over the channels of (N, C, *)."""

import math
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from steadynorm import grouping as grouping_
from steadynorm.functional import shapes
from steadynorm.functional.differentiable import differentiate_as
from steadynorm.functional.recall import recall, remember
from steadynorm.functional.sample import Settings, compose, normalize_sample, under_autocast
from steadynorm.grouping import dense_like
from steadynorm.kernels import torch_small


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
    dense, grouping = grouping_.layer(wide, dims)
    settings = Settings(grouping, eps)
    if addend is None and wide is x:
        remember(("layer", x.shape[x.dim() - dims :], eps), x, dense, weight, bias, settings)
    y, total, *_ = normalize_sample(dense, weight, bias, settings, addend=addend)
    return dense_like(y, x), x if addend is None else dense_like(total, x)


def quick_layer(
    x: Tensor, shape: tuple[int, ...] | torch.Size, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor | None:
    """`layer_norm` where little has to be found out for it, which is done unchecked; else None."""
    y = torch_small.layer(x, shape, weight, bias, eps)
    if y is None:
        return recall(("layer", shape, eps), x, weight, bias)
    differentiate_as(y, x, weight, partial(_exactly, len(shape), eps))
    return y


def _exactly(dims: int, eps: float, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    dense, grouping = grouping_.layer(x, dims)
    weight, bias = (None if t is None else t.flatten() for t in (weight, bias))
    return compose(dense, weight, bias, None, None, Settings(grouping, eps))[0]


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
    shape = normalized_shape
    if not isinstance(shape, tuple):
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
    if addend is None and (y := quick_layer(x, shape, weight, bias, eps)) is not None:
        return y
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
    known = recall(("positions", eps), x, weight, bias)
    if known is not None:
        return known
    wide = under_autocast(x)
    dense, grouping = grouping_.positions(wide)
    settings = Settings(grouping, eps)
    if wide is x:
        remember(("positions", eps), x, dense, weight, bias, settings)
    return normalize_sample(dense, weight, bias, settings)[0]
