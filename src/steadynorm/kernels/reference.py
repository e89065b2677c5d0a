"""The definition of correct: the kernels in plain PyTorch, for any device and dtype.

`compose` is the whole forward pass as differentiable PyTorch, to any order and under every functional transform. The
contract's functions below it are what the compiled backends are held to.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from steadynorm import moments as moments_
from steadynorm.grouping import Grouping

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "silu": F.silu,
    "gelu": F.gelu,
    "elu": F.elu,
}

# dy · activation'(z), below autograd: an op may run where autograd does not (dispatch modes, compiled graphs).
DERIVATIVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda dy, z: torch.ops.aten.threshold_backward(dy, z, 0),
    "leaky_relu": lambda dy, z: torch.ops.aten.leaky_relu_backward(dy, z, 0.01, False),
    "relu6": lambda dy, z: torch.ops.aten.hardtanh_backward(dy, z, 0.0, 6.0),
    "hardswish": torch.ops.aten.hardswish_backward,
    "silu": torch.ops.aten.silu_backward,
    "gelu": torch.ops.aten.gelu_backward,
    "elu": lambda dy, z: torch.ops.aten.elu_backward(dy, 1.0, 1.0, 1.0, False, z),
}


def statistics_dtype(x: Tensor) -> torch.dtype:
    """The dtype of statistics: float64, or float32 on devices without it."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def as_gradient(found: Tensor, parameter: Tensor | None) -> Tensor:
    """The sums that a backend gives for weight or bias, in the dtype of the parameter, if there is one."""
    return found if parameter is None else found.to(parameter.dtype)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of arithmetic over whole tensors: that of `x`, but never below float32."""
    return torch.promote_types(x.dtype, torch.float32)


def compose(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    eps: float,
    activation: str | None,
    statistics: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch normalization of `x` (N, C, *) as plain differentiable PyTorch.

    Args:
        x, residual: (N, C, *).
        weight, bias: (C,).
        mask: (N, *), True where a value is valid.
        statistics: mean and biased variance (C,) to normalise with; None takes those of the batch.

    Returns: y (N, C, *), mean (C,), var (C,).
    """
    shape = (1, -1) + (1,) * (x.dim() - 2)
    values = x.to(compute_dtype(x))
    valid = None if mask is None else mask.unsqueeze(1)
    if valid is not None:
        values = torch.where(valid, values, 0)
    if statistics is None:
        centred, mean, var = _centre(values, valid)
    else:
        mean, var = statistics
        centred = values - mean.to(values.dtype).view(shape)
    z = centred * torch.rsqrt(var.to(values.dtype) + eps).view(shape)
    if weight is not None:
        z = z * weight.to(z.dtype).view(shape)
    if bias is not None:
        z = z + bias.to(z.dtype).view(shape)
    out_dtype = x.dtype
    if residual is not None:
        out_dtype = torch.promote_types(out_dtype, residual.dtype)
        z = z + residual.to(torch.promote_types(z.dtype, residual.dtype))
    y = z if activation is None else ACTIVATIONS[activation](z)
    if valid is not None:
        y = torch.where(valid, y, 0)
    return y.to(out_dtype), mean, var


def _centre(values: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Values less their mean (zero where not valid), the mean and the biased variance, both summed in float64.

    The mean is taken off in two parts, so that the rounding of a large one is not in the result.
    """
    dims = [0, *range(2, values.dim())]
    shape = (1, -1) + (1,) * (values.dim() - 2)
    dtype = statistics_dtype(values)
    if valid is None:
        count: float | Tensor = max(values.numel() // max(values.shape[1], 1), 1)
    else:
        count = valid.sum().clamp(min=1).to(dtype)
    mean = values.sum(dims, dtype=dtype) / count
    high = mean.to(values.dtype)
    low = (mean - high.to(dtype)).to(values.dtype)
    centred = (values - high.view(shape)) - low.view(shape)
    if valid is not None:
        centred = torch.where(valid, centred, 0)
    return centred, mean, centred.square().sum(dims, dtype=dtype) / count


def _mask_view(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask[:, None, :]


def _column(value: Tensor, like: Tensor) -> Tensor:
    return value.to(like.dtype)[None, :, None]


def moments(x: Tensor, grouping: Grouping, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every group, float64 (group,)."""
    values = grouping.view(x).to(compute_dtype(x))
    valid = _mask_view(mask)
    if valid is not None:
        values = torch.where(valid, values, 0)
    _, mean, var = _centre(values, valid)
    return mean, var


def _normalized(x: Tensor, grouping: Grouping, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """x̂ as (outer, group, inner): a large mean is subtracted in two parts, so that only its rounding is lost."""
    values = grouping.view(x).to(compute_dtype(x))
    high = mean.to(values.dtype)
    low = (mean - high.to(mean.dtype)).to(values.dtype)
    invstd = torch.rsqrt(var + eps).to(values.dtype)
    return ((values - high[None, :, None]) - low[None, :, None]) * invstd[None, :, None]


def _before_activation(
    normalized: Tensor, grouping: Grouping, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    z = normalized
    if weight is not None:
        z = z * _column(weight, z)
    if bias is not None:
        z = z + _column(bias, z)
    if residual is not None:
        z = z + grouping.view(residual).to(z.dtype)
    return z


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
    """y = activation(weight · x̂ + bias + residual), in the dtype and memory order of `x`."""
    mean, var = (t.to(statistics_dtype(x)) for t in (mean, var))
    z = _before_activation(_normalized(x, grouping, mean, var, eps), grouping, weight, bias, residual)
    if activation is not None:
        z = ACTIVATIONS[activation](z)
    valid = _mask_view(mask)
    if valid is not None:
        z = torch.where(valid, z, 0)
    return _like(x, grouping.restore(z.to(x.dtype), x))


def _like(x: Tensor, y: Tensor) -> Tensor:
    """`y` in memory of its own, in the memory order of `x`."""
    return torch.empty_like(x).copy_(y)


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
    """g = dy · activation'(z), Σ g·x̂ and Σ g per group.

    Where the forward pass had both a residual and an activation, one of the two says where the derivative is taken:
    `residual` (z is computed again) or `y` (for the activations in FROM_OUTPUT, whose output decides).
    """
    normalized = _normalized(x, grouping, mean, var, eps)
    g = grouping.view(dy).to(normalized.dtype)
    if activation is not None:
        if y is not None:
            z = grouping.view(y).to(normalized.dtype)
        else:
            z = _before_activation(normalized, grouping, weight, bias, residual)
        g = DERIVATIVES[activation](g, z)
    valid = _mask_view(mask)
    if valid is not None:
        g = torch.where(valid, g, 0)
        normalized = torch.where(valid, normalized, 0)
    wide = g.to(mean.dtype)
    dweight = (wide * normalized).sum((0, 2))
    return _like(x, grouping.restore(g.to(x.dtype), x)), dweight, wide.sum((0, 2))


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
    """dx for statistics of the batch; with `count` None, for given statistics: weight · invstd · g."""
    values = grouping.view(g).to(compute_dtype(x))
    scale = torch.rsqrt(var + eps) if weight is None else torch.rsqrt(var + eps) * weight.to(var.dtype)
    if count is not None:
        n = count.to(mean.dtype).clamp(min=1)
        normalized = _normalized(x, grouping, mean, var, eps)
        values = values - _column(dbias / n, values) - normalized * _column(dweight / n, values)
    dx = values * _column(scale, values)
    valid = _mask_view(mask)
    if valid is not None:
        dx = torch.where(valid, dx, 0)
    return _like(x, grouping.restore(dx.to(x.dtype), x))


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
    """moments, then normalize: y, mean, var."""
    mean, var = moments(x, grouping, mask)
    return normalize(x, grouping, mean, var, weight, bias, residual, mask, eps, activation), mean, var


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
    """backward_sums, then backward_input: dx, dweight, dbias, and g (the gradient of the residual) if asked for.

    Args:
        is_given: mean and var were given to the forward pass, not taken from `x`.
        needs_affine: whether somebody wants dweight and dbias. If not, and mean and var were given, dx does not depend
            on them, and what is in them is not said.
    """
    count = None
    if not is_given:
        count = mean.new_tensor(grouping.values_per_group) if mask is None else mask.sum()
    g, dweight, dbias = backward_sums(dy, x, grouping, mean, var, weight, bias, residual, y, mask, eps, activation)
    dx = backward_input(g, x, grouping, mean, var, weight, dweight, dbias, count, mask, eps)
    return dx, as_gradient(dweight, weight), as_gradient(dbias, bias), g if needs_dresidual else None


ema_ = moments_.ema_
