"""The definition of correct for statistics within a sample: plain PyTorch, for any device and dtype.

    total = x + addend                                          rounded to the dtype of x
    x̂ = (total − mean) / sqrt(var + eps)                        or, not centred, total / sqrt(mean square + eps)
    z = x̂ · (weight_offset + weight) + bias + residual          y = activation(z)

`compose_sample` is the formula as differentiable PyTorch, to any order and under every functional transform.
`sample_forward` and `sample_backward` are what the compiled backends are held to: `x`, `addend`, `residual`, `y`, `dy`
and `dtotal` dense in the order of the grouping, in one dtype; statistics and sums of gradients float64; `mask` bool
(samples, outer·inner), True where a value is valid: where it is False a value enters no statistic and no sum, and the
output and every gradient are zero whatever x holds. Inputs are never written to.
"""

import torch
from torch import Tensor

from steadynorm.grouping import SampleGrouping
from steadynorm.kernels.reference import ACTIVATIONS, DERIVATIVES, statistics_dtype


def arithmetic_dtype(x: Tensor) -> torch.dtype:
    """The dtype of arithmetic over whole tensors: float64 for float64, else float32."""
    # torch.promote_types would stay in an exported graph, as an operator that no converter knows.
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def compose_sample(
    x: Tensor,
    grouping: SampleGrouping,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    eps: float = 1e-5,
    activation: str | None = None,
    is_centred: bool = True,
    weight_offset: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalization within samples as plain differentiable PyTorch.

    Args:
        x, residual: of the shape `grouping.sizes`, or any that reshapes to it.
        weight, bias: (groups·channels,).
        mask: (samples, outer·inner), True where a value is valid.

    Returns: y in the shape of x and the dtype of x + residual; mean and var, one of each statistic.
    """
    values = x.reshape(grouping.sizes).to(arithmetic_dtype(x))
    valid = _spread_mask(mask, grouping)
    if valid is not None:
        values = torch.where(valid, values, 0)
        # Left out here, not at the end: a derivative at NaN is NaN, also when zero is what it is multiplied by.
        residual = None if residual is None else torch.where(valid, residual.reshape(grouping.sizes), 0)
    centred, mean, var = _centre(values, valid, grouping) if is_centred else _mean_square(values, valid, grouping)
    normalized = centred * _invstd(var, values, eps, is_centred)
    z = _before_activation(normalized, grouping, weight, bias, residual, weight_offset)
    y = z if activation is None else ACTIVATIONS[activation](z)
    if valid is not None:
        y = torch.where(valid, y, 0)
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    return y.to(dtype).reshape(x.shape), mean.flatten(), var.flatten()


def _spread_mask(mask: Tensor | None, grouping: SampleGrouping) -> Tensor | None:
    return None if mask is None else mask.reshape(grouping.samples, grouping.outer, 1, 1, grouping.inner)


def _dims(grouping: SampleGrouping) -> tuple[int, ...]:
    return (1, 2, 3) if grouping.is_per_position else (1, 3, 4)


def _count(valid: Tensor | None, grouping: SampleGrouping, dtype: torch.dtype) -> float | Tensor:
    """Values behind each statistic, at least 1."""
    if valid is None:
        return max(grouping.values_per_group, 1)
    return (valid.sum(_dims(grouping), keepdim=True) * grouping.channels).clamp(min=1).to(dtype)


def _centre(values: Tensor, valid: Tensor | None, grouping: SampleGrouping) -> tuple[Tensor, Tensor, Tensor]:
    """Values less their mean (zero where not valid), the mean and the biased variance, both summed in float64.

    The mean is taken off in two parts, so that the rounding of a large one is not in the result.
    """
    dims, dtype = _dims(grouping), statistics_dtype(values)
    count = _count(valid, grouping, dtype)
    mean = values.sum(dims, keepdim=True, dtype=dtype) / count
    high = mean.to(values.dtype)
    low = (mean - high.to(dtype)).to(values.dtype)
    centred = (values - high) - low
    if valid is not None:
        centred = torch.where(valid, centred, 0)
    return centred, mean, centred.square().sum(dims, keepdim=True, dtype=dtype) / count


def _mean_square(values: Tensor, valid: Tensor | None, grouping: SampleGrouping) -> tuple[Tensor, Tensor, Tensor]:
    """The values, a mean of zero, and the mean square.

    In the arithmetic of `values` and in the order of the published formulas (torch, Llama, Gemma, T5), so that their
    checkpoints give the same bits. Nothing cancels in a sum of squares.
    """
    dims, dtype = _dims(grouping), statistics_dtype(values)
    if valid is None:
        square = values.pow(2).mean(dims, keepdim=True)
    else:
        square = values.pow(2).sum(dims, keepdim=True) / _count(valid, grouping, values.dtype)
    return values, torch.zeros_like(square, dtype=dtype), square.to(dtype)


def _invstd(var: Tensor, values: Tensor, eps: float, is_centred: bool) -> Tensor:
    if is_centred:
        return torch.rsqrt(var + eps).to(values.dtype)
    return torch.rsqrt(var.to(values.dtype) + eps)


def _per_channel(value: Tensor, grouping: SampleGrouping, like: Tensor) -> Tensor:
    return value.to(like.dtype).reshape(1, 1, grouping.groups, grouping.channels, 1)


def _scale(weight: Tensor, grouping: SampleGrouping, weight_offset: float, like: Tensor) -> Tensor:
    scale = _per_channel(weight, grouping, like)
    return scale + weight_offset if weight_offset else scale


def _before_activation(
    normalized: Tensor,
    grouping: SampleGrouping,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    weight_offset: float,
) -> Tensor:
    z = normalized
    if weight is not None:
        z = z * _scale(weight, grouping, weight_offset, z)
    if bias is not None:
        z = z + _per_channel(bias, grouping, z)
    if residual is not None:
        z = z + residual.reshape(grouping.sizes)
    return z


def _like(x: Tensor, y: Tensor) -> Tensor:
    """`y` in memory of its own, in the memory order of `x`."""
    return torch.empty_like(x).copy_(y)


def sample_forward(
    x: Tensor,
    addend: Tensor | None,
    grouping: SampleGrouping,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    eps: float = 1e-5,
    activation: str | None = None,
    is_centred: bool = True,
    weight_offset: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y and total in the dtype and memory order of `x`, mean and var.

    total is x + addend, or `x` itself where there is no addend. Without a weight there is no weight_offset either.
    Not centred, mean is zero and var the mean square.
    """
    total = x if addend is None else _like(x, x + addend)
    y, mean, var = compose_sample(
        grouping.view(total),
        grouping,
        weight,
        bias,
        None if residual is None else grouping.view(residual),
        mask,
        eps,
        activation,
        is_centred,
        weight_offset,
    )
    return _like(x, grouping.restore(y, x)), total, mean, var


def sample_backward(
    dy: Tensor,
    dtotal: Tensor | None,
    total: Tensor,
    grouping: SampleGrouping,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    y: Tensor | None = None,
    mask: Tensor | None = None,
    eps: float = 1e-5,
    activation: str | None = None,
    is_centred: bool = True,
    weight_offset: float = 0.0,
    needs_dresidual: bool = False,
    needs_affine: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dx (of x and addend alike), dweight, dbias, and the gradient of the residual if asked for.

    g = dy · activation'(z);  dweight = Σ g·x̂;  dbias = Σ g;  h = g · (weight_offset + weight)
    dx = (h − mean(h) − x̂ · mean(h·x̂)) / sqrt(var + eps) + dtotal, the first correction only where it is centred

    Where the forward pass had both a residual and an activation, one of the two says where the derivative is taken:
    `residual` (z is computed again) or `y` (for the activations in FROM_OUTPUT, whose output decides).

    Args:
        dtotal: the gradient that comes to the returned sum; None where there is none.
        needs_affine: without it dweight and dbias may be empty. Without a weight dweight, and without a bias dbias, may
            hold anything.
    """
    valid = _spread_mask(mask, grouping)
    normalized, invstd = _normalized(total, grouping, mean, var, valid, eps, is_centred)
    g = grouping.view(dy).to(normalized.dtype)
    if activation is not None:
        if y is not None:
            z = grouping.view(y).to(g.dtype)
        else:
            added = None if residual is None else grouping.view(residual)
            z = _before_activation(normalized, grouping, weight, bias, added, weight_offset)
        g = DERIVATIVES[activation](g, z)
    if valid is not None:
        g = torch.where(valid, g, 0)
    h = g if weight is None else g * _scale(weight, grouping, weight_offset, g)
    inside = h - normalized * _mean(h * normalized, valid, grouping)
    if is_centred:
        inside = inside - _mean(h, valid, grouping)
    dx = inside * invstd
    if dtotal is not None:
        dx = dx + grouping.view(dtotal).to(dx.dtype)
    if valid is not None:
        dx = torch.where(valid, dx, 0)
    dweight = dbias = mean.new_empty(0)
    if needs_affine:
        wide = g.to(mean.dtype)
        dweight, dbias = (wide * normalized).sum((0, 1, 4)).flatten(), wide.sum((0, 1, 4)).flatten()
    dresidual = _restored(g, grouping, total) if needs_dresidual else None
    return _restored(dx, grouping, total), dweight, dbias, dresidual


def _normalized(
    total: Tensor,
    grouping: SampleGrouping,
    mean: Tensor,
    var: Tensor,
    valid: Tensor | None,
    eps: float,
    is_centred: bool,
) -> tuple[Tensor, Tensor]:
    """x̂, zero where it is not valid, and 1 / sqrt(var + eps), both ready to meet the view."""
    values = grouping.view(total).to(arithmetic_dtype(total))
    mean, var = mean.reshape(grouping.statistics_shape), var.reshape(grouping.statistics_shape)
    invstd = _invstd(var, values, eps, is_centred)
    if is_centred:
        high = mean.to(values.dtype)
        values = (values - high) - (mean - high.to(mean.dtype)).to(values.dtype)
    normalized = values * invstd
    return (normalized if valid is None else torch.where(valid, normalized, 0)), invstd


def _mean(values: Tensor, valid: Tensor | None, grouping: SampleGrouping) -> Tensor:
    """The mean per statistic of values that are zero where they are not valid."""
    dtype = statistics_dtype(values)
    sums = values.sum(_dims(grouping), keepdim=True, dtype=dtype)
    return (sums / _count(valid, grouping, dtype)).to(values.dtype)


def _restored(values: Tensor, grouping: SampleGrouping, like: Tensor) -> Tensor:
    return _like(like, grouping.restore(values.to(like.dtype), like))
