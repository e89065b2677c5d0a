"""Weight standardization: every output's weights at mean 0 and variance 1, or scaled to keep the signal's variance."""

import math

import torch
from torch import Tensor, nn

from steadynorm.errors import InputError
from steadynorm.functional import ACTIVATIONS
from steadynorm.layers import checks
from steadynorm.layers.weight import target
from steadynorm.layers.wide import widened

EPS = 1e-6
"""Beside a variance of 1 / fan-in: small up to a fan-in of some ten thousands. What timm takes."""
REACH, STEPS = 12.0, 48_001
"""The normal density beyond 12 is below 1e-31; at this step the trapezoid rule is exact to rounding, kinks to 1e-8."""
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class WeightStandardization(nn.Module):
    """The parametrization behind `weight_standardization`."""

    gain: Tensor | None

    def __init__(self, weight: Tensor, eps: float, constant: float | None) -> None:
        super().__init__()
        self.eps = eps
        self.constant = constant
        gain = None if constant is None else nn.Parameter(weight.new_ones(weight.shape[0]))
        self.register_parameter("gain", gain)

    def forward(self, weight: Tensor) -> Tensor:
        """The standardized weight in the dtype of `weight`; computed in float32 at least."""
        rows = weight.to(widened(weight.dtype)).flatten(1)
        centred = rows - rows.mean(1, keepdim=True)
        standard = centred * torch.rsqrt(centred.square().mean(1, keepdim=True) + self.eps)
        if self.gain is not None and self.constant is not None:
            standard = standard * (self.gain.to(rows.dtype) * (self.constant / math.sqrt(rows.shape[1]))).unsqueeze(1)
        return standard.view_as(weight).to(weight.dtype)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """A weight that is assigned is the one that is standardized."""
        return weight

    def extra_repr(self) -> str:
        """The settings; the constant where there is a gain."""
        return f"eps={self.eps}" + ("" if self.constant is None else f", constant={self.constant:.6g}")


def activation_constant(activation: str | None) -> float:
    """γ = 1 / sqrt(Var(activation(z))) for z normal: what brings the variance behind the activation back to 1.

    Source: Brock et al., Characterizing signal propagation (2021), section 4.2; relu: sqrt(2 / (1 − 1/π)).
    """
    if activation is None:
        return 1.0
    z = torch.linspace(-REACH, REACH, STEPS, dtype=torch.float64)
    density = torch.exp(-z.square() / 2)
    density /= density.sum()
    y = ACTIVATIONS[activation](z)
    mean = (density * y).sum()
    return 1 / math.sqrt(float((density * (y - mean).square()).sum()))


def weight_standardization(
    module: nn.Module,
    name: str = "weight",
    *,
    eps: float = EPS,
    scaled: bool = False,
    activation: str | None = None,
) -> nn.Module:
    """Take mean and deviation off the weights of every output.

    plain:   (weight − mean) / sqrt(var + eps)
    scaled:  gain · γ / sqrt(fan_in) · (weight − mean) / sqrt(var + eps)

    Plain goes before a group norm or batch norm, which takes the scale off again. Scaled stands without a norm: `gain`
    (outputs,) is a parameter that starts at 1, and γ makes up for what the activation does to the variance.

    Args:
        module: a Linear, Conv1d, Conv2d or Conv3d, changed in place.
        eps: added to the variance of an output's weights, in its unit; positive.
        scaled: whether to keep the variance of the signal, as networks without normalization need it.
        activation: of the layer's input, None or one of `steadynorm.functional.ACTIVATIONS`; for γ.

    Returns: the module.

    Raises:
        InputError: another kind of layer, one weight per output, or a wrong setting. The module is as it was.

    Source: Qiao et al., Weight Standardization (2019), equation 5; Brock et al., High-Performance Large-Scale Image
        Recognition Without Normalization (2021), equation 1.
    """
    tensor = target.find(module, name, "weight standardization")
    target.check_eps(module, eps)
    if not isinstance(module, LAYERS):
        raise InputError(
            f"weight standardization expected one of {', '.join(kind.__name__ for kind in LAYERS)}, got"
            f" {checks.name(module)}: it is defined by the weights of one output."
        )
    if tensor.dim() < 2 or tensor[0].numel() < 2:
        raise InputError(
            f"{checks.name(module)}.{name} has shape {tuple(tensor.shape)}, one weight per output: less its mean that"
            " is zero, so leave this layer as it is."
        )
    if activation is not None and activation not in ACTIVATIONS:
        raise InputError(f"activation got {activation!r}, expected None or one of {', '.join(ACTIVATIONS)}.")
    if activation is not None and not scaled:
        raise InputError("activation= is for scaled=True: plain weight standardization does not depend on it.")
    target.refuse_twice(module, name, WeightStandardization, "weight standardization")
    constant = activation_constant(activation) if scaled else None
    target.attach(module, name, WeightStandardization(tensor, eps, constant))
    return module
