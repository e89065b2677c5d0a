"""Weight normalization: the length of a weight vector apart from its direction."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from steadynorm.errors import InputError
from steadynorm.layers import checks
from steadynorm.layers.weight import target
from steadynorm.layers.wide import widened

EPS = 1e-12
"""Far below any length that trains, and its square is still a normal float32."""


class WeightNorm(nn.Module):
    """The parametrization behind `weight_norm`: (g, v) -> g · v / ‖v‖."""

    older: ClassVar[dict[str, str]] = {"_g": "original0", "_v": "original1"}

    def __init__(self, dim: int | None = 0, eps: float = EPS) -> None:
        super().__init__()
        self.dim = dim
        self.eps = eps

    def forward(self, g: Tensor, v: Tensor) -> Tensor:
        """The weight, in the dtype of v; computed in float32 at least."""
        wide = v.to(widened(v.dtype))
        square = self._square(wide)
        is_zero = square <= self.eps**2
        # Masked before the root: its slope at zero is infinite, and 0 · ∞ is NaN.
        scale = torch.where(is_zero, 0, g.to(wide.dtype) * torch.where(is_zero, 1, square).rsqrt())
        return (wide * scale).to(v.dtype)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """g and v of a weight: its lengths, and itself."""
        return self._square(weight.to(widened(weight.dtype))).sqrt().to(weight.dtype), weight

    def _square(self, v: Tensor) -> Tensor:
        if self.dim is None:
            return v.square().sum()
        others = [d for d in range(v.dim()) if d != self.dim]
        return v.square().sum(others, keepdim=True) if others else v.square()

    def extra_repr(self) -> str:
        """What of the settings is not torch's."""
        return f"dim={self.dim}, eps={self.eps}"


def weight_norm(module: nn.Module, name: str = "weight", dim: int | None = 0, eps: float = EPS) -> nn.Module:
    """Train the length and the direction of every weight vector apart.

    weight = g · v / ‖v‖,  where ‖v‖ > eps, else 0

    In place of `torch.nn.utils.parametrizations.weight_norm`, whose state_dict it has and whose weights it gives;
    a vector of zeros gives zeros there too, and zero gradients, where torch gives NaN: what was pruned stays pruned.

    Args:
        module: changed in place. Its parameter `name` becomes two, which an optimizer must be given.
        dim: which dimension counts the vectors; one length for each. None: one length for the whole tensor. 0 is one
            per output in Linear and ConvNd, and one per *input* in a transposed convolution, where an output is 1.
        eps: a vector that is not longer than this counts as zero, in the unit of the weight.

    Returns: the module.

    Raises:
        InputError: there is no such tensor, or a setting is wrong. The module is as it was.

    Source: Salimans & Kingma, Weight Normalization (2016), equation 2.
    """
    tensor = target.find(module, name, "weight norm")
    target.check_eps(module, eps)
    target.check_dim(module, name, tensor, dim)
    if target.is_parametrized(module, name):
        raise InputError(
            f"{checks.name(module)}.{name} is parametrized already: weight norm has to be the first, so make it plain"
            " with make_plain, or put weight norm on before."
        )
    target.attach(module, name, WeightNorm(dim, eps))
    return module
