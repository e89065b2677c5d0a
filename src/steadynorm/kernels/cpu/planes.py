"""Kernels for memory in plain order, (outer, group, inner) with inner > 1: a group is a set of contiguous runs.

A task is a block of neighbouring groups, small enough that its second pass finds `x` in the cache: that is what makes
a whole forward or backward pass one trip to memory. The tasks are the same for any number of threads, and so are the
sums.

Sums are 16 lanes of float64 per group, of values less a pivot (the group's first value going forward, its mean coming
back): the square of a large mean never enters. A mean is taken off in two parts, `high` in the arithmetic's precision
and the rest, so that an offset costs no digits of the result.
"""

from typing import Any

import numba

from steadynorm.kernels.cpu import activations
from steadynorm.kernels.cpu import arguments as at
from steadynorm.kernels.cpu.arguments import INPUT, NORMALIZE, SLOT, STATISTICS, SUMS
from steadynorm.kernels.cpu.simd import (
    LANES,
    Storage,
    fma,
    lanes_sum,
    load_f64,
    load_i64,
    load_v64,
    next_ticket,
    parameter,
    splat64,
    square_root_of,
    store_f64,
    store_vector,
    stores_fence,
    widen,
)

SUM = LANES * 8
HIGH, SCALE, SHIFT, BACK, CENTRE = (2 * SUM + 8 * i for i in range(5))


@numba.njit(forceinline=True)
def _clear(slots: Any, groups: Any) -> Any:
    for c in range(groups):
        store_vector(slots + c * SLOT, splat64(0.0))
        store_vector(slots + c * SLOT + SUM, splat64(0.0))


def _coefficients(storage: Storage) -> Any:
    is_double = storage.is_double

    @numba.njit(forceinline=True)
    def coefficients(args: Any, slot: Any, c: Any) -> Any:
        """Keep high, scale and shift of z = (x − high) · scale + shift; return what is left of the mean, and 1/σ."""
        mean = load_f64(load_i64(args + at.MEAN * 8) + c * 8)
        var = load_f64(load_i64(args + at.VAR * 8) + c * 8)
        eps = load_f64(args + at.EPS * 8)
        weight = parameter(load_i64(args + at.WEIGHT * 8), load_i64(args + at.WEIGHT_BYTES * 8), c, 1.0)
        bias = parameter(load_i64(args + at.BIAS * 8), load_i64(args + at.BIAS_BYTES * 8), c, 0.0)
        high = mean if is_double else numba.float64(numba.float32(mean))
        invstd = 1.0 / square_root_of(var + eps)
        store_f64(slot + HIGH, high)
        store_f64(slot + SCALE, weight * invstd)
        store_f64(slot + SHIFT, bias - (mean - high) * weight * invstd)
        return mean - high, invstd

    return coefficients


def make_forward(storage: Storage, activation: str | None) -> Any:
    """The forward kernel: the stages STATISTICS and NORMALIZE, either or both."""
    apply, _ = activations.make(storage, activation)
    load, load_first, load_splat = storage.load, storage.load_first, storage.load_splat
    store, store_first, stream, splat = storage.store, storage.store_first, storage.stream, storage.splat
    size = storage.bytes
    coefficients = _coefficients(storage)

    @numba.njit(forceinline=True)
    def add_row(slot: Any, row: Any, inner: Any, pivot: Any) -> Any:
        total, squares = load_v64(slot), load_v64(slot + SUM)
        i = 0
        while i + LANES <= inner:
            value = widen(load(row + i * size) - pivot)
            total = total + value
            squares = fma(value, value, squares)
            i += LANES
        if i < inner:
            value = widen(load_first(row + i * size, inner - i, pivot) - pivot)
            total = total + value
            squares = fma(value, value, squares)
        store_vector(slot, total)
        store_vector(slot + SUM, squares)

    @numba.njit(forceinline=True)
    def statistics(args: Any, slots: Any, first: Any, last: Any) -> Any:
        outer, group, inner = load_i64(args + at.OUTER * 8), load_i64(args + at.GROUP * 8), load_i64(args + at.INNER * 8)
        x = load_i64(args + at.X * 8)
        _clear(slots, last - first)
        for n in range(outer):
            for c in range(first, last):
                row = x + (n * group + c) * inner * size
                add_row(slots + (c - first) * SLOT, row, inner, load_splat(x + c * inner * size))
        count = outer * inner
        for c in range(first, last):
            slot = slots + (c - first) * SLOT
            shift = lanes_sum(load_v64(slot)) / count
            var = lanes_sum(load_v64(slot + SUM)) / count - shift * shift
            if var < 0.0:
                var = 0.0
            pivot = lanes_sum(widen(load_splat(x + c * inner * size))) / LANES
            store_f64(load_i64(args + at.MEAN * 8) + c * 8, pivot + shift)
            store_f64(load_i64(args + at.VAR * 8) + c * 8, var)

    @numba.njit(forceinline=True)
    def write_row(x: Any, y: Any, residual: Any, inner: Any, slot: Any, streams: Any) -> Any:
        high, scale, shift = splat(load_f64(slot + HIGH)), splat(load_f64(slot + SCALE)), splat(load_f64(slot + SHIFT))
        i = 0
        if streams:
            i = min((-(y // size)) % LANES, inner)
            if i > 0:
                z = fma(load_first(x, i, high) - high, scale, shift)
                if residual != 0:
                    z = z + load_first(residual, i, high)
                store_first(y, i, apply(z))
        while i + LANES <= inner:
            z = fma(load(x + i * size) - high, scale, shift)
            if residual != 0:
                z = z + load(residual + i * size)
            if streams:
                stream(y + i * size, apply(z))
            else:
                store(y + i * size, apply(z))
            i += LANES
        if i < inner:
            z = fma(load_first(x + i * size, inner - i, high) - high, scale, shift)
            if residual != 0:
                z = z + load_first(residual + i * size, inner - i, high)
            store_first(y + i * size, inner - i, apply(z))

    @numba.njit(forceinline=True)
    def normalize(args: Any, slots: Any, first: Any, last: Any) -> Any:
        outer, group, inner = load_i64(args + at.OUTER * 8), load_i64(args + at.GROUP * 8), load_i64(args + at.INNER * 8)
        x, y, residual = load_i64(args + at.X * 8), load_i64(args + at.Y * 8), load_i64(args + at.RESIDUAL * 8)
        streams = load_i64(args + at.STREAMS * 8) != 0
        for c in range(first, last):
            coefficients(args, slots + (c - first) * SLOT, c)
        for n in range(outer):
            for c in range(first, last):
                offset = (n * group + c) * inner * size
                beside = residual + offset if residual != 0 else 0
                write_row(x + offset, y + offset, beside, inner, slots + (c - first) * SLOT, streams)

    def kernel(args: Any) -> Any:
        stages, block = load_i64(args + at.STAGES * 8), load_i64(args + at.BLOCK * 8)
        tasks, group = load_i64(args + at.TASKS * 8), load_i64(args + at.GROUP * 8)
        slots = load_i64(args + at.SCRATCH * 8) + next_ticket(args + at.WORKERS * 8) * block * SLOT
        task = next_ticket(args)
        while task < tasks:
            first = task * block
            last = min(first + block, group)
            if stages & STATISTICS:
                statistics(args, slots, first, last)
            if stages & NORMALIZE:
                normalize(args, slots, first, last)
            task = next_ticket(args)
        stores_fence()

    return kernel


def make_backward(storage: Storage, activation: str | None) -> Any:
    """The backward kernel: the stages SUMS and INPUT, either or both."""
    _, back = activations.make(storage, activation)
    load, load_first = storage.load, storage.load_first
    store, store_first, stream, splat = storage.store, storage.store_first, storage.stream, storage.splat
    size = storage.bytes
    has_activation = activation is not None
    coefficients = _coefficients(storage)

    @numba.njit(forceinline=True)
    def gradient(centred: Any, dy: Any, side: Any, has_side: Any, is_output: Any, scale: Any, shift: Any) -> Any:
        """g = dy · activation'(z), with z computed again, or its side taken from the output."""
        if not has_activation:
            return dy
        if is_output:
            return back(side, dy)
        z = fma(centred, scale, shift)
        if has_side:
            z = z + side
        return back(z, dy)

    @numba.njit(forceinline=True)
    def add_row(x: Any, dy: Any, side: Any, g: Any, inner: Any, slot: Any, is_output: Any) -> Any:
        high, scale, shift = splat(load_f64(slot + HIGH)), splat(load_f64(slot + SCALE)), splat(load_f64(slot + SHIFT))
        total, products = load_v64(slot), load_v64(slot + SUM)
        zero = splat(0.0)
        has_side = side != 0
        i = 0
        while i < inner:
            left = inner - i
            if left >= LANES:
                centred, value = load(x + i * size) - high, load(dy + i * size)
                beside = load(side + i * size) if has_side else zero
                value = gradient(centred, value, beside, has_side, is_output, scale, shift)
                if g != 0:
                    store(g + i * size, value)
            else:
                centred, value = load_first(x + i * size, left, high) - high, load_first(dy + i * size, left, zero)
                beside = load_first(side + i * size, left, zero) if has_side else zero
                value = gradient(centred, value, beside, has_side, is_output, scale, shift)
                if g != 0:
                    store_first(g + i * size, left, value)
            total = total + widen(value)
            products = fma(widen(value), widen(centred), products)
            i += LANES
        store_vector(slot, total)
        store_vector(slot + SUM, products)

    @numba.njit(forceinline=True)
    def sums(args: Any, slots: Any, first: Any, last: Any) -> Any:
        outer, group, inner = load_i64(args + at.OUTER * 8), load_i64(args + at.GROUP * 8), load_i64(args + at.INNER * 8)
        x, dy = load_i64(args + at.X * 8), load_i64(args + at.DY * 8)
        side, g = load_i64(args + at.SIDE * 8), load_i64(args + at.G * 8)
        is_output = load_i64(args + at.IS_OUTPUT * 8) != 0
        _clear(slots, last - first)
        for c in range(first, last):
            coefficients(args, slots + (c - first) * SLOT, c)
        for n in range(outer):
            for c in range(first, last):
                o = (n * group + c) * inner * size
                add_row(
                    x + o,
                    dy + o,
                    side + o if side != 0 else 0,
                    g + o if g != 0 else 0,
                    inner,
                    slots + (c - first) * SLOT,
                    is_output,
                )
        for c in range(first, last):
            slot = slots + (c - first) * SLOT
            rest, invstd = coefficients(args, slot, c)
            total = lanes_sum(load_v64(slot))
            products = lanes_sum(load_v64(slot + SUM)) - rest * total
            store_f64(load_i64(args + at.DBIAS * 8) + c * 8, total)
            store_f64(load_i64(args + at.DWEIGHT * 8) + c * 8, products * invstd)

    @numba.njit(forceinline=True)
    def write_row(
        x: Any, dy: Any, side: Any, g: Any, dx: Any, inner: Any, slot: Any, is_output: Any, streams: Any
    ) -> Any:
        high, scale, shift = splat(load_f64(slot + HIGH)), splat(load_f64(slot + SCALE)), splat(load_f64(slot + SHIFT))
        slope, centre = splat(load_f64(slot + BACK)), splat(load_f64(slot + CENTRE))
        zero = splat(0.0)
        has_side = side != 0
        i = 0
        head = min((-(dx // size)) % LANES, inner) if streams else 0
        while i < inner:
            left = inner - i
            step = LANES
            if left >= LANES and (i > 0 or head == 0):
                centred = load(x + i * size) - high
                if g != 0:
                    value = load(g + i * size)
                else:
                    value = load(dy + i * size)
                    beside = load(side + i * size) if has_side else zero
                    value = gradient(centred, value, beside, has_side, is_output, scale, shift)
                value = fma(centred, slope, fma(value, scale, centre))
                if streams:
                    stream(dx + i * size, value)
                else:
                    store(dx + i * size, value)
            else:
                if i == 0 and head > 0:
                    step = head
                else:
                    step = left
                centred = load_first(x + i * size, step, high) - high
                if g != 0:
                    value = load_first(g + i * size, step, zero)
                else:
                    value = load_first(dy + i * size, step, zero)
                    beside = load_first(side + i * size, step, zero) if has_side else zero
                    value = gradient(centred, value, beside, has_side, is_output, scale, shift)
                value = fma(centred, slope, fma(value, scale, centre))
                store_first(dx + i * size, step, value)
            i += step

    @numba.njit(forceinline=True)
    def back_coefficients(args: Any, slot: Any, c: Any) -> Any:
        """dx = (x − high) · slope + g · scale + centre."""
        rest, invstd = coefficients(args, slot, c)
        per_count = load_f64(args + at.PER_COUNT * 8)
        scale = load_f64(slot + SCALE)
        of_mean = load_f64(load_i64(args + at.DBIAS * 8) + c * 8) * per_count
        of_var = load_f64(load_i64(args + at.DWEIGHT * 8) + c * 8) * per_count * invstd
        store_f64(slot + BACK, -scale * of_var)
        store_f64(slot + CENTRE, scale * (rest * of_var - of_mean))

    @numba.njit(forceinline=True)
    def input_gradient(args: Any, slots: Any, first: Any, last: Any) -> Any:
        outer, group, inner = load_i64(args + at.OUTER * 8), load_i64(args + at.GROUP * 8), load_i64(args + at.INNER * 8)
        x, dy, dx = load_i64(args + at.X * 8), load_i64(args + at.DY * 8), load_i64(args + at.DX * 8)
        side, g = load_i64(args + at.SIDE * 8), load_i64(args + at.G * 8)
        is_output = load_i64(args + at.IS_OUTPUT * 8) != 0
        streams = load_i64(args + at.STREAMS * 8) != 0
        for c in range(first, last):
            back_coefficients(args, slots + (c - first) * SLOT, c)
        for n in range(outer):
            for c in range(first, last):
                o = (n * group + c) * inner * size
                write_row(
                    x + o,
                    dy + o,
                    side + o if side != 0 else 0,
                    g + o if g != 0 else 0,
                    dx + o,
                    inner,
                    slots + (c - first) * SLOT,
                    is_output,
                    streams,
                )

    def kernel(args: Any) -> Any:
        stages, block = load_i64(args + at.STAGES * 8), load_i64(args + at.BLOCK * 8)
        tasks, group = load_i64(args + at.TASKS * 8), load_i64(args + at.GROUP * 8)
        slots = load_i64(args + at.SCRATCH * 8) + next_ticket(args + at.WORKERS * 8) * block * SLOT
        task = next_ticket(args)
        while task < tasks:
            first = task * block
            last = min(first + block, group)
            if stages & SUMS:
                sums(args, slots, first, last)
            if stages & INPUT:
                input_gradient(args, slots, first, last)
            task = next_ticket(args)
        stores_fence()

    return kernel
