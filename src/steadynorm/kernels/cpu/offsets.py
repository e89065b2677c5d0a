"""Whether means are far from zero, in deviations: there a mean that is taken off late costs digits."""

from typing import Any

from steadynorm.kernels.cpu.simd import load_f32, load_i64, store_i64

MEANS, INVSTDS, COUNT, IS_FAR = range(4)
"""Places in the arguments, of eight bytes each: two addresses of float32, how many, and the answer."""

NEAR = 2.0
"""Deviations. Up to here (x·invstd − mean·invstd) loses no more than two of 24 binary digits of its largest value."""


def make_is_far() -> Any:
    """A kernel that says whether any |mean| · invstd is above `NEAR`, or not a number."""

    def kernel(args: Any) -> Any:
        means, invstds = load_i64(args + MEANS * 8), load_i64(args + INVSTDS * 8)
        is_far = 0
        for i in range(load_i64(args + COUNT * 8)):
            distance = load_f32(means + i * 4) * load_f32(invstds + i * 4)
            if not (-NEAR <= distance <= NEAR):
                is_far = 1
        store_i64(args + IS_FAR * 8, is_far)

    return kernel
