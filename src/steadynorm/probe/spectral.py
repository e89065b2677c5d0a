"""The stored vectors of torch.nn's two spectral normalizations.

Ours takes the lengths off and makes one vector from the other in evaluation: averaged vectors do it no harm.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm as OldSpectralNorm

from steadynorm.layers.weight.spectral import SpectralNorm
from steadynorm.probe.facts import SpectralVectors

# Enough from anywhere: the error falls by the ratio of the first two singular values each time.
POWER_ITERATIONS = 100
# Growth of the value in an iteration from which on it is taken as settled: at most 0.3 % is missing then, for weights
# of 6 shapes with up to 2.4 million values.
SETTLED = 1e-5

RESCALING = {"WeightNorm": "weight normalization", "SpectralNorm": "spectral normalization"}


class Stored(NamedTuple):
    """One spectral normalization: the layer's path, the weight as a matrix (H, W), u (H,) and v (W,)."""

    path: str
    matrix: Tensor
    u: Tensor
    v: Tensor


def stored(model: nn.Module) -> Iterator[Stored]:
    """The spectral normalizations of `model` that trust their vectors and come first at their weight."""
    for path, module in model.named_modules():
        if parametrize.is_parametrized(module):
            for parametrizations in module.parametrizations.values():
                first, weight = parametrizations[0], getattr(parametrizations, "original", None)
                if not isinstance(first, SpectralNorm):
                    yield from _fitting(path, weight, first, getattr(first, "_u", None), getattr(first, "_v", None))
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, OldSpectralNorm):
                weight, u, v = (getattr(module, hook.name + end, None) for end in ("_orig", "_u", "_v"))
                yield from _fitting(path, weight, hook, u, v)


def rescaled(model: nn.Module) -> dict[str, str]:
    """Layers whose weight is divided by a norm of it before it is used, and by what."""
    found = {}
    for path, module in model.named_modules():
        names = [type(hook).__name__ for hook in module._forward_pre_hooks.values()]
        if parametrize.is_parametrized(module):
            names += [type(p).__name__ for steps in module.parametrizations.values() for p in steps]
        kind = next((RESCALING[name.lstrip("_")] for name in names if name.lstrip("_") in RESCALING), None)
        if kind is not None:
            found[path] = kind
    return found


def _fitting(path: str, weight: object, settings: object, u: object, v: object) -> Iterator[Stored]:
    if not (isinstance(weight, Tensor) and isinstance(u, Tensor) and isinstance(v, Tensor)):
        return
    matrix = weight.detach().movedim(getattr(settings, "dim", 0), 0).flatten(1)
    if (u.numel(), v.numel()) == tuple(matrix.shape):
        yield Stored(path, matrix, u, v)


def vectors(model: nn.Module) -> tuple[SpectralVectors, ...]:
    """What the vectors are, and what evaluation makes of the weight: W / (u^T W v), in ours by their directions."""
    found = []
    for path, matrix, u, v in stored(model):
        lengths = float(u.double().norm()), float(v.double().norm())
        wide = matrix if matrix.dtype in (torch.float32, torch.float64) else matrix.float()
        sigma, largest = float(u.to(wide.dtype) @ wide @ v.to(wide.dtype)), _largest(wide)
        after = largest / abs(sigma) if sigma else math.inf
        is_fresh = _is_fresh(model.get_submodule(path))
        dtype = str(u.dtype).removeprefix("torch.")
        found.append(SpectralVectors(path, *lengths, after if largest else 1.0, dtype, is_fresh))
    return tuple(found)


def _is_fresh(module: nn.Module) -> bool:
    """Whether the older of torch's two has never run: it begins with random vectors, and with the weight as it is."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, OldSpectralNorm):
            weight, original = getattr(module, hook.name, None), getattr(module, f"{hook.name}_orig", None)
            if isinstance(weight, Tensor) and isinstance(original, Tensor) and torch.equal(weight, original):
                return True
    return False


@torch.no_grad()
def _largest(matrix: Tensor) -> float:
    """The largest singular value, by power iteration from a random start: it ends where it grows no more."""
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(matrix.shape[0], generator=generator).to(matrix)
    before = value = 0.0
    for _ in range(POWER_ITERATIONS):
        v = F.normalize(matrix.T @ u, dim=0)
        u = matrix @ v
        before, value = value, float(u.norm())
        if value - before <= SETTLED * value:
            break
    return value


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
