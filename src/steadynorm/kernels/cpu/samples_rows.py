"""Statistics of rows, with a weight that runs along the row: LayerNorm and RMSNorm, and GroupNorm of (N, C).

A row is swept while it is in the first caches: forward for its statistics and for its output, backward for its sums
and for its gradient. Meanwhile a later row is asked for: back x in the first sweep and dy in the second, since memory
answers a limited number of requests at a time. Sums of the weight's gradient are kept as one narrow row beside it,
widened every FLUSH rows. A task is a block of rows that does not depend on the number of threads, and neither do its
sums.
"""

from functools import cache
from typing import Any

import numba

from steadynorm.kernels.cpu import activations
from steadynorm.kernels.cpu import samples as at
from steadynorm.kernels.cpu.frontend import inlined
from steadynorm.kernels.cpu.samples import (
    make_add,
    make_prepare,
    make_run_moments,
    make_write,
    make_zero,
    over_tasks,
    place,
)
from steadynorm.kernels.cpu.simd import (
    LANES,
    Storage,
    fma,
    keep_last,
    lanes_sum,
    larger,
    load_f32,
    load_f64,
    load_v64,
    prefetch,
    smaller,
    square_root_of,
    store_f64,
    store_vector,
    widen,
)

FLUSH = 16
"""Rows whose gradients of the weight are added in the arithmetic's precision before the sums are widened."""
CHUNK = 64 * LANES
"""Values of a row added in the arithmetic's precision: 32 terms a lane in each of two chains."""
AHEAD = 1 << 11
"""Bytes that are asked for ahead, at least: of shorter rows the next one comes too soon, which cost a tenth."""
APART = 5 * 64
"""Bytes between narrow rows: at a distance of whole pages a load waits for a store to the same place of another."""


@cache
def _make_mean_of(storage: Storage) -> Any:
    """The mean as far as the arithmetic's precision goes, and the rest of it."""
    is_double = storage.is_double

    @inlined
    def parts_of(mean: Any) -> Any:
        high = mean if is_double else numba.float64(numba.float32(mean))
        return high, high - mean

    return parts_of


def make_forward(storage: Storage, activation: str | None) -> Any:
    """x̂ = (x − high) · invstd + rest; y = activation(x̂ · weight + bias + residual)."""
    apply, _ = activations.make(storage, activation)
    moments, add, zero = make_run_moments(storage), make_add(storage), make_zero(storage)
    prepare = make_prepare(storage)
    parts_of = _make_mean_of(storage)
    load, load_first, load_lanes = storage.load, storage.load_first, storage.load_lanes
    splat, size, lane = storage.splat, storage.bytes, storage.lane_bytes

    @inlined
    def value_at(run: Any, i: Any, n: Any, factors: Any) -> Any:
        x, residual, weights, biases, following = run
        high, invstd, rest = factors
        if n == LANES:
            prefetch(following + i * size)
            z, weight = fma(load(x + i * size) - high, invstd, rest), load_lanes(weights + i * lane)
            z = fma(z, weight, load_lanes(biases + i * lane)) if biases != 0 else z * weight
            if residual != 0:
                z = z + load(residual + i * size)
        else:
            z, weight = fma(load_first(x, n, high) - high, invstd, rest), load_lanes(weights)
            z = fma(z, weight, load_lanes(biases)) if biases != 0 else z * weight
            if residual != 0:
                z = z + load_first(residual, n, high)
        return apply(z)

    write = make_write(storage, value_at)

    @inlined
    def begin(args: Any, scratch: Any) -> Any:
        return prepare(args, scratch, place(args, at.REPEATED))

    @inlined
    def task(args: Any, task: Any, scratch: Any, common: Any) -> Any:
        weights, biases = common
        groups, n = place(args, at.GROUPS), place(args, at.CHANNELS) * place(args, at.REPEATED)
        x, addend, total = place(args, at.X), place(args, at.ADDEND), place(args, at.TOTAL)
        y, residual, mask = place(args, at.Y), place(args, at.RESIDUAL), place(args, at.MASK)
        means, variances = place(args, at.MEAN), place(args, at.VAR)
        streams, is_centred = place(args, at.STREAMS) != 0, place(args, at.IS_CENTRED) != 0
        eps, block = load_f64(args + at.EPS * 8), place(args, at.BLOCK) * groups
        group, per_count, ahead = 0, 1.0 / n, larger(n * size, AHEAD)
        for r in range(task * block, smaller((task + 1) * block, place(args, at.SAMPLES) * groups)):
            o = r * n * size
            row = x + o
            if total != 0:
                add(x + o, addend + o, total + o, n)
                row = total + o
            if mask != 0 and at.load_bool(mask + r // groups) == 0:
                store_f64(means + r * 8, 0.0)
                store_f64(variances + r * 8, 0.0)
                zero(y + o, n)
            else:
                mean, var = moments(row, n, per_count, is_centred)
                store_f64(means + r * 8, mean)
                store_f64(variances + r * 8, var)
                invstd = 1.0 / square_root_of(var + eps)
                high, rest = parts_of(mean)
                factors = splat(high), splat(invstd), splat(rest * invstd)
                beside = residual + o if residual != 0 else 0
                first = group * n * lane
                run = row, beside, weights + first, biases + first if biases != 0 else 0, x + o + ahead
                write(run, y + o, n, factors, streams)
            group += 1
            if group == groups:
                group = 0

    return over_tasks((begin, task))


@cache
def make_gradient(storage: Storage, activation: str | None) -> Any:
    """g = dy · activation'(z): z is computed again, or the output tells on which side it is."""
    _, back = activations.make(storage, activation)
    has_activation = activation is not None

    @inlined
    def gradient(normalized: Any, dy: Any, weight: Any, bias: Any, side: Any, is_output: Any) -> Any:
        if not has_activation:
            return dy
        if is_output:
            return back(side, dy)
        return back(fma(normalized, weight, bias) + side, dy)

    return gradient


def make_backward(storage: Storage, activation: str | None) -> Any:
    """h = g · weight; dx = (h − mean(h) − x̂ · mean(h·x̂)) · invstd + dtotal, the first mean only where it is centred."""
    prepare, zero = make_prepare(storage), make_zero(storage)
    parts_of, sums, (clear, flush) = _make_mean_of(storage), _make_sums(storage, activation), make_narrow(storage)
    write = make_write(storage, _make_input(storage, activation))
    splat, size, lane = storage.splat, storage.bytes, storage.lane_bytes

    @inlined
    def begin(args: Any, scratch: Any) -> Any:
        repeated = place(args, at.REPEATED)
        width = place(args, at.GROUPS) * place(args, at.CHANNELS) * repeated
        narrow = scratch + 2 * (width + LANES) * lane
        weights, biases = prepare(args, scratch, repeated)
        return weights, biases, narrow, narrow + (width + LANES) * lane + APART

    @inlined
    def task(args: Any, task: Any, scratch: Any, common: Any) -> Any:
        weights, biases, products, totals = common
        groups, n = place(args, at.GROUPS), place(args, at.CHANNELS) * place(args, at.REPEATED)
        x, dy, dx, side = place(args, at.X), place(args, at.DY), place(args, at.DX), place(args, at.SIDE)
        g, dtotal, mask = place(args, at.G), place(args, at.DTOTAL), place(args, at.MASK)
        means, variances = place(args, at.MEAN), place(args, at.VAR)
        is_output, streams = place(args, at.IS_OUTPUT) != 0, place(args, at.STREAMS) != 0
        is_centred, needs_affine = place(args, at.IS_CENTRED) != 0, place(args, at.NEEDS_AFFINE) != 0
        eps, block = load_f64(args + at.EPS * 8), place(args, at.BLOCK) * groups
        width, per_count, ahead = groups * n, 1.0 / n, larger(n * size, AHEAD)
        wide_products = place(args, at.PRODUCTS) + task * width * 8
        wide_totals = place(args, at.TOTALS) + task * width * 8
        if needs_affine:
            clear(products, wide_products, width)
            clear(totals, wide_totals, width)
        group = done = 0
        for r in range(task * block, smaller((task + 1) * block, place(args, at.SAMPLES) * groups)):
            o = r * n * size
            if mask != 0 and at.load_bool(mask + r // groups) == 0:
                zero(dx + o, n)
                if g != 0:
                    zero(g + o, n)
            else:
                high, rest = parts_of(load_f64(means + r * 8))
                invstd = 1.0 / square_root_of(load_f64(variances + r * 8) + eps)
                first = group * n * lane
                run = (
                    x + o,
                    dy + o,
                    side + o if side != 0 else 0,
                    g + o if g != 0 else 0,
                    weights + first,
                    biases + first if biases != 0 else 0,
                    dtotal + o if dtotal != 0 else 0,
                )
                factors = splat(high), splat(invstd), splat(rest * invstd)
                given = factors, is_output, ahead
                total, product = sums(run, n, given, products + first, totals + first, needs_affine)
                product = product * per_count
                total = total * per_count if is_centred else 0.0
                more = splat(-product), splat(total)
                write(run, dx + o, n, (given, more), streams)
            done += 1
            if done == FLUSH and needs_affine:
                flush(products, wide_products, width)
                flush(totals, wide_totals, width)
                done = 0
            group += 1
            if group == groups:
                group = 0
        if needs_affine:
            flush(products, wide_products, width)
            flush(totals, wide_totals, width)

    return over_tasks((begin, task))


@cache
def _make_sums(storage: Storage, activation: str | None) -> Any:
    """The first sweep back: Σ h and Σ h·x̂ of a row; g·x̂ and g added to the narrow rows, g kept where asked for."""
    load, load_first, load_lanes = storage.load, storage.load_first, storage.load_lanes
    store, store_first, splat = storage.store, storage.store_first, storage.splat
    size, lane, gradient = storage.bytes, storage.lane_bytes, make_gradient(storage, activation)

    @inlined
    def values_at(run: Any, i: Any, n: Any, given: Any) -> Any:
        """x̂ and g of a vector, zero in the lanes after the first `n`, and the weight."""
        x, dy, side, _, weights, biases, _ = run
        (high, invstd, rest), is_output, ahead = given
        o, zero = i * size, splat(0.0)
        weight = load_lanes(weights + i * lane)
        bias = load_lanes(biases + i * lane) if biases != 0 else zero
        if n == LANES:
            prefetch(x + ahead + o)
            normalized = fma(load(x + o) - high, invstd, rest)
            beside = load(side + o) if side != 0 else zero
            value = gradient(normalized, load(dy + o), weight, bias, beside, is_output)
        else:
            normalized = fma(load_first(x + o, n, high) - high, invstd, rest)
            beside = load_first(side + o, n, zero) if side != 0 else zero
            value = gradient(normalized, load_first(dy + o, n, zero), weight, bias, beside, is_output)
        return normalized, value, weight

    @inlined
    def gather(products: Any, totals: Any, i: Any, normalized: Any, value: Any) -> Any:
        store_vector(products + i * lane, fma(value, normalized, load_lanes(products + i * lane)))
        store_vector(totals + i * lane, load_lanes(totals + i * lane) + value)

    @inlined
    def sums(run: Any, n: Any, given: Any, products: Any, totals: Any, needs_affine: Any) -> Any:
        g = run[3]
        total = product = 0.0
        whole = n // LANES * LANES
        s0 = p0 = splat(0.0)
        # The end is read before anything is written near it, for g may be kept where it is read.
        if whole == n:
            last, last_value, last_weight = splat(0.0), splat(0.0), splat(0.0)
        elif n < LANES:
            last, last_value, last_weight = values_at(run, 0, n, given)
        else:
            last, last_value, last_weight = values_at(run, n - LANES, LANES, given)
        for start in range(0, whole, CHUNK):
            s0 = p0 = splat(0.0)
            for i in range(start, smaller(start + CHUNK, whole), LANES):
                normalized, value, weight = values_at(run, i, LANES, given)
                if g != 0:
                    store(g + i * size, value)
                if needs_affine:
                    gather(products, totals, i, normalized, value)
                value = value * weight
                s0, p0 = s0 + value, fma(value, normalized, p0)
            total += lanes_sum(s0)
            product += lanes_sum(p0)
        if whole < n:
            i = 0
            if n >= LANES:
                i = n - LANES
                if g != 0:
                    store(g + i * size, last_value)
                last_value = keep_last(last_value, n - whole)
                last = keep_last(last, n - whole)
            elif g != 0:
                store_first(g, n, last_value)
            if needs_affine:
                gather(products, totals, i, last, last_value)
            value = last_value * last_weight
            total += lanes_sum(value)
            product += lanes_sum(value * last)
        return total, product

    return sums


@cache
def make_narrow(storage: Storage) -> Any:
    """`clear` and `flush` of a row of narrow sums, which are as many as fill whole vectors, and their wide ones."""
    load_lanes, splat, lane = storage.load_lanes, storage.splat, storage.lane_bytes
    load_one = load_f64 if storage.is_double else load_f32

    @inlined
    def clear(narrow: Any, wide: Any, width: Any) -> Any:
        for i in range(0, width, LANES):
            store_vector(narrow + i * lane, splat(0.0))
        for i in range(width):
            store_f64(wide + i * 8, 0.0)

    @inlined
    def flush(narrow: Any, wide: Any, width: Any) -> Any:
        whole = width // LANES * LANES
        for i in range(0, whole, LANES):
            store_vector(wide + i * 8, load_v64(wide + i * 8) + widen(load_lanes(narrow + i * lane)))
            store_vector(narrow + i * lane, splat(0.0))
        for i in range(whole, width):
            store_f64(wide + i * 8, load_f64(wide + i * 8) + load_one(narrow + i * lane))
        if whole < width:
            store_vector(narrow + whole * lane, splat(0.0))

    return clear, flush


@cache
def _make_input(storage: Storage, activation: str | None) -> Any:
    load, load_first, load_lanes = storage.load, storage.load_first, storage.load_lanes
    splat, size, lane = storage.splat, storage.bytes, storage.lane_bytes
    gradient = make_gradient(storage, activation)

    @inlined
    def value_at(run: Any, i: Any, n: Any, factors: Any) -> Any:
        x, dy, side, g, weights, biases, dtotal = run
        ((high, invstd, rest), is_output, ahead), (slope, centre) = factors
        o, zero = i * size, splat(0.0)
        weight = load_lanes(weights + i * lane)
        if n == LANES:
            prefetch(dy + ahead + o)
            normalized = fma(load(x + o) - high, invstd, rest)
            if g != 0:
                value = load(g + o)
            else:
                bias = load_lanes(biases + i * lane) if biases != 0 else zero
                beside = load(side + o) if side != 0 else zero
                value = gradient(normalized, load(dy + o), weight, bias, beside, is_output)
            more = load(dtotal + o) if dtotal != 0 else zero
        else:
            normalized = fma(load_first(x + o, n, high) - high, invstd, rest)
            if g != 0:
                value = load_first(g + o, n, zero)
            else:
                bias = load_lanes(biases + i * lane) if biases != 0 else zero
                beside = load_first(side + o, n, zero) if side != 0 else zero
                value = gradient(normalized, load_first(dy + o, n, zero), weight, bias, beside, is_output)
            more = load_first(dtotal + o, n, zero) if dtotal != 0 else zero
        return fma(fma(normalized, slope, value * weight - centre), invstd, more)

    return value_at
