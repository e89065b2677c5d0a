"""Kernels for memory in plain order, (outer, group, inner) with inner > 1: a group is a set of contiguous runs.

A task is a block of neighbouring groups, small enough that its second pass finds `x` in the cache: that is what makes
a whole forward or backward pass one trip to memory. The tasks are the same for any number of threads, and so are the
sums.

Values are taken less a pivot (the group's first value going forward, its mean coming back), so that the square of a
large mean never enters; at most CHUNK of them are added in the arithmetic's precision ("narrow"), those sums in
float64 ("wide"). Memory is read in its own order, run after run: short runs leave their sums in narrow slots, which
stay in the first cache. A mean is taken off in two parts, `high` in the arithmetic's precision and the rest, so that
an offset costs no digits of the result.

The end of a run that does not fill a vector is done by a vector that ends with the run and overlaps the one before:
masked stores cost ten times as much on some processors. Runs shorter than a vector have to be masked.
"""

from typing import Any

import numba

from steadynorm.kernels.cpu import activations
from steadynorm.kernels.cpu import arguments as at
from steadynorm.kernels.cpu.arguments import (
    COEFFICIENTS_BYTES,
    GROUP_BYTES,
    INPUT,
    NORMALIZE,
    STATISTICS,
    SUMS,
    SUMS_BYTES,
)
from steadynorm.kernels.cpu.simd import (
    LANES,
    Storage,
    first_lane,
    fma,
    inlined,
    keep_last,
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

SUM = SUMS_BYTES // 2
HIGH, SCALE, SHIFT, BACK, CENTRE = (8 * i for i in range(5))

CHUNK = 64 * LANES
"""Values added in the arithmetic's precision before the sums are widened: 32 terms a lane in each of two chains."""


@inlined
def _sizes(args: Any) -> Any:
    return load_i64(args + at.OUTER * 8), load_i64(args + at.GROUP * 8), load_i64(args + at.INNER * 8)


@inlined
def _add_to(wide: Any, total: Any, other: Any) -> Any:
    store_vector(wide, load_v64(wide) + widen(total))
    store_vector(wide + SUM, load_v64(wide + SUM) + widen(other))


@inlined
def _clear(narrow: Any, wide: Any, groups: Any) -> Any:
    """Zero bytes are zero in either precision."""
    for o in range(0, groups * SUMS_BYTES, SUM):
        store_vector(narrow + o, splat64(0.0))
        store_vector(wide + o, splat64(0.0))


def _make_flush(storage: Storage) -> Any:
    """Add the narrow sums of all groups of a block to the wide ones, and start them again from zero."""
    load_lanes, splat = storage.load_lanes, storage.splat

    @inlined
    def flush(narrow: Any, wide: Any, groups: Any) -> Any:
        for o in range(0, groups * SUMS_BYTES, SUMS_BYTES):
            _add_to(wide + o, load_lanes(narrow + o), load_lanes(narrow + o + SUM))
            store_vector(narrow + o, splat(0.0))
            store_vector(narrow + o + SUM, splat(0.0))

    return flush


@inlined
def _runs_between_flushes(inner: Any) -> Any:
    return max(1, CHUNK // (inner + LANES))


def _coefficients(storage: Storage) -> Any:
    is_double = storage.is_double

    @inlined
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


def _over_tasks(run: Any) -> Any:
    """A kernel that runs `run(args, stages, narrow, wide, coefficients, first group, last group)` over all tasks."""

    def kernel(args: Any) -> Any:
        stages, block = load_i64(args + at.STAGES * 8), load_i64(args + at.BLOCK * 8)
        tasks, group = load_i64(args + at.TASKS * 8), load_i64(args + at.GROUP * 8)
        narrow = load_i64(args + at.SCRATCH * 8) + next_ticket(args + at.WORKERS * 8) * block * GROUP_BYTES
        wide = narrow + block * SUMS_BYTES
        coefficients = wide + block * SUMS_BYTES
        task = next_ticket(args)
        while task < tasks:
            run(args, stages, narrow, wide, coefficients, task * block, min(task * block + block, group))
            task = next_ticket(args)
        stores_fence()

    return kernel


def _write_run(storage: Storage, value_at: Any) -> Any:
    """Write a run of `inner` values, each vector made by `value_at(at, i, n, factors)` from element `i` on.

    `n` is the number of valid lanes; `factors` are the group's coefficients as vectors, read once for the run, since a
    compiler must assume that every store may change them. In place works: the last, overlapping vector is made before
    any other is written. `streams` needs an output that nothing is read from.
    """
    store, store_first, stream, size = storage.store, storage.store_first, storage.stream, storage.bytes

    @inlined
    def write_run(at_run: Any, out: Any, inner: Any, factors: Any, streams: Any) -> Any:
        if inner < LANES:
            store_first(out, inner, value_at(at_run, 0, inner, factors))
            return
        last = value_at(at_run, inner - LANES, LANES, factors)
        i = 0
        if streams:
            store(out, value_at(at_run, 0, LANES, factors))
            i = (-(out // size)) % LANES
            while i + LANES <= inner:
                stream(out + i * size, value_at(at_run, i, LANES, factors))
                i += LANES
        else:
            while i + LANES <= inner:
                store(out + i * size, value_at(at_run, i, LANES, factors))
                i += LANES
        store(out + (inner - LANES) * size, last)

    return write_run


def make_forward(storage: Storage, activation: str | None) -> Any:
    """The forward kernel: the stages STATISTICS and NORMALIZE, either or both."""
    statistics, normalize = _make_statistics(storage), _make_normalize(storage, activation)

    @inlined
    def run(args: Any, stages: Any, narrow: Any, wide: Any, slots: Any, first: Any, last: Any) -> Any:
        if stages & STATISTICS:
            statistics(args, narrow, wide, first, last)
        if stages & NORMALIZE:
            normalize(args, slots, first, last)

    return _over_tasks(run)


def _make_statistics(storage: Storage) -> Any:
    load, load_first, load_splat = storage.load, storage.load_first, storage.load_splat
    size, splat, load_lanes, flush = storage.bytes, storage.splat, storage.load_lanes, _make_flush(storage)

    @inlined
    def add(row: Any, start: Any, stop: Any, inner: Any, pivot: Any, s0: Any, q0: Any, s1: Any, q1: Any) -> Any:
        i = start
        while i + 2 * LANES <= stop:
            a, b = load(row + i * size) - pivot, load(row + (i + LANES) * size) - pivot
            s0, s1 = s0 + a, s1 + b
            q0, q1 = fma(a, a, q0), fma(b, b, q1)
            i += 2 * LANES
        if i + LANES <= stop:
            a = load(row + i * size) - pivot
            s0, q0 = s0 + a, fma(a, a, q0)
            i += LANES
        if i < stop:
            if inner >= LANES:
                b = keep_last(load(row + (inner - LANES) * size) - pivot, stop - i)
            else:
                b = load_first(row, inner, pivot) - pivot
            s1, q1 = s1 + b, fma(b, b, q1)
        return s0, q0, s1, q1

    @inlined
    def statistics(args: Any, narrow: Any, wide: Any, first: Any, last: Any) -> Any:
        outer, group, inner = _sizes(args)
        x = load_i64(args + at.X * 8)
        between = _runs_between_flushes(inner)
        zero = splat(0.0)
        _clear(narrow, wide, last - first)
        for n in range(outer):
            for c in range(first, last):
                row = x + (n * group + c) * inner * size
                pivot = load_splat(x + c * inner * size)
                slot = (c - first) * SUMS_BYTES
                if inner <= CHUNK:
                    s0, q0, s1, q1 = add(row, 0, inner, inner, pivot, zero, zero, zero, zero)
                    store_vector(narrow + slot, load_lanes(narrow + slot) + (s0 + s1))
                    store_vector(narrow + slot + SUM, load_lanes(narrow + slot + SUM) + (q0 + q1))
                else:
                    for start in range(0, inner, CHUNK):
                        stop = min(start + CHUNK, inner)
                        s0, q0, s1, q1 = add(row, start, stop, inner, pivot, zero, zero, zero, zero)
                        _add_to(wide + slot, s0 + s1, q0 + q1)
            if n % between == between - 1:
                flush(narrow, wide, last - first)
        flush(narrow, wide, last - first)
        count = outer * inner
        for c in range(first, last):
            slot = wide + (c - first) * SUMS_BYTES
            shift = lanes_sum(load_v64(slot)) / count
            var = lanes_sum(load_v64(slot + SUM)) / count - shift * shift
            if var < 0.0:
                var = 0.0
            pivot = first_lane(widen(load_splat(x + c * inner * size)))
            store_f64(load_i64(args + at.MEAN * 8) + c * 8, pivot + shift)
            store_f64(load_i64(args + at.VAR * 8) + c * 8, var)

    return statistics


def _make_normalize(storage: Storage, activation: str | None) -> Any:
    apply, _ = activations.make(storage, activation)
    load, load_first, splat, size = storage.load, storage.load_first, storage.splat, storage.bytes
    coefficients = _coefficients(storage)

    @inlined
    def value_at(at_run: Any, i: Any, n: Any, factors: Any) -> Any:
        x, residual = at_run
        high, scale, shift = factors
        if n == LANES:
            z = fma(load(x + i * size) - high, scale, shift)
            if residual != 0:
                z = z + load(residual + i * size)
        else:
            z = fma(load_first(x, n, high) - high, scale, shift)
            if residual != 0:
                z = z + load_first(residual, n, high)
        return apply(z)

    write_run = _write_run(storage, value_at)

    @inlined
    def normalize(args: Any, slots: Any, first: Any, last: Any) -> Any:
        outer, group, inner = _sizes(args)
        x, y, residual = load_i64(args + at.X * 8), load_i64(args + at.Y * 8), load_i64(args + at.RESIDUAL * 8)
        streams = load_i64(args + at.STREAMS * 8) != 0
        for c in range(first, last):
            coefficients(args, slots + (c - first) * COEFFICIENTS_BYTES, c)
        for n in range(outer):
            for c in range(first, last):
                o = (n * group + c) * inner * size
                beside = residual + o if residual != 0 else 0
                slot = slots + (c - first) * COEFFICIENTS_BYTES
                factors = splat(load_f64(slot + HIGH)), splat(load_f64(slot + SCALE)), splat(load_f64(slot + SHIFT))
                write_run((x + o, beside), y + o, inner, factors, streams)

    return normalize


def make_backward(storage: Storage, activation: str | None) -> Any:
    """The backward kernel: the stages SUMS and INPUT, either or both."""
    gradient = _make_gradient(storage, activation)
    sums, input_gradient = _make_sums(storage, gradient), _make_input(storage, gradient)

    @inlined
    def run(args: Any, stages: Any, narrow: Any, wide: Any, slots: Any, first: Any, last: Any) -> Any:
        if stages & SUMS:
            sums(args, narrow, wide, slots, first, last)
        if stages & INPUT:
            input_gradient(args, slots, first, last)

    return _over_tasks(run)


def _make_gradient(storage: Storage, activation: str | None) -> Any:
    """g = dy · activation'(z): z is computed again, or the output tells on which side it is."""
    _, back = activations.make(storage, activation)
    has_activation = activation is not None

    @inlined
    def gradient(centred: Any, dy: Any, side: Any, is_output: Any, scale: Any, shift: Any) -> Any:
        if not has_activation:
            return dy
        if is_output:
            return back(side, dy)
        return back(fma(centred, scale, shift) + side, dy)

    return gradient


def _make_sums(storage: Storage, gradient: Any) -> Any:
    load, load_first = storage.load, storage.load_first
    store, store_first, splat, size = storage.store, storage.store_first, storage.splat, storage.bytes
    coefficients, load_lanes, flush = _coefficients(storage), storage.load_lanes, _make_flush(storage)

    @inlined
    def values_at(at_run: Any, i: Any, is_output: Any, factors: Any) -> Any:
        x, dy, side, _ = at_run
        high, scale, shift = factors
        centred = load(x + i * size) - high
        beside = load(side + i * size) if side != 0 else splat(0.0)
        return centred, gradient(centred, load(dy + i * size), beside, is_output, scale, shift)

    @inlined
    def short_run(at_run: Any, inner: Any, is_output: Any, factors: Any) -> Any:
        x, dy, side, g = at_run
        high, scale, shift = factors
        zero = splat(0.0)
        centred = load_first(x, inner, high) - high
        beside = load_first(side, inner, zero) if side != 0 else zero
        value = gradient(centred, load_first(dy, inner, zero), beside, is_output, scale, shift)
        if g != 0:
            store_first(g, inner, value)
        return centred, value

    @inlined
    def add(
        at_run: Any, start: Any, stop: Any, inner: Any, is_output: Any, factors: Any, s0: Any, p0: Any, s1: Any, p1: Any
    ) -> Any:
        if inner < LANES:
            centred, value = short_run(at_run, inner, is_output, factors)
            return s0 + value, fma(value, centred, p0), s1, p1
        g = at_run[3]
        # The overlapping end is read before anything is written near it: a load just behind a store to the same
        # place of another page waits for it.
        last_centred, last_value = values_at(at_run, inner - LANES, is_output, factors)
        i = start
        while i + 2 * LANES <= stop:
            centred, value = values_at(at_run, i, is_output, factors)
            other_centred, other = values_at(at_run, i + LANES, is_output, factors)
            if g != 0:
                store(g + i * size, value)
                store(g + (i + LANES) * size, other)
            s0, p0 = s0 + value, fma(value, centred, p0)
            s1, p1 = s1 + other, fma(other, other_centred, p1)
            i += 2 * LANES
        if i + LANES <= stop:
            centred, value = values_at(at_run, i, is_output, factors)
            if g != 0:
                store(g + i * size, value)
            s0, p0 = s0 + value, fma(value, centred, p0)
            i += LANES
        if i < stop:
            if g != 0:
                store(g + (inner - LANES) * size, last_value)
            value = keep_last(last_value, stop - i)
            s1, p1 = s1 + value, fma(value, keep_last(last_centred, stop - i), p1)
        return s0, p0, s1, p1

    @inlined
    def sums(args: Any, narrow: Any, wide: Any, slots: Any, first: Any, last: Any) -> Any:
        outer, group, inner = _sizes(args)
        x, dy = load_i64(args + at.X * 8), load_i64(args + at.DY * 8)
        side, g = load_i64(args + at.SIDE * 8), load_i64(args + at.G * 8)
        is_output = load_i64(args + at.IS_OUTPUT * 8) != 0
        between = _runs_between_flushes(inner)
        zero = splat(0.0)
        _clear(narrow, wide, last - first)
        for c in range(first, last):
            coefficients(args, slots + (c - first) * COEFFICIENTS_BYTES, c)
        for n in range(outer):
            for c in range(first, last):
                o = (n * group + c) * inner * size
                at_run = (x + o, dy + o, side + o if side != 0 else 0, g + o if g != 0 else 0)
                slot, kept = (c - first) * SUMS_BYTES, slots + (c - first) * COEFFICIENTS_BYTES
                factors = splat(load_f64(kept + HIGH)), splat(load_f64(kept + SCALE)), splat(load_f64(kept + SHIFT))
                if inner <= CHUNK:
                    s0, p0, s1, p1 = add(at_run, 0, inner, inner, is_output, factors, zero, zero, zero, zero)
                    store_vector(narrow + slot, load_lanes(narrow + slot) + (s0 + s1))
                    store_vector(narrow + slot + SUM, load_lanes(narrow + slot + SUM) + (p0 + p1))
                else:
                    for start in range(0, inner, CHUNK):
                        stop = min(start + CHUNK, inner)
                        s0, p0, s1, p1 = add(at_run, start, stop, inner, is_output, factors, zero, zero, zero, zero)
                        _add_to(wide + slot, s0 + s1, p0 + p1)
            if n % between == between - 1:
                flush(narrow, wide, last - first)
        flush(narrow, wide, last - first)
        for c in range(first, last):
            slot = wide + (c - first) * SUMS_BYTES
            rest_of_mean, invstd = coefficients(args, slots + (c - first) * COEFFICIENTS_BYTES, c)
            total = lanes_sum(load_v64(slot))
            products = lanes_sum(load_v64(slot + SUM)) - rest_of_mean * total
            store_f64(load_i64(args + at.DBIAS * 8) + c * 8, total)
            store_f64(load_i64(args + at.DWEIGHT * 8) + c * 8, products * invstd)

    return sums


def _make_input(storage: Storage, gradient: Any) -> Any:
    load, load_first, splat, size = storage.load, storage.load_first, storage.splat, storage.bytes
    coefficients = _coefficients(storage)

    @inlined
    def back_coefficients(args: Any, slot: Any, c: Any) -> Any:
        """dx = (x − high) · slope + g · scale + centre."""
        rest, invstd = coefficients(args, slot, c)
        per_count = load_f64(args + at.PER_COUNT * 8)
        scale = load_f64(slot + SCALE)
        of_mean = load_f64(load_i64(args + at.DBIAS * 8) + c * 8) * per_count
        of_var = load_f64(load_i64(args + at.DWEIGHT * 8) + c * 8) * per_count * invstd
        store_f64(slot + BACK, -scale * of_var)
        store_f64(slot + CENTRE, scale * (rest * of_var - of_mean))

    @inlined
    def value_at(at_run: Any, i: Any, n: Any, factors: Any) -> Any:
        x, dy, side, g, is_output = at_run
        high, scale, shift, slope, centre = factors
        zero, o = splat(0.0), i * size
        if n == LANES:
            centred = load(x + o) - high
            if g != 0:
                value = load(g + o)
            else:
                beside = load(side + o) if side != 0 else zero
                value = gradient(centred, load(dy + o), beside, is_output, scale, shift)
        else:
            centred = load_first(x, n, high) - high
            if g != 0:
                value = load_first(g, n, zero)
            else:
                beside = load_first(side, n, zero) if side != 0 else zero
                value = gradient(centred, load_first(dy, n, zero), beside, is_output, scale, shift)
        return fma(centred, slope, fma(value, scale, centre))

    @inlined
    def factors_of(slot: Any) -> Any:
        high, scale, shift = splat(load_f64(slot + HIGH)), splat(load_f64(slot + SCALE)), splat(load_f64(slot + SHIFT))
        return high, scale, shift, splat(load_f64(slot + BACK)), splat(load_f64(slot + CENTRE))

    write_run = _write_run(storage, value_at)

    @inlined
    def input_gradient(args: Any, slots: Any, first: Any, last: Any) -> Any:
        outer, group, inner = _sizes(args)
        x, dy, dx = load_i64(args + at.X * 8), load_i64(args + at.DY * 8), load_i64(args + at.DX * 8)
        side, g = load_i64(args + at.SIDE * 8), load_i64(args + at.G * 8)
        is_output = load_i64(args + at.IS_OUTPUT * 8) != 0
        streams = load_i64(args + at.STREAMS * 8) != 0
        for c in range(first, last):
            back_coefficients(args, slots + (c - first) * COEFFICIENTS_BYTES, c)
        for n in range(outer):
            for c in range(first, last):
                o = (n * group + c) * inner * size
                at_run = (x + o, dy + o, side + o if side != 0 else 0, g + o if g != 0 else 0, is_output)
                write_run(at_run, dx + o, inner, factors_of(slots + (c - first) * COEFFICIENTS_BYTES), streams)

    return input_gradient
