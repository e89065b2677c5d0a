"""A batch norm in evaluation is one scale and one shift per channel, and a linear layer can take them in.

All is computed in float64 and rounded once.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from steadynorm.layers import InputNorm
from steadynorm.layers.weight.target import TRANSPOSED

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TAKES_BEFORE = (*CONVS, *TRANSPOSED, nn.Linear)
"""Layers that take in a norm before them: y = W ∗ x + c."""
LINEARS = (*TAKES_BEFORE, nn.Bilinear, nn.Embedding)
"""Layers that take in a norm behind them: each channel of their output is linear in weights of its own."""


class Affine(NamedTuple):
    """y = scale · x + shift, per channel: scale (C,) and shift (C,), float64."""

    scale: Tensor
    shift: Tensor

    def is_finite(self) -> bool:
        """Whether every value is finite."""
        return bool(torch.isfinite(self.scale).all() and torch.isfinite(self.shift).all())

    def inverse(self) -> "Affine":
        """x = y / scale − shift / scale; not finite where scale is 0."""
        return Affine(1 / self.scale, -self.shift / self.scale)


class Weights(NamedTuple):
    """The weight of a linear layer, in the shape that the layer has it, and its bias (out,); float64."""

    weight: Tensor
    bias: Tensor


def affine_of_running(norm: nn.Module, *, with_weight: bool = True) -> Affine:
    """scale = weight / sqrt(var + eps);  shift = bias − scale · mean, of a norm with running statistics."""
    mean, var = _wide(norm.running_mean), _wide(norm.running_var)
    scale = (var + float(norm.eps)).rsqrt()  # type: ignore[arg-type]
    if norm.weight is not None and with_weight:
        scale = scale * _wide(norm.weight)
    shift = -scale * mean
    return Affine(scale, shift if norm.bias is None else shift + _wide(norm.bias))


def affine_of_input_norm(norm: InputNorm) -> Affine:
    """scale = 1 / deviation, 1 where that is 0;  shift = −scale · mean."""
    deviation = _wide(norm.deviation)
    scale = 1 / torch.where(deviation > 0, deviation, 1)
    return Affine(scale, -scale * _wide(norm.mean))


def weights_of(layer: nn.Module) -> Weights:
    """The weight and bias of a linear layer; a missing bias is 0."""
    weight, bias = _wide(layer.weight), getattr(layer, "bias", None)
    if bias is not None:
        return Weights(weight, _wide(bias))
    return Weights(weight, weight.new_zeros(out_features(layer)))


def after(layer: nn.Module, weights: Weights, norm: Affine) -> Weights:
    """The weights of norm(layer(x)):  W' = scale · W,  c' = scale · c + shift, per channel of the output."""
    weight = weights.weight
    if isinstance(layer, TRANSPOSED):  # (in, out / groups, *), the input channels of a group side by side
        grouped = weight.unflatten(0, (_groups(layer), -1))
        scale = norm.scale.view(grouped.shape[0], 1, grouped.shape[2], *[1] * (grouped.dim() - 3))
        new = (grouped * scale).flatten(0, 1)
    elif isinstance(layer, nn.Embedding):  # (rows, out): every row is an output
        return Weights(weight * norm.scale + norm.shift, weights.bias)
    else:
        new = weight * norm.scale.view(-1, *[1] * (weight.dim() - 1))
    return Weights(new, norm.scale * weights.bias + norm.shift)


def before(layer: nn.Module, weights: Weights, norm: Affine) -> Weights:
    """The weights of layer(norm(x)):  W' = W · scale,  c' = c + Σ W · shift, per channel of the input.

    The sum is over input channels and kernel; that all of it reaches every place of the output is for the caller to
    know.
    """
    weight = weights.weight
    if isinstance(layer, TRANSPOSED):
        if bool(norm.shift.any()):
            raise ValueError("a transposed convolution has places of its output that not all of the kernel reaches")
        return Weights(weight * norm.scale.view(-1, *[1] * (weight.dim() - 1)), weights.bias)
    groups = _groups(layer)
    grouped = weight.unflatten(0, (groups, -1))  # (groups, out / groups, in / groups, *)
    shape = (groups, 1, grouped.shape[2], *[1] * (grouped.dim() - 3))
    added = (grouped * norm.shift.view(shape)).flatten(2).sum(2).flatten()
    return Weights((grouped * norm.scale.view(shape)).flatten(0, 1), weights.bias + added)


def put_(layer: nn.Module, weights: Weights) -> None:
    """Give a linear layer new parameters, in its dtype; those it had stay as they are, also where they are shared."""
    old = layer.weight
    assert isinstance(old, Tensor)
    order = torch.channels_last if old.dim() == 4 and old.is_contiguous(memory_format=torch.channels_last) else None
    weight = weights.weight.to(old.dtype)
    weight = weight.contiguous() if order is None or old.is_contiguous() else weight.contiguous(memory_format=order)
    trains = old.requires_grad
    layer.register_parameter("weight", nn.Parameter(weight, requires_grad=trains))
    if isinstance(layer, nn.Embedding):
        return
    layer.register_parameter("bias", nn.Parameter(weights.bias.to(old.dtype), requires_grad=trains))


def fits(layer: nn.Module, new: Weights | Affine) -> bool:
    """Whether new weights, or the scale and shift of a norm, are finite in the dtype of the layer."""
    dtype = next(t.dtype for t in (*layer.parameters(), *layer.buffers()) if t.is_floating_point())
    return all(bool(torch.isfinite(part.to(dtype)).all()) for part in new)


def out_features(layer: nn.Module) -> int:
    """Channels of the output."""
    names = ("out_features", "out_channels", "embedding_dim")
    return next(int(value) for name in names if isinstance(value := getattr(layer, name, None), int))


def channel_axis(layer: nn.Module, dims: int) -> int:
    """Which dimension of an input or output with so many holds the channels."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return dims - (weight.dim() - 1) if isinstance(layer, (*CONVS, *TRANSPOSED)) else dims - 1


def in_features(layer: nn.Module) -> int:
    """Channels of the input."""
    return int(getattr(layer, "in_features", None) or layer.in_channels)  # type: ignore[arg-type]


def by_output(layer: nn.Module, weight: Tensor) -> Tensor:
    """(out, *): what in the weight of a layer makes each channel of its output."""
    if isinstance(layer, TRANSPOSED):
        return weight.unflatten(0, (_groups(layer), -1)).transpose(1, 2).flatten(0, 1).flatten(1)
    return weight.T if isinstance(layer, nn.Embedding) else weight.flatten(1)


def by_input(layer: nn.Module, weight: Tensor) -> Tensor:
    """(in, *): what in the weight of a layer reads each channel of its input."""
    if isinstance(layer, TRANSPOSED):
        return weight.flatten(1)
    return weight.unflatten(0, (_groups(layer), -1)).transpose(1, 2).flatten(0, 1).flatten(1)


def _groups(layer: nn.Module) -> int:
    return int(getattr(layer, "groups", 1))


def _wide(tensor: object) -> Tensor:
    assert isinstance(tensor, Tensor)
    return tensor.detach().double()
