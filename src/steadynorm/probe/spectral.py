"""The stored vectors of spectral normalizations: torch.nn's two, and ours."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm as OldSpectralNorm

from steadynorm.probe.facts import SpectralVectors


class Stored(NamedTuple):
    """One spectral normalization: the layer's path, the weight as a matrix (H, W), u (H,) and v (W,)."""

    path: str
    matrix: Tensor
    u: Tensor
    v: Tensor


def stored(model: nn.Module) -> Iterator[Stored]:
    """The spectral normalizations of `model`; one that is not the first parametrization of its weight is left out."""
    for path, module in model.named_modules():
        if parametrize.is_parametrized(module):
            for parametrizations in module.parametrizations.values():
                first, weight = parametrizations[0], getattr(parametrizations, "original", None)
                yield from _fitting(path, weight, first, getattr(first, "_u", None), getattr(first, "_v", None))
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, OldSpectralNorm):
                weight, u, v = (getattr(module, hook.name + end, None) for end in ("_orig", "_u", "_v"))
                yield from _fitting(path, weight, hook, u, v)


def _fitting(path: str, weight: object, settings: object, u: object, v: object) -> Iterator[Stored]:
    if not (isinstance(weight, Tensor) and isinstance(u, Tensor) and isinstance(v, Tensor)):
        return
    matrix = weight.detach().movedim(getattr(settings, "dim", 0), 0).flatten(1)
    if (u.numel(), v.numel()) == tuple(matrix.shape):
        yield Stored(path, matrix, u, v)


def vectors(model: nn.Module) -> tuple[SpectralVectors, ...]:
    """What the vectors are, and what evaluation makes of the weight with them: W / (u^T W v)."""
    found = []
    for path, matrix, u, v in stored(model):
        matrix, a, b = matrix.double(), u.double(), v.double()
        sigma, largest = float(a @ matrix @ b), float(torch.linalg.matrix_norm(matrix, 2))
        after = largest / abs(sigma) if sigma else float("inf")
        dtype = str(u.dtype).removeprefix("torch.")
        found.append(SpectralVectors(path, float(a.norm()), float(b.norm()), after, dtype))
    return tuple(found)


@torch.no_grad()
def iterate_(matrix: Tensor, u: Tensor, v: Tensor, iterations: int) -> None:
    """Turn u and v into the first singular vectors of `matrix`, in place, by power iteration.

    Source: Miyato et al., Spectral Normalization for GANs, arXiv 1802.05957, algorithm 1.
    """
    matrix, a = matrix.double(), F.normalize(u.double(), dim=0)
    if not bool(a.isfinite().all()) or not bool(a.any()):
        a = F.normalize(torch.ones_like(a), dim=0)
    b = v.double()
    for _ in range(iterations):
        b = F.normalize(matrix.T @ a, dim=0)
        a = F.normalize(matrix @ b, dim=0)
    u.copy_(a)
    v.copy_(b)
