"""Activations and their derivatives, on tiles."""

import triton
import triton.language as tl

from steadynorm.kernels.gpu.tiles import load

SQRT_HALF = tl.constexpr(0.7071067811865476)
INV_SQRT_TAU = tl.constexpr(0.3989422804014327)
# exp(z) − 1 loses its digits near zero; above this the series below is exact to a rounding of float64.
SERIES_ABOVE = tl.constexpr(-0.25)


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """activation(z); NaN stays NaN. None is the identity."""
    if ACTIVATION == "relu":
        z = tl.where(z <= 0, 0, z)
    elif ACTIVATION == "leaky_relu":
        z = tl.where(z <= 0, z * 0.01, z)
    elif ACTIVATION == "relu6":
        z = tl.where(z <= 0, 0, tl.where(z >= 6, 6, z))
    elif ACTIVATION == "hardswish":
        z = z * (_clamp6(z + 3) / 6)
    elif ACTIVATION == "silu":
        z = z * _sigmoid(z)
    elif ACTIVATION == "gelu":
        z = z * (0.5 * (1 + tl.math.erf(z * SQRT_HALF)))
    elif ACTIVATION == "elu":
        z = tl.where(z <= 0, _expm1(z), z)
    return z


@triton.jit
def gradient(dy, z, ACTIVATION: tl.constexpr):
    """dy · activation'(z). For activations in FROM_OUTPUT, `z` may be the output as well."""
    if ACTIVATION == "relu":
        dy = tl.where(z <= 0, 0, dy)
    elif ACTIVATION == "leaky_relu":
        dy = tl.where(z > 0, dy, dy * 0.01)
    elif ACTIVATION == "relu6":
        dy = tl.where((z <= 0) | (z >= 6), 0, dy)
    elif ACTIVATION == "hardswish":
        dy = tl.where(z < -3, 0, tl.where(z <= 3, dy * (z / 3 + 0.5), dy))
    elif ACTIVATION == "silu":
        share = _sigmoid(z)
        dy = dy * (share * (1 + z * (1 - share)))
    elif ACTIVATION == "gelu":
        below = 0.5 * (1 + tl.math.erf(z * SQRT_HALF))
        dy = dy * (below + z * (INV_SQRT_TAU * tl.exp(-0.5 * z * z)))
    elif ACTIVATION == "elu":
        dy = tl.where(z <= 0, dy * tl.exp(tl.where(z <= 0, z, 0)), dy)
    return dy


@triton.jit
def gradient_at(dy, side, offset, there, normalized, weight, bias, ACTIVATION: tl.constexpr, ACC: tl.constexpr):
    """g = dy · activation'(z) of a tile. `side` is residual and y, of which one may tell z."""
    g = load(dy, offset, there, ACC)
    if ACTIVATION is not None:
        residual, y = side
        if y is not None:
            z = load(y, offset, there, ACC)
        else:
            z = normalized * weight + bias
            if residual is not None:
                z += load(residual, offset, there, ACC)
        g = gradient(g, z, ACTIVATION)
    return g


@triton.jit
def _clamp6(z):
    return tl.where(z <= 0, 0, tl.where(z >= 6, 6, z))


@triton.jit
def _sigmoid(z):
    # The exponential of a number that is not positive does not overflow.
    small = tl.exp(-tl.abs(z))
    return tl.where(z >= 0, 1, small) / (1 + small)


@triton.jit
def _expm1(z):
    """exp(z) − 1 for z ≤ 0."""
    below = tl.where(z <= 0, z, 0)
    near = tl.where(z >= SERIES_ABOVE, z, 0)
    # Σ zᵏ / k!, k = 1 … 11, from the inside out.
    series = 1 + near / 11
    series = 1 + near / 10 * series
    series = 1 + near / 9 * series
    series = 1 + near / 8 * series
    series = 1 + near / 7 * series
    series = 1 + near / 6 * series
    series = 1 + near / 5 * series
    series = 1 + near / 4 * series
    series = 1 + near / 3 * series
    series = 1 + near / 2 * series
    return tl.where(z >= SERIES_ABOVE, near * series, tl.exp(below) - 1)
