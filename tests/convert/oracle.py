"""What weight and bias are nearest to a batch norm, long-hand in NumPy float64.

Nothing of the project is imported and nothing of torch. Arrays are (N, C, *); a mask (N, *) is true where a value
counts.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def batch_norm(x: Array, mean: Array, var: Array, weight: Array, bias: Array, eps: float) -> Array:
    """A batch norm in evaluation."""
    out = np.empty_like(x)
    for c in range(x.shape[1]):
        out[:, c] = weight[c] * (x[:, c] - mean[c]) / np.sqrt(var[c] + eps) + bias[c]
    return out


def group_norm(x: Array, groups: int, eps: float, mask: NDArray[np.bool_] | None = None) -> Array:
    """Without weight and bias; 0 groups: the channels of one position."""
    n, c = x.shape[:2]
    out = np.zeros_like(x)
    if mask is None:
        mask = np.ones((n, *x.shape[2:]), bool)
    if groups == 0:
        mean = x.mean(1, keepdims=True)
        return (x - mean) / np.sqrt(((x - mean) ** 2).mean(1, keepdims=True) + eps)
    size = c // groups
    for i in range(n):
        for g in range(groups):
            part = x[i, g * size : (g + 1) * size]
            values = part[:, mask[i]]
            if values.size:
                normal = (part - values.mean()) / np.sqrt(values.var() + eps)
                out[i, g * size : (g + 1) * size] = np.where(mask[i], normal, 0)
    return out


def line(z: Array, y: Array, mask: NDArray[np.bool_] | None = None) -> tuple[Array, Array, float]:
    """Weight and bias (C,) by QR, channel by channel, and the error over the spread of y."""
    channels = z.shape[1]
    weight, bias, left, spread = np.empty(channels), np.empty(channels), 0.0, 0.0
    for c in range(channels):
        u, v = (t[:, c][mask] if mask is not None else t[:, c].ravel() for t in (z, y))
        design = np.stack([u, np.ones_like(u)], 1)
        solution = np.linalg.lstsq(design, v, rcond=None)[0]
        weight[c], bias[c] = solution
        left += float(((design @ solution - v) ** 2).sum())
        spread += float(((v - v.mean()) ** 2).sum())
    return weight, bias, float(np.sqrt(left / spread))
