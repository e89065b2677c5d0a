"""Sums over a piece of a contiguous run, in the arithmetic's precision and in several chains.

The end of a run that does not fill a vector is done by a vector that ends with the run and overlaps the one before, all
but its new lanes left out: masked loads and stores cost more. Runs shorter than a vector have to be masked.
"""

from functools import cache
from typing import Any

from steadynorm.kernels.cpu.frontend import inlined
from steadynorm.kernels.cpu.simd import (
    LANES,
    Storage,
    fma,
    keep_last,
)


@cache
def make_sums(storage: Storage) -> tuple[Any, Any, Any]:
    """`total(run, start, stop, n)`, `about(…, pivot)` and `squares(…)` of the values from `start` to `stop`.

    `about` gives Σ (x − pivot) and Σ (x − pivot)². All are vectors, whose lanes are still to be added. Where `stop`
    is not whole vectors behind `start`, it is the end `n` of the run.
    """
    load, load_first, splat, size = storage.load, storage.load_first, storage.splat, storage.bytes

    @inlined
    def total(run: Any, start: Any, stop: Any, n: Any) -> Any:
        a = b = c = d = splat(0.0)
        i = start
        while i + 4 * LANES <= stop:
            a, b = a + load(run + i * size), b + load(run + (i + LANES) * size)
            c, d = c + load(run + (i + 2 * LANES) * size), d + load(run + (i + 3 * LANES) * size)
            i += 4 * LANES
        while i + LANES <= stop:
            a = a + load(run + i * size)
            i += LANES
        if i < stop:
            if n >= LANES:
                b = b + keep_last(load(run + (stop - LANES) * size), stop - i)
            else:
                b = b + load_first(run, n, splat(0.0))
        return (a + b) + (c + d)

    @inlined
    def about(run: Any, start: Any, stop: Any, n: Any, pivot: Any) -> Any:
        s0 = q0 = s1 = q1 = splat(0.0)
        i = start
        while i + 2 * LANES <= stop:
            a, b = load(run + i * size) - pivot, load(run + (i + LANES) * size) - pivot
            s0, s1 = s0 + a, s1 + b
            q0, q1 = fma(a, a, q0), fma(b, b, q1)
            i += 2 * LANES
        if i + LANES <= stop:
            a = load(run + i * size) - pivot
            s0, q0 = s0 + a, fma(a, a, q0)
            i += LANES
        if i < stop:
            if n >= LANES:
                b = keep_last(load(run + (stop - LANES) * size) - pivot, stop - i)
            else:
                b = load_first(run, n, pivot) - pivot
            s1, q1 = s1 + b, fma(b, b, q1)
        return s0 + s1, q0 + q1

    @inlined
    def squares(run: Any, start: Any, stop: Any, n: Any) -> Any:
        q0 = q1 = splat(0.0)
        i = start
        while i + 2 * LANES <= stop:
            a, b = load(run + i * size), load(run + (i + LANES) * size)
            q0, q1 = fma(a, a, q0), fma(b, b, q1)
            i += 2 * LANES
        if i + LANES <= stop:
            a = load(run + i * size)
            q0 = fma(a, a, q0)
            i += LANES
        if i < stop:
            a = keep_last(load(run + (stop - LANES) * size), stop - i) if n >= LANES else load_first(run, n, splat(0.0))
            q1 = fma(a, a, q1)
        return q0 + q1

    return total, about, squares
