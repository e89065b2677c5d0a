"""Whether means are far from zero, in deviations: there a mean that is taken off late costs digits."""

import ctypes
from typing import Any

from steadynorm.kernels.cpu.simd import load_f32

ENTRY = ctypes.PYFUNCTYPE(ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
"""It keeps the GIL, which to release and take again costs more than the kernel."""

NEAR = 2.0
"""Deviations. Up to here (x·invstd − mean·invstd) loses no more than two of 24 binary digits of its largest value."""


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
