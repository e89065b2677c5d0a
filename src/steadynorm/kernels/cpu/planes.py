"""Kernels for memory in plain order, (outer, group, inner) with inner > 1: a group is a set of contiguous runs.

A task is a block of neighbouring groups, small enough that its second pass finds `x` in the cache: that is what makes
a whole forward or backward pass one trip to memory. The tasks are the same for any number of threads, and so are the
sums.

Values are taken less a pivot (a few values' mean going forward, the mean coming back), so that the square of a large
mean never enters. At most CHUNK of them are added in the arithmetic's precision, those sums in float64. Memory is read
in its own order, run after run; all that is kept of a group between its runs, sums and coefficients, is one line of
memory, its slot. A mean is taken off in two parts, `high` in the arithmetic's precision and the rest, so that an offset
costs no digits of the result.

The end of a run that does not fill a vector is done by a vector that ends with the run and overlaps the one before:
masked stores cost ten times as much on some processors. Runs shorter than a vector have to be masked.
"""

from functools import cache
from typing import Any

import numba

from steadynorm.kernels.cpu import activations
from steadynorm.kernels.cpu import arguments as at
from steadynorm.kernels.cpu.arguments import (
    INPUT,
    NORMALIZE,
    SLOT_BYTES,
    STATISTICS,
    SUMS,
)
from steadynorm.kernels.cpu.frontend import inlined
from steadynorm.kernels.cpu.simd import (
    LANES,
    Storage,
    first_lane,
    fma,
    keep_last,
    lanes_sum,
    load_f64,
    load_i64,
    next_ticket,
    parameter,
    smaller,
    square_root_of,
    store_f64,
    stores_fence,
    widen,
)
from steadynorm.kernels.cpu.sums import make_sums

TOTAL, OTHER, HIGH, SCALE, SHIFT, BACK, CENTRE = (8 * i for i in range(7))
"""Places in a slot: two float64 sums, then coefficients in the arithmetic's precision (HIGH holds the pivot first)."""

CHUNK = 32 * LANES
"""Values added in the arithmetic's precision before their sum goes into a float64 one: at most 32 terms a lane."""


@inlined
def _sizes(args: Any) -> Any:
    return load_i64(args + at.OUTER * 8), load_i64(args + at.GROUP * 8), load_i64(args + at.INNER * 8)


@inlined
def _add_to(slot: Any, total: Any, other: Any) -> Any:
    store_f64(slot + TOTAL, load_f64(slot + TOTAL) + lanes_sum(total))
    store_f64(slot + OTHER, load_f64(slot + OTHER) + lanes_sum(other))


@inlined
def _clear(slot: Any) -> Any:
    store_f64(slot + TOTAL, 0.0)
    store_f64(slot + OTHER, 0.0)


@cache
def _coefficients(storage: Storage) -> Any:
    is_double, keep = storage.is_double, storage.store_lane

    @inlined
    def coefficients(args: Any, slot: Any, c: Any) -> Any:
        """Keep high, scale and shift of z = (x − high) · scale + shift; return the rest of the mean, 1/σ and scale."""
        mean = load_f64(load_i64(args + at.MEAN * 8) + c * 8)
        var = load_f64(load_i64(args + at.VAR * 8) + c * 8)
        eps = load_f64(args + at.EPS * 8)
        weight = parameter(load_i64(args + at.WEIGHT * 8), load_i64(args + at.WEIGHT_BYTES * 8), c, 1.0)
        bias = parameter(load_i64(args + at.BIAS * 8), load_i64(args + at.BIAS_BYTES * 8), c, 0.0)
        high = mean if is_double else numba.float64(numba.float32(mean))
        invstd = 1.0 / square_root_of(var + eps)
        scale = weight * invstd
        keep(slot + HIGH, high)
        keep(slot + SCALE, scale)
        keep(slot + SHIFT, bias - (mean - high) * scale)
        return mean - high, invstd, scale

    return coefficients


def _over_tasks(run: Any) -> Any:
    """A kernel that runs `run(args, stages, slots, first group, last group)` over all tasks."""

    def kernel(args: Any) -> Any:
        stages, block = load_i64(args + at.STAGES * 8), load_i64(args + at.BLOCK * 8)
        tasks, group = load_i64(args + at.TASKS * 8), load_i64(args + at.GROUP * 8)
        slots = load_i64(args + at.SCRATCH * 8) + next_ticket(args + at.WORKERS * 8) * block * SLOT_BYTES
        task = next_ticket(args)
        while task < tasks:
            run(args, stages, slots, task * block, smaller(task * block + block, group))
            task = next_ticket(args)
        stores_fence()

    return kernel


@cache
def make_take(storage: Storage) -> Any:
    """How a vector is read that may be cut short."""
    load, load_first, splat = storage.load, storage.load_first, storage.splat

    @inlined
    def take(address: Any, n: Any) -> Any:
        """A vector, or its first `n` lanes and zeros."""
        if n == LANES:
            return load(address)
        return load_first(address, n, splat(0.0))

    return take


@cache
def _make_write(storage: Storage, factors_of: Any, value_at: Any) -> Any:
    """Write a block, each vector made by `value_at(operands, o, n, factors)`.

    `o` is the offset of a vector in bytes, `n` its number of valid lanes, `factors` the coefficients of its group,
    read from its slot once for a run: a compiler must assume that every store may change them. In place works: the
    last, overlapping vector of a run is made before any other is written. A line of memory is written either past the
    caches or through them: both cost more than either.
    """
    store, store_first, stream, size = storage.store, storage.store_first, storage.stream, storage.bytes

    @inlined
    def streamed(operands: Any, o: Any, out: Any, inner: Any, factors: Any) -> Any:
        i = smaller((-(out // size)) % LANES, inner)
        if i > 0:
            store_first(out, i, value_at(operands, o, i, factors))
        while i + LANES <= inner:
            stream(out + i * size, value_at(operands, o + i * size, LANES, factors))
            i += LANES
        if i < inner:
            store_first(out + i * size, inner - i, value_at(operands, o + i * size, inner - i, factors))

    @inlined
    def written(operands: Any, o: Any, out: Any, inner: Any, factors: Any) -> Any:
        whole = inner - inner % LANES
        if whole == inner:
            for i in range(0, inner, LANES):
                store(out + i * size, value_at(operands, o + i * size, LANES, factors))
        elif inner > LANES:
            last = value_at(operands, o + (inner - LANES) * size, LANES, factors)
            for i in range(0, whole, LANES):
                store(out + i * size, value_at(operands, o + i * size, LANES, factors))
            store(out + (inner - LANES) * size, last)
        else:
            store_first(out, inner, value_at(operands, o, inner, factors))

    @inlined
    def write(args: Any, operands: Any, out: Any, slots: Any, first: Any, last: Any) -> Any:
        outer, group, inner = _sizes(args)
        streams = load_i64(args + at.STREAMS * 8) != 0
        for n in range(outer):
            for c in range(first, last):
                o = (n * group + c) * inner * size
                factors = factors_of(slots + (c - first) * SLOT_BYTES)
                if streams:
                    streamed(operands, o, out + o, inner, factors)
                else:
                    written(operands, o, out + o, inner, factors)

    return write


def make_forward(storage: Storage, activation: str | None, has_residual: bool) -> Any:
    """The forward kernel: the stages STATISTICS and NORMALIZE, either or both."""
    statistics, normalize = _make_statistics(storage), _make_normalize(storage, activation, has_residual)

    @inlined
    def run(args: Any, stages: Any, slots: Any, first: Any, last: Any) -> Any:
        if stages & STATISTICS:
            statistics(args, slots, first, last)
        if stages & NORMALIZE:
            normalize(args, slots, first, last)

    return _over_tasks(run)


@cache
def _make_statistics(storage: Storage) -> Any:
    load, load_splat, size = storage.load, storage.load_splat, storage.bytes
    keep, lane, (_, about, _) = storage.store_lane, storage.load_lane, make_sums(storage)

    @inlined
    def pivot_of(row: Any, inner: Any) -> Any:
        """The mean of the first values: near enough to the group's that a square hardly loses digits to it."""
        if inner >= LANES:
            return lanes_sum(load(row)) / LANES
        return first_lane(widen(load_splat(row)))

    @inlined
    def statistics(args: Any, slots: Any, first: Any, last: Any) -> Any:
        outer, group, inner = _sizes(args)
        x = load_i64(args + at.X * 8)
        for c in range(first, last):
            slot = slots + (c - first) * SLOT_BYTES
            _clear(slot)
            keep(slot + HIGH, pivot_of(x + c * inner * size, inner))
        for n in range(outer):
            for c in range(first, last):
                row, slot = x + (n * group + c) * inner * size, slots + (c - first) * SLOT_BYTES
                pivot = lane(slot + HIGH)
                for start in range(0, inner, CHUNK):
                    total, squares = about(row, start, smaller(start + CHUNK, inner), inner, pivot)
                    _add_to(slot, total, squares)
        count = outer * inner
        for c in range(first, last):
            slot = slots + (c - first) * SLOT_BYTES
            shift = load_f64(slot + TOTAL) / count
            var = load_f64(slot + OTHER) / count - shift * shift
            if var < 0.0:
                var = 0.0
            store_f64(load_i64(args + at.MEAN * 8) + c * 8, first_lane(widen(lane(slot + HIGH))) + shift)
            store_f64(load_i64(args + at.VAR * 8) + c * 8, var)

    return statistics


@cache
def _make_normalize(storage: Storage, activation: str | None, has_residual: bool) -> Any:
    apply, _ = activations.make(storage, activation)
    coefficients, take, lane = _coefficients(storage), make_take(storage), storage.load_lane

    @inlined
    def factors_of(slot: Any) -> Any:
        return lane(slot + HIGH), lane(slot + SCALE), lane(slot + SHIFT)

    @inlined
    def value_at(operands: Any, o: Any, n: Any, factors: Any) -> Any:
        x, residual = operands
        high, scale, shift = factors
        z = fma(take(x + o, n) - high, scale, shift)
        if has_residual:
            z = z + take(residual + o, n)
        return apply(z)

    write = _make_write(storage, factors_of, value_at)

    @inlined
    def normalize(args: Any, slots: Any, first: Any, last: Any) -> Any:
        for c in range(first, last):
            coefficients(args, slots + (c - first) * SLOT_BYTES, c)
        operands = load_i64(args + at.X * 8), load_i64(args + at.RESIDUAL * 8)
        write(args, operands, load_i64(args + at.Y * 8), slots, first, last)

    return normalize


def make_backward(storage: Storage, activation: str | None, side: str, keeps_g: bool) -> Any:
    """The backward kernel: the stages SUMS and INPUT, either or both.

    Args:
        side: what tells where the derivative of the activation is taken beside x: "residual", "output", or "".
        keeps_g: whether g is written by SUMS and read by INPUT, instead of made twice.
    """
    gradient = make_gradient(storage, activation, side)
    sums, input_gradient = _make_sums(storage, gradient, keeps_g), _make_input(storage, gradient, keeps_g)

    @inlined
    def run(args: Any, stages: Any, slots: Any, first: Any, last: Any) -> Any:
        if stages & SUMS:
            sums(args, slots, first, last)
        if stages & INPUT:
            input_gradient(args, slots, first, last)

    return _over_tasks(run)


@inlined
def operands_of(args: Any) -> Any:
    """Addresses of x, dy, what stands beside, and g."""
    x, dy = load_i64(args + at.X * 8), load_i64(args + at.DY * 8)
    return x, dy, load_i64(args + at.SIDE * 8), load_i64(args + at.G * 8)


@cache
def make_gradient(storage: Storage, activation: str | None, side: str) -> Any:
    """How g is made: g = dy · activation'(z): z is computed again, or the output tells on which side it is."""
    _, back = activations.make(storage, activation)
    has_activation, has_residual, has_output = activation is not None, side == "residual", side == "output"
    take = make_take(storage)

    @inlined
    def gradient(operands: Any, o: Any, n: Any, centred: Any, scale: Any, shift: Any) -> Any:
        dy = take(operands[1] + o, n)
        if not has_activation:
            return dy
        if has_output:
            return back(take(operands[2] + o, n), dy)
        z = fma(centred, scale, shift)
        if has_residual:
            z = z + take(operands[2] + o, n)
        return back(z, dy)

    return gradient


@cache
def _make_sums(storage: Storage, gradient: Any, keeps_g: bool) -> Any:
    load, load_first, store, store_first = storage.load, storage.load_first, storage.store, storage.store_first
    splat, size, coefficients, lane = storage.splat, storage.bytes, _coefficients(storage), storage.load_lane

    @inlined
    def values_at(operands: Any, o: Any, factors: Any) -> Any:
        high, scale, shift = factors
        centred = load(operands[0] + o) - high
        return centred, gradient(operands, o, LANES, centred, scale, shift)

    @inlined
    def add_short(operands: Any, o: Any, inner: Any, factors: Any, slot: Any) -> Any:
        high, scale, shift = factors
        centred = load_first(operands[0] + o, inner, high) - high
        value = gradient(operands, o, inner, centred, scale, shift)
        if keeps_g:
            store_first(operands[3] + o, inner, value)
        _add_to(slot, value, value * centred)

    @inlined
    def add(operands: Any, o: Any, start: Any, stop: Any, inner: Any, factors: Any, slot: Any) -> Any:
        total = products = last_centred = last = splat(0.0)
        at_last = o + (inner - LANES) * size
        if keeps_g and inner % LANES != 0:
            # The overlapping end is read before anything is written near it: a load just behind a store to the same
            # place of another page waits for it.
            last_centred, last = values_at(operands, at_last, factors)
        i = start
        while i + LANES <= stop:
            centred, value = values_at(operands, o + i * size, factors)
            if keeps_g:
                store(operands[3] + o + i * size, value)
            total, products = total + value, fma(value, centred, products)
            i += LANES
        if i < stop:
            if keeps_g:
                store(operands[3] + at_last, last)
            else:
                last_centred, last = values_at(operands, at_last, factors)
            value = keep_last(last, stop - i)
            total, products = total + value, fma(value, keep_last(last_centred, stop - i), products)
        _add_to(slot, total, products)

    @inlined
    def sums(args: Any, slots: Any, first: Any, last: Any) -> Any:
        outer, group, inner = _sizes(args)
        operands = operands_of(args)
        for c in range(first, last):
            slot = slots + (c - first) * SLOT_BYTES
            _clear(slot)
            coefficients(args, slot, c)
        for n in range(outer):
            for c in range(first, last):
                o, slot = (n * group + c) * inner * size, slots + (c - first) * SLOT_BYTES
                factors = lane(slot + HIGH), lane(slot + SCALE), lane(slot + SHIFT)
                if inner < LANES:
                    add_short(operands, o, inner, factors, slot)
                else:
                    for start in range(0, inner, CHUNK):
                        add(operands, o, start, smaller(start + CHUNK, inner), inner, factors, slot)
        for c in range(first, last):
            slot = slots + (c - first) * SLOT_BYTES
            rest_of_mean, invstd, _ = coefficients(args, slot, c)
            total = load_f64(slot + TOTAL)
            products = load_f64(slot + OTHER) - rest_of_mean * total
            store_f64(load_i64(args + at.DBIAS * 8) + c * 8, total)
            store_f64(load_i64(args + at.DWEIGHT * 8) + c * 8, products * invstd)

    return sums


@cache
def _make_input(storage: Storage, gradient: Any, keeps_g: bool) -> Any:
    coefficients, take = _coefficients(storage), make_take(storage)
    keep, lane = storage.store_lane, storage.load_lane

    @inlined
    def back_coefficients(args: Any, slot: Any, c: Any) -> Any:
        """dx = (x − high) · slope + g · scale + centre."""
        rest, invstd, scale = coefficients(args, slot, c)
        per_count, of_mean, of_var = load_f64(args + at.PER_COUNT * 8), 0.0, 0.0
        if per_count != 0.0:  # else zero, even of sums that are not finite
            of_mean = load_f64(load_i64(args + at.DBIAS * 8) + c * 8) * per_count
            of_var = load_f64(load_i64(args + at.DWEIGHT * 8) + c * 8) * per_count * invstd
        keep(slot + BACK, -scale * of_var)
        keep(slot + CENTRE, scale * (rest * of_var - of_mean))

    @inlined
    def factors_of(slot: Any) -> Any:
        high, scale, shift = lane(slot + HIGH), lane(slot + SCALE), lane(slot + SHIFT)
        return high, scale, shift, lane(slot + BACK), lane(slot + CENTRE)

    @inlined
    def value_at(operands: Any, o: Any, n: Any, factors: Any) -> Any:
        high, scale, shift, slope, centre = factors
        centred = take(operands[0] + o, n) - high
        value = take(operands[3] + o, n) if keeps_g else gradient(operands, o, n, centred, scale, shift)
        return fma(centred, slope, fma(value, scale, centre))

    write = _make_write(storage, factors_of, value_at)

    @inlined
    def input_gradient(args: Any, slots: Any, first: Any, last: Any) -> Any:
        for c in range(first, last):
            back_coefficients(args, slots + (c - first) * SLOT_BYTES, c)
        write(args, operands_of(args), load_i64(args + at.DX * 8), slots, first, last)

    return input_gradient
