"""The kernels for CPU tensors, compiled by Numba."""

from torch import Tensor


def why_not(x: Tensor | None = None, *, masked: bool = False) -> str:
    """Why this backend cannot run here, or cannot take `x`; empty where it can."""
    return "not written yet"
