"""Activations and their derivatives on vectors, for kernels to close over.

`make(storage, name)` gives two kernel functions, in the arithmetic of the storage: `apply(z)`, and `back(z, dy)`, which
is dy · apply'(z). Where the derivative is zero `back` is zero, whatever `dy` is.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

from steadynorm.kernels.cpu.frontend import inlined
from steadynorm.kernels.cpu.simd import (
    Storage,
    absolute,
    fma,
    nearest_whole,
    polynomial,
    scaled_by_power_of_two,
    where_positive,
)

LEAKY_SLOPE = 0.01  # torch's default

# Φ(−u) = exp(−u²/2) · t · Q(t) with t = 1 / (1 + c·u), u ≥ 0. Q is a Chebyshev fit of erfcx(u/√2) / (2t) in 40
# digits, highest power first; its own error is 5e-9 relative up to u = 14, 4e-16 up to u = 39.
TAIL = {
    False: (
        0.3,
        (
            -0.020914359728848045, 0.11404027207372555, -0.23203848293578214, 0.19694067701667836,
            -0.0837425490162062, 0.09848074018345118, 0.07758906437735162, 0.11040517984663449,
            0.11955176322872277, 0.11968769314517996,
        ),
    ),
    True: (
        0.25,
        (
            0.0020143056427327478, -0.02186969841006447, 0.10805228364135555, -0.3196882921343883,
            0.6273750021909523, -0.8572244454713992, 0.8409236764302788, -0.6143572339263671,
            0.3495389759073404, -0.1507195791756887, 0.04464126103705428, -0.018877029208476212,
            -0.0009456563507775726, 0.006982675420753099, 0.02339170239656131, 0.04325121237122216,
            0.06350233783581857, 0.08103527212071088, 0.09350208920085311, 0.09973557038579382,
            0.09973557009573471,
        ),
    ),
}  # fmt: skip

Kernel = Callable[..., Any]


@cache
def _expm1(storage: Storage) -> Kernel:
    """exp(x) − 1 for x in the range of normal numbers: 2^k · (e^r − 1) + (2^k − 1) with r = x − k·ln 2."""
    splat = storage.splat
    degree = 13 if storage.is_double else 7
    series = polynomial(tuple(1 / math.factorial(n) for n in range(degree, 0, -1)))
    lowest, highest = (-708.0, 709.0) if storage.is_double else (-87.0, 88.0)
    per_ln2 = 1 / math.log(2)
    ln2_high = 0.693359375 if not storage.is_double else float.fromhex("0x1.62e42feep-1")
    ln2_low = -2.12194440e-4 if not storage.is_double else 1.90821492927058770002e-10

    @inlined
    def expm1(x: Any) -> Any:
        x = where_positive(splat(lowest) - x, splat(lowest), x)
        x = where_positive(x - splat(highest), splat(highest), x)
        k = nearest_whole(x * splat(per_ln2))
        r = fma(k, splat(-ln2_high), x)
        r = fma(k, splat(-ln2_low), r)
        scale = scaled_by_power_of_two(splat(1.0), k)
        return fma(scale, series(r) * r, scale - splat(1.0))

    return expm1


@cache
def _sigmoid(storage: Storage) -> Kernel:
    splat, expm1 = storage.splat, _expm1(storage)

    @inlined
    def sigmoid(z: Any) -> Any:
        return splat(1.0) / (expm1(splat(0.0) - z) + splat(2.0))

    return sigmoid


@cache
def _normal(storage: Storage) -> tuple[Kernel, Kernel]:
    """exp(−z²/2), and the normal distribution function Φ(z) given it."""
    splat, expm1 = storage.splat, _expm1(storage)
    c, coefficients = TAIL[storage.is_double]
    tail = polynomial(coefficients)

    @inlined
    def bell(z: Any) -> Any:
        return expm1(z * z * splat(-0.5)) + splat(1.0)

    @inlined
    def distribution(z: Any, bell_of_z: Any) -> Any:
        t = splat(1.0) / fma(absolute(z), splat(c), splat(1.0))
        below = bell_of_z * t * tail(t)
        return where_positive(z, splat(1.0) - below, below)

    return bell, distribution


@cache
def make(storage: Storage, name: str | None) -> tuple[Kernel, Kernel]:
    """`apply(z)` and `back(z, dy)` of an activation; for None the identity."""
    makers: dict[str | None, Callable[[Storage], tuple[Kernel, Kernel]]] = {
        None: _identity,
        "relu": lambda storage: _leaky(storage, 0.0),
        "leaky_relu": lambda storage: _leaky(storage, LEAKY_SLOPE),
        "relu6": _relu6,
        "hardswish": _hardswish,
        "silu": _silu,
        "gelu": _gelu,
        "elu": _elu,
    }
    return makers[name](storage)


@cache
def _identity(storage: Storage) -> tuple[Kernel, Kernel]:
    @inlined
    def apply(z: Any) -> Any:
        return z

    @inlined
    def back(z: Any, dy: Any) -> Any:
        return dy

    return apply, back


@cache
def _leaky(storage: Storage, below: float) -> tuple[Kernel, Kernel]:
    splat = storage.splat
    is_relu = below == 0.0

    @inlined
    def apply(z: Any) -> Any:
        if is_relu:
            # zero below zero, also for −∞; NaN stays NaN, for it is not below zero
            return where_positive(splat(0.0) - z, splat(0.0), z)
        return where_positive(z, z, z * splat(below))

    @inlined
    def back(z: Any, dy: Any) -> Any:
        return where_positive(z, dy, splat(0.0) if is_relu else dy * splat(below))

    return apply, back


@cache
def _relu6(storage: Storage) -> tuple[Kernel, Kernel]:
    splat = storage.splat

    @inlined
    def apply(z: Any) -> Any:
        z = where_positive(splat(0.0) - z, splat(0.0), z)
        return where_positive(z - splat(6.0), splat(6.0), z)

    @inlined
    def back(z: Any, dy: Any) -> Any:
        return where_positive(z, where_positive(splat(6.0) - z, dy, splat(0.0)), splat(0.0))

    return apply, back


@cache
def _hardswish(storage: Storage) -> tuple[Kernel, Kernel]:
    splat = storage.splat
    sixth = 1 / 6

    @inlined
    def apply(z: Any) -> Any:
        ramp = z + splat(3.0)
        ramp = where_positive(splat(0.0) - ramp, splat(0.0), ramp)
        ramp = where_positive(ramp - splat(6.0), splat(6.0), ramp)
        return z * ramp * splat(sixth)

    @inlined
    def back(z: Any, dy: Any) -> Any:
        middle = fma(z, splat(1 / 3), splat(0.5))
        above = where_positive(splat(3.0) - z, dy * middle, dy)
        return where_positive(z + splat(3.0), above, splat(0.0))

    return apply, back


@cache
def _silu(storage: Storage) -> tuple[Kernel, Kernel]:
    splat, sigmoid = storage.splat, _sigmoid(storage)

    @inlined
    def apply(z: Any) -> Any:
        return z * sigmoid(z)

    @inlined
    def back(z: Any, dy: Any) -> Any:
        s = sigmoid(z)
        return dy * (s * fma(z, splat(1.0) - s, splat(1.0)))

    return apply, back


@cache
def _gelu(storage: Storage) -> tuple[Kernel, Kernel]:
    splat = storage.splat
    bell, distribution = _normal(storage)
    density = 1 / math.sqrt(2 * math.pi)

    @inlined
    def apply(z: Any) -> Any:
        return z * distribution(z, bell(z))

    @inlined
    def back(z: Any, dy: Any) -> Any:
        b = bell(z)
        return dy * fma(z * b, splat(density), distribution(z, b))

    return apply, back


@cache
def _elu(storage: Storage) -> tuple[Kernel, Kernel]:
    splat, expm1 = storage.splat, _expm1(storage)

    @inlined
    def apply(z: Any) -> Any:
        return where_positive(z, z, expm1(z))

    @inlined
    def back(z: Any, dy: Any) -> Any:
        return where_positive(z, dy, dy * (expm1(z) + splat(1.0)))

    return apply, back
