"""Whether means are far from zero, in deviations: there a mean that is taken off late costs digits."""

from typing import Any

import numba

from steadynorm.kernels.cpu.simd import load_f32, load_f64, store_f64

NEAR = 2.0
"""Deviations. Up to here (x·invstd − mean·invstd) loses no more than two of 24 binary digits of its largest value."""

TINY, HUGE = 1e-37, 1e300
"""Around the normal numbers of float32, and below what 1 / 0 is."""


def make_is_far() -> Any:
    """A kernel that says whether any |mean| · invstd of `count` is above `NEAR`, or not a number; both are float32."""

    def kernel(means: Any, invstds: Any, count: Any) -> Any:
        is_far = 0
        for i in range(count):
            distance = load_f32(means + i * 4) * load_f32(invstds + i * 4)
            if not (-NEAR <= distance <= NEAR):
                is_far = 1
        return is_far

    return kernel


def make_is_far_from() -> Any:
    """`make_is_far` for variances, float32; `eps` is the address of a float64.

    What is not a number is not far: it spoils a channel either way, and others are to keep their bits.
    """

    def kernel(means: Any, variances: Any, eps: Any, count: Any) -> Any:
        is_far, added = 0, load_f64(eps)
        for i in range(count):
            mean = numba.float64(load_f32(means + i * 4))
            spread = numba.float64(load_f32(variances + i * 4)) + added
            if spread < TINY or mean * mean > NEAR * NEAR * spread:
                is_far = 1
        return is_far

    return kernel


def make_widen() -> Any:
    """`make_is_far_from` for inverse deviations, which writes mean and variance, 1 / invstd² − eps, in float64.

    Where eps is most of it, so little is left of the variance's digits that it is called far too; and where float32
    could not hold what torch added up.
    """

    def kernel(means: Any, invstds: Any, eps: Any, mean_out: Any, var_out: Any, count: Any) -> Any:
        is_far, added = 0, load_f64(eps)
        for i in range(count):
            mean, invstd = numba.float64(load_f32(means + i * 4)), numba.float64(load_f32(invstds + i * 4))
            var = 1.0 / (invstd * invstd) - added
            store_f64(mean_out + i * 8, mean)
            store_f64(var_out + i * 8, var)
            distance = mean * invstd
            if distance < -NEAR or distance > NEAR or var < added or var > HUGE or invstd > 1.0 / TINY:
                is_far = 1
        return is_far

    return kernel
