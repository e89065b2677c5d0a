"""Vectors between float32 and float64: for one of a few channels a copy by torch costs more than its normalization."""

from typing import Any

import numba

from steadynorm.kernels.cpu.simd import parameter, store_f32, store_f64


def make_cast() -> Any:
    """A kernel that writes `count` values, of `size` bytes, to where `new_size` bytes are one; both are 4 or 8."""

    def kernel(source: Any, size: Any, target: Any, new_size: Any, count: Any) -> Any:
        for i in range(count):
            value = parameter(source, size, i, 0.0)
            if new_size == 8:
                store_f64(target + i * 8, value)
            else:
                store_f32(target + i * 4, numba.float32(value))

    return kernel
