"""The kernel that moves running statistics towards a batch: `moments.ema_`, in one call."""

import math
from typing import Any

from steadynorm.kernels.cpu import arguments as at
from steadynorm.kernels.cpu.frontend import inlined
from steadynorm.kernels.cpu.simd import (
    Storage,
    larger,
    load_f64,
    load_i64,
    parameter,
    store_f32,
    store_f64,
    store_i64,
)


def make_update(_: Storage) -> Any:
    """X is the running mean and Y the running variance, of WEIGHT_BYTES each; MEAN and VAR are the batch's."""

    @inlined
    def move(address: Any, size: Any, c: Any, value: Any, weight: Any) -> Any:
        old = parameter(address, size, c, 0.0)
        if size == 8:
            store_f64(address + c * 8, old + weight * (value - old))
        else:
            store_f32(address + c * 4, old + weight * (value - old))

    def kernel(args: Any) -> Any:
        group, counter = load_i64(args + at.GROUP * 8), load_i64(args + at.COUNTER * 8)
        mean, var = load_i64(args + at.MEAN * 8), load_i64(args + at.VAR * 8)
        weight, count = load_f64(args + at.MOMENTUM * 8), load_f64(args + at.COUNT * 8)
        if load_i64(args + at.GUARDS * 8) != 0:
            for c in range(group):
                if not (math.isfinite(load_f64(mean + c * 8)) and math.isfinite(load_f64(var + c * 8))):
                    return
        if counter != 0:
            store_i64(counter, load_i64(counter) + 1)
            if math.isnan(weight):
                weight = 1.0 / load_i64(counter)
        unbiased = count / larger(count - 1.0, 1.0)
        size = load_i64(args + at.WEIGHT_BYTES * 8)
        for c in range(group):
            move(load_i64(args + at.X * 8), size, c, load_f64(mean + c * 8), weight)
            move(load_i64(args + at.Y * 8), size, c, load_f64(var + c * 8) * unbiased, weight)

    return kernel
