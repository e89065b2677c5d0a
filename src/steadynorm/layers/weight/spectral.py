"""Spectral normalization: a weight divided by its largest singular value."""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steadynorm.errors import InputError
from steadynorm.layers import checks
from steadynorm.layers.weight import target
from steadynorm.layers.wide import WideBuffers, widened

EPS = 1e-12
FIRST_ITERATIONS = 15
"""Power iterations when the vectors are new, as in torch."""


class SpectralNorm(WideBuffers):
    """The parametrization behind `spectral_norm`: weight -> weight / σ."""

    older: ClassVar[dict[str, str]] = {"_orig": "original", "_u": "0._u", "_v": "0._v"}
    _u: Tensor
    _v: Tensor

    def __init__(self, weight: Tensor, n_power_iterations: int, dim: int, eps: float) -> None:
        super().__init__()
        self.dim = dim
        self.eps = eps
        self.n_power_iterations = n_power_iterations
        matrix = self._matrix(weight.detach())
        for name, size in zip(("_u", "_v"), matrix.shape, strict=True):
            self.register_buffer(name, F.normalize(matrix.new_empty(size).normal_(), dim=0))
        self._iterate(matrix, FIRST_ITERATIONS)

    def forward(self, weight: Tensor) -> Tensor:
        """weight / σ in the dtype of the weight; in training one step of power iteration comes first."""
        with target.autocast_off(weight):
            matrix = self._matrix(weight)
            if self.training and not _is_recomputed():
                self._iterate(matrix.detach(), self.n_power_iterations)
            u, v = self._directions(matrix)
            sigma = torch.dot(u, torch.mv(matrix, v))
            divisor = torch.where(sigma > self.eps, sigma, 1)
            return (weight.to(matrix.dtype) / divisor).to(weight.dtype)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """A weight that is assigned is the one that is divided."""
        return weight

    def _matrix(self, weight: Tensor) -> Tensor:
        """(outputs, everything else), float32 at least."""
        return weight.to(widened(weight.dtype)).movedim(self.dim, 0).flatten(1)

    @torch.no_grad()
    def _iterate(self, matrix: Tensor, steps: int) -> None:
        """Move u and v towards the first singular vectors, in place: DDP and replicas share them."""
        u, v = self._u, self._v
        for _ in range(steps):
            u.copy_(self._unit(torch.mv(matrix, v.to(matrix.dtype)), instead=u))
            v.copy_(self._unit(torch.mv(matrix.mT, u.to(matrix.dtype)), instead=v))

    def _directions(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """u as a unit vector, and the v that belongs to it: copies, since a later step moves the buffers.

        Averaged vectors are shorter than 1 and fit neither each other nor the averaged weight. What is averaged of u
        still points somewhere: its length is taken off and v is computed from it, so that σ = ‖Wᵀu‖ never falls
        short for want of length. Where nothing was averaged that is the v that is stored.
        """
        with torch.no_grad():
            u = self._u.to(matrix.dtype, copy=True)
            if self.training:
                return u, self._v.to(matrix.dtype, copy=True)
            u = F.normalize(u, dim=0, eps=self.eps)
            return u, F.normalize(torch.mv(matrix.mT, u), dim=0, eps=self.eps)

    def _unit(self, vector: Tensor, instead: Tensor) -> Tensor:
        """`vector` at length 1; `instead` if it has none, so that a weight of zeros does not lose its vectors."""
        length = torch.linalg.vector_norm(vector)
        return torch.where(length > self.eps, vector / length.clamp(min=self.eps), instead.to(vector.dtype))

    def extra_repr(self) -> str:
        """The settings, by torch's names."""
        return f"n_power_iterations={self.n_power_iterations}, dim={self.dim}, eps={self.eps}"


def _is_recomputed() -> bool:
    """Whether this forward pass runs inside a backward pass: activation checkpointing, whose weight must be the same.

    A compiler traces forward passes only.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def spectral_norm(
    module: nn.Module, name: str = "weight", n_power_iterations: int = 1, eps: float = EPS, dim: int | None = None
) -> nn.Module:
    """Divide a weight by its largest singular value, so that the layer stretches nothing by more than 1.

    weight / σ,  σ = uᵀ W v,  W the weight as (outputs, everything else)

    In place of `torch.nn.utils.parametrizations.spectral_norm`, whose state_dict it has and whose weights it gives in
    training. In evaluation v is computed from u and the weight, and u counts by its direction alone, so that weights
    and vectors may have been averaged (EMA, SWA, federated). The vectors are float32 at least, and power iterations
    are computed in it, in half types and under autocast too. A weight of zeros gives zeros where torch gives NaN.

    Args:
        module: changed in place.
        n_power_iterations: per evaluation of the weight in training mode; at least 1.
        eps: a singular value or a vector that is not larger than this counts as zero.
        dim: which dimension counts the outputs: by default 1 in transposed convolutions, else 0.

    Returns: the module.

    Raises:
        InputError: there is no such tensor, it has fewer than two dimensions, or a setting is wrong. The module is as
            it was.

    Source: Miyato et al., Spectral Normalization for Generative Adversarial Networks (2018), Algorithm 1.
    """
    tensor = target.find(module, name, "spectral norm")
    target.check_eps(module, eps)
    if tensor.dim() < 2:
        raise InputError(
            f"{checks.name(module)}.{name} has shape {tuple(tensor.shape)}, expected a matrix or more for spectral"
            " norm: for one vector use weight_norm with dim=None."
        )
    dim = target.output_dim(module) if dim is None else dim
    target.check_dim(module, name, tensor, dim)
    if n_power_iterations < 1:
        raise InputError(f"{checks.name(module)}: n_power_iterations must be at least 1, got {n_power_iterations}.")
    target.refuse_twice(module, name, SpectralNorm, "spectral norm")
    target.attach(module, name, SpectralNorm(tensor, n_power_iterations, dim, eps))
    return module
