"""One statistic per position, over channels that lie far apart: LayerNorm over the channels of plain (N, C, *).

A unit is a tile of neighbouring positions of one sample, with all channels of it, swept channel by channel while it is
in the second cache. Every lane is a position, so that statistics need no sums over lanes; the gradients of a weight
do, and are kept as a vector for every channel, widened every FLUSH tiles.
"""

from functools import cache
from typing import Any

import numba

from steadynorm.kernels.cpu import activations
from steadynorm.kernels.cpu import samples as at
from steadynorm.kernels.cpu.frontend import inlined
from steadynorm.kernels.cpu.samples import make_add, make_prepare, make_write, over_tasks, place
from steadynorm.kernels.cpu.samples_rows import make_gradient, make_narrow
from steadynorm.kernels.cpu.simd import (
    LANES,
    Storage,
    fma,
    itself,
    lanes_sum,
    load_f64,
    load_v64,
    narrowed,
    prefetch,
    smaller,
    splat64,
    square_root_of,
    store_f64,
    store_vector,
    where_positive,
    widen,
)

CHANNELS_ADDED = 16
"""Channels whose values are added in the arithmetic's precision before the sums of a position are widened.

Twice as many cost y a tenth of its accuracy, and more than torch's loses."""
FLUSH = 8
"""Tiles whose gradients of the weight are added in the arithmetic's precision before the sums are widened."""
AHEAD = 4
"""Channels: how far ahead memory is asked for, since every channel is in another page, where prefetchers stop."""
HIGH, INVSTD, REST, SUM, SQUARE, VALID, ROWS = range(7)
"""Narrow rows of a tile, one number for every position; backward SUM and SQUARE are those of h and of h·x̂."""


@inlined
def whole(n: Any) -> Any:
    """Positions rounded up to whole vectors."""
    return (n + LANES - 1) // LANES * LANES


@cache
def _make_unit(storage: Storage) -> Any:
    """Of a unit: its sample, its first position, how many, and where its first value is, in values."""

    @inlined
    def unit_of(args: Any, unit: Any) -> Any:
        tile, inner = place(args, at.PIECE), place(args, at.INNER)
        tiles = (inner + tile - 1) // tile
        sample, first = unit // tiles, unit % tiles * tile
        return sample, first, smaller(tile, inner - first), sample * place(args, at.CHANNELS) * inner + first

    return unit_of


@cache
def _make_rows(storage: Storage) -> Any:
    """Bytes from one narrow row to the next, and a row's lanes set to a value."""
    splat, lane = storage.splat, storage.lane_bytes

    @inlined
    def fill(row: Any, n: Any, value: Any) -> Any:
        for i in range(0, n, LANES):
            store_vector(row + i * lane, splat(value))

    return fill


@cache
def _make_coefficients(storage: Storage, is_masked: bool) -> Any:
    """Of every position of a tile: high, the mean as far as the precision goes, 1/σ, and (high − mean) / σ."""
    is_double, lane, keep = storage.is_double, storage.lane_bytes, storage.store_lane

    @inlined
    def coefficients(args: Any, rows: Any, width: Any, sample: Any, first: Any, n: Any) -> Any:
        eps, o = load_f64(args + at.EPS * 8), (sample * place(args, at.INNER) + first) * 8
        means, variances = place(args, at.MEAN) + o, place(args, at.VAR) + o
        mask = place(args, at.MASK) + sample * place(args, at.INNER) + first
        for i in range(n):
            mean, at_i = load_f64(means + i * 8), rows + i * lane
            high = mean if is_double else numba.float64(numba.float32(mean))
            invstd = 1.0 / square_root_of(load_f64(variances + i * 8) + eps)
            keep(at_i + HIGH * width * lane, high)
            keep(at_i + INVSTD * width * lane, invstd)
            keep(at_i + REST * width * lane, (high - mean) * invstd)
            if is_masked:
                keep(at_i + VALID * width * lane, numba.float64(at.load_bool(mask + i)))

    return coefficients


def make_forward(storage: Storage, activation: str | None, is_masked: bool) -> Any:
    """Statistics of every position, then y = activation(x̂ · weight + bias + residual) channel by channel."""
    unit_of, statistics, add, prepare = (
        _make_unit(storage),
        _make_statistics(storage),
        make_add(storage),
        make_prepare(storage),
    )
    coefficients, normalize = _make_coefficients(storage, is_masked), _make_normalize(storage, activation, is_masked)
    fill, size, lane = _make_rows(storage), storage.bytes, storage.lane_bytes

    @inlined
    def begin(args: Any, scratch: Any) -> Any:
        weights, biases = prepare(args, scratch, 1)
        return weights, biases, scratch + 2 * (place(args, at.CHANNELS) + LANES) * lane

    @inlined
    def task(args: Any, task: Any, scratch: Any, common: Any) -> Any:
        weights, biases, rows = common
        width, block = whole(place(args, at.PIECE)), place(args, at.BLOCK)
        channels, inner = place(args, at.CHANNELS), place(args, at.INNER)
        total = place(args, at.TOTAL)
        x = total if total != 0 else place(args, at.X)
        wide = rows + ROWS * width * lane
        fill(rows, width * ROWS, 0.0)
        for unit in range(task * block, smaller((task + 1) * block, place(args, at.UNITS))):
            sample, first, n, start = unit_of(args, unit)
            if total != 0:
                for c in range(channels):
                    o = (start + c * inner) * size
                    add(place(args, at.X) + o, place(args, at.ADDEND) + o, total + o, n)
            statistics(args, x + start * size, n, rows, wide, (sample * inner + first) * 8, sample * inner + first)
            coefficients(args, rows, width, sample, first, n)
            normalize(args, x, start, n, rows, weights, biases)

    return over_tasks((begin, task))


@cache
def _make_statistics(storage: Storage) -> Any:
    """Mean and variance of every position, CHANNELS_ADDED channels at a time, about the mean of those before.

    The first of them are read twice, for a pivot. Not centred there is no pivot, and Σ x² is all.
    """
    load, load_first, load_lanes = storage.load, storage.load_first, storage.load_lanes
    splat, size, lane, pool_all = storage.splat, storage.bytes, storage.lane_bytes, _make_pool(storage)

    @inlined
    def value_at(row: Any, i: Any, n: Any) -> Any:
        return load(row + i * size) if n - i >= LANES else load_first(row + i * size, n - i, splat(0.0))

    @inlined
    def statistics(args: Any, x: Any, n: Any, rows: Any, wide: Any, o: Any, position: Any) -> Any:
        channels, stride = place(args, at.CHANNELS), place(args, at.INNER) * size
        width, is_centred, mask = (
            whole(place(args, at.PIECE)) * lane,
            place(args, at.IS_CENTRED) != 0,
            place(args, at.MASK),
        )
        pivots, sums, squares = rows, rows + SUM * width, rows + SQUARE * width
        for i in range(0, width, LANES * lane):
            store_vector(pivots + i, splat(0.0))
            store_vector(sums + i, splat(0.0))
            store_vector(squares + i, splat(0.0))
        for i in range(0, 2 * whole(place(args, at.PIECE)), LANES):
            store_vector(wide + i * 8, splat64(0.0))
        head = smaller(channels, CHANNELS_ADDED)
        if is_centred:
            for c in range(head):
                for i in range(0, n, LANES):
                    at_i = pivots + i * lane
                    prefetch(x + (c + AHEAD) * stride + i * size)
                    store_vector(at_i, load_lanes(at_i) + value_at(x + c * stride, i, n))
            for i in range(0, n, LANES):
                store_vector(pivots + i * lane, load_lanes(pivots + i * lane) * splat(1.0 / head))
        for start in range(0, channels, CHANNELS_ADDED):
            stop = smaller(start + CHANNELS_ADDED, channels)
            for c in range(start, stop):
                for i in range(0, n, LANES):
                    at_i = i * lane
                    prefetch(x + (c + AHEAD) * stride + i * size)
                    value = value_at(x + c * stride, i, n) - load_lanes(pivots + at_i)
                    store_vector(sums + at_i, load_lanes(sums + at_i) + value)
                    store_vector(squares + at_i, fma(value, value, load_lanes(squares + at_i)))
            pool_all(rows, width, wide, n, start, stop, is_centred)
        means, variances = place(args, at.MEAN) + o, place(args, at.VAR) + o
        apart = whole(place(args, at.PIECE)) * 8
        for i in range(n):
            is_valid = mask == 0 or at.load_bool(mask + position + i) != 0
            store_f64(means + i * 8, load_f64(wide + i * 8) if is_valid else 0.0)
            store_f64(variances + i * 8, load_f64(wide + apart + i * 8) if is_valid else 0.0)

    return statistics


@cache
def _make_pool(storage: Storage) -> Any:
    """Pool the narrow sums of every position with its mean and variance so far, and make that mean the pivot."""
    load_lanes, splat, lane = storage.load_lanes, storage.splat, storage.lane_bytes
    narrow = narrowed if not storage.is_double else itself

    @inlined
    def pool_all(rows: Any, width: Any, wide: Any, n: Any, start: Any, stop: Any, is_centred: Any) -> Any:
        apart = width // lane * 8
        per_count, share = splat64(1.0 / (stop - start)), (stop - start) / numba.float64(stop)
        weight, rest = splat64(share), splat64(1.0 - share)
        for i in range(0, n, LANES):
            at_i, at_wide = rows + i * lane, wide + i * 8
            shift = widen(load_lanes(at_i + SUM * width)) * per_count
            square = widen(load_lanes(at_i + SQUARE * width)) * per_count
            mean, var = load_v64(at_wide), load_v64(at_wide + apart)
            if is_centred:
                step = widen(load_lanes(at_i)) + shift - mean
                mean = fma(step, weight, mean)
                square = square - shift * shift
                square = where_positive(square, square, square - square)
                square = fma(step * step, rest, square)
                store_vector(at_wide, mean)
                store_vector(at_i, narrow(mean))
            store_vector(at_wide + apart, fma(square - var, weight, var))
            store_vector(at_i + SUM * width, splat(0.0))
            store_vector(at_i + SQUARE * width, splat(0.0))

    return pool_all


@cache
def _make_normalize(storage: Storage, activation: str | None, is_masked: bool) -> Any:
    apply, _ = activations.make(storage, activation)
    load, load_first, load_lanes = storage.load, storage.load_first, storage.load_lanes
    splat, size, lane, load_lane = storage.splat, storage.bytes, storage.lane_bytes, storage.load_lane

    @inlined
    def value_at(run: Any, i: Any, n: Any, factors: Any) -> Any:
        x, residual, rows, width = run
        weight, bias = factors
        zero, at_i = splat(0.0), rows + i * lane
        high, invstd = load_lanes(at_i + HIGH * width), load_lanes(at_i + INVSTD * width)
        centred = (load(x + i * size) if n == LANES else load_first(x, n, zero)) - high
        z = fma(fma(centred, invstd, load_lanes(at_i + REST * width)), weight, bias)
        if residual != 0:
            z = z + (load(residual + i * size) if n == LANES else load_first(residual, n, zero))
        if is_masked:
            return where_positive(load_lanes(at_i + VALID * width), apply(z), zero)
        return apply(z)

    write = make_write(storage, value_at)

    @inlined
    def normalize(args: Any, x: Any, start: Any, n: Any, rows: Any, weights: Any, biases: Any) -> Any:
        y, residual, inner = place(args, at.Y), place(args, at.RESIDUAL), place(args, at.INNER)
        width, streams = whole(place(args, at.PIECE)) * lane, place(args, at.STREAMS) != 0
        for c in range(place(args, at.CHANNELS)):
            o = (start + c * inner) * size
            weight = load_lane(weights + c * lane)
            bias = load_lane(biases + c * lane) if biases != 0 else splat(0.0)
            run = x + o, residual + o if residual != 0 else 0, rows, width
            write(run, y + o, n, (weight, bias), streams)

    return normalize


def make_backward(storage: Storage, activation: str | None, is_masked: bool) -> Any:
    """h = g · weight; dx = (h − mean(h) − x̂ · mean(h·x̂)) · invstd + dtotal, the first mean only where it is centred."""
    unit_of, coefficients, prepare = _make_unit(storage), _make_coefficients(storage, is_masked), make_prepare(storage)
    sums, input_gradient = _make_sums(storage, activation, is_masked), _make_input(storage, activation, is_masked)
    load_lanes, splat, fill, lane = storage.load_lanes, storage.splat, _make_rows(storage), storage.lane_bytes
    (clear, flush), keep = make_narrow(storage), storage.store_lane

    @inlined
    def keep_sums(args: Any, task: Any, narrow: Any) -> Any:
        """Add the vectors of all channels to the wide sums of the task, and start them again from zero."""
        channels = place(args, at.CHANNELS)
        products = place(args, at.PRODUCTS) + task * channels * 8
        totals = place(args, at.TOTALS) + task * channels * 8
        for c in range(channels):
            at_c = narrow + c * 2 * LANES * lane
            store_f64(products + c * 8, load_f64(products + c * 8) + lanes_sum(widen(load_lanes(at_c))))
            store_f64(totals + c * 8, load_f64(totals + c * 8) + lanes_sum(widen(load_lanes(at_c + LANES * lane))))
            store_vector(at_c, splat(0.0))
            store_vector(at_c + LANES * lane, splat(0.0))

    @inlined
    def begin(args: Any, scratch: Any) -> Any:
        channels, width = place(args, at.CHANNELS), whole(place(args, at.PIECE))
        weights, biases = prepare(args, scratch, 1)
        rows = scratch + 2 * (channels + LANES) * lane
        wide = rows + ROWS * width * lane
        return weights, biases, rows, wide, wide + 2 * width * 8

    @inlined
    def task(args: Any, task: Any, scratch: Any, common: Any) -> Any:
        weights, biases, rows, wide, narrow = common
        width, block, channels = whole(place(args, at.PIECE)), place(args, at.BLOCK), place(args, at.CHANNELS)
        per_count, is_centred = 1.0 / channels, place(args, at.IS_CENTRED) != 0
        totals, products = rows + SUM * width * lane, rows + SQUARE * width * lane
        fill(rows, width * ROWS, 0.0)
        fill(narrow, channels * 2 * LANES, 0.0)
        for c in range(channels):
            store_f64(place(args, at.PRODUCTS) + (task * channels + c) * 8, 0.0)
            store_f64(place(args, at.TOTALS) + (task * channels + c) * 8, 0.0)
        for unit in range(task * block, smaller((task + 1) * block, place(args, at.UNITS))):
            sample, first, n, start = unit_of(args, unit)
            coefficients(args, rows, width, sample, first, n)
            clear(totals, wide, 2 * width)
            for c in range(channels):
                sums(args, start, c, n, rows, weights, biases, narrow)
                if c % CHANNELS_ADDED == CHANNELS_ADDED - 1:
                    flush(totals, wide, 2 * width)
            flush(totals, wide, 2 * width)
            for i in range(0, n, LANES):
                for k in range(i, i + LANES):
                    of_mean = load_f64(wide + k * 8) * per_count if is_centred else 0.0
                    keep(totals + k * lane, of_mean)
                    keep(products + k * lane, load_f64(wide + (width + k) * 8) * per_count)
            input_gradient(args, start, n, rows, weights, biases)
            if unit % FLUSH == FLUSH - 1:
                keep_sums(args, task, narrow)
        keep_sums(args, task, narrow)

    return over_tasks((begin, task))


@cache
def _make_values(storage: Storage, activation: str | None, is_masked: bool) -> Any:
    """x̂ and g of a vector, zero where nothing is valid, and in the lanes after the first `n`."""
    load, load_first, load_lanes = storage.load, storage.load_first, storage.load_lanes
    splat, size, lane, gradient = storage.splat, storage.bytes, storage.lane_bytes, make_gradient(storage, activation)

    @inlined
    def values_at(run: Any, i: Any, n: Any, factors: Any) -> Any:
        x, dy, side, _, rows, width, is_output = run
        weight, bias = factors
        zero, at_i, o = splat(0.0), rows + i * lane, i * size
        high, invstd = load_lanes(at_i + HIGH * width), load_lanes(at_i + INVSTD * width)
        centred = (load(x + o) if n == LANES else load_first(x + o, n, zero)) - high
        normalized = fma(centred, invstd, load_lanes(at_i + REST * width))
        beside = zero
        if side != 0:
            beside = load(side + o) if n == LANES else load_first(side + o, n, zero)
        value = load(dy + o) if n == LANES else load_first(dy + o, n, zero)
        value = gradient(normalized, value, weight, bias, beside, is_output)
        if is_masked:
            is_valid = load_lanes(at_i + VALID * width)
            return where_positive(is_valid, normalized, zero), where_positive(is_valid, value, zero)
        return normalized, value

    return values_at


@cache
def _make_sums(storage: Storage, activation: str | None, is_masked: bool) -> Any:
    """Add a channel of a tile to the sums of its positions and to those of its weight; g kept where asked for."""
    load_lanes, load_lane, splat = storage.load_lanes, storage.load_lane, storage.splat
    store, store_first, size, lane = storage.store, storage.store_first, storage.bytes, storage.lane_bytes
    values_at = _make_values(storage, activation, is_masked)

    @inlined
    def sums(args: Any, start: Any, c: Any, n: Any, rows: Any, weights: Any, biases: Any, narrow: Any) -> Any:
        x, dy, side, g = place(args, at.X), place(args, at.DY), place(args, at.SIDE), place(args, at.G)
        width, is_output = whole(place(args, at.PIECE)) * lane, place(args, at.IS_OUTPUT) != 0
        o = (start + c * place(args, at.INNER)) * size
        weight = load_lane(weights + c * lane)
        bias = load_lane(biases + c * lane) if biases != 0 else splat(0.0)
        g = g + o if g != 0 else 0
        run = x + o, dy + o, side + o if side != 0 else 0, g, rows, width, is_output
        at_c = narrow + c * 2 * LANES * lane
        product, total = load_lanes(at_c), load_lanes(at_c + LANES * lane)
        ahead = AHEAD * place(args, at.INNER) * size
        for i in range(0, n, LANES):
            prefetch(x + o + ahead + i * size)
            prefetch(dy + o + ahead + i * size)
            if n - i >= LANES:
                normalized, value = values_at(run, i, LANES, (weight, bias))
                if g != 0:
                    store(g + i * size, value)
            else:
                normalized, value = values_at(run, i, n - i, (weight, bias))
                if g != 0:
                    store_first(g + i * size, n - i, value)
            product, total = fma(value, normalized, product), total + value
            value = value * weight
            at_i = rows + i * lane
            store_vector(at_i + SUM * width, load_lanes(at_i + SUM * width) + value)
            store_vector(at_i + SQUARE * width, fma(value, normalized, load_lanes(at_i + SQUARE * width)))
        store_vector(at_c, product)
        store_vector(at_c + LANES * lane, total)

    return sums


@cache
def _make_input(storage: Storage, activation: str | None, is_masked: bool) -> Any:
    load, load_first, load_lanes = storage.load, storage.load_first, storage.load_lanes
    splat, size, lane, load_lane = storage.splat, storage.bytes, storage.lane_bytes, storage.load_lane
    values_at = _make_values(storage, activation, is_masked)

    @inlined
    def value_at(run: Any, i: Any, n: Any, factors: Any) -> Any:
        inputs, dtotal = run
        x, _, _, g, rows, width, _ = inputs
        zero, at_i, o = splat(0.0), rows + i * lane, i * size
        invstd = load_lanes(at_i + INVSTD * width)
        if g != 0:
            centred = (load(x + o) if n == LANES else load_first(x + o, n, zero)) - load_lanes(at_i + HIGH * width)
            normalized = fma(centred, invstd, load_lanes(at_i + REST * width))
            value = load(g + o) if n == LANES else load_first(g + o, n, zero)
        else:
            normalized, value = values_at(inputs, i, n, factors)
        more = zero
        if dtotal != 0:
            more = load(dtotal + o) if n == LANES else load_first(dtotal + o, n, zero)
        value = value * factors[0] - load_lanes(at_i + SUM * width)
        value = fma(value - normalized * load_lanes(at_i + SQUARE * width), invstd, more)
        if is_masked:
            return where_positive(load_lanes(at_i + VALID * width), value, zero)
        return value

    write = make_write(storage, value_at)

    @inlined
    def input_gradient(args: Any, start: Any, n: Any, rows: Any, weights: Any, biases: Any) -> Any:
        x, dy, dx = place(args, at.X), place(args, at.DY), place(args, at.DX)
        side, g, dtotal = place(args, at.SIDE), place(args, at.G), place(args, at.DTOTAL)
        width, is_output = whole(place(args, at.PIECE)) * lane, place(args, at.IS_OUTPUT) != 0
        streams, inner = place(args, at.STREAMS) != 0, place(args, at.INNER)
        for c in range(place(args, at.CHANNELS)):
            o = (start + c * inner) * size
            weight = load_lane(weights + c * lane)
            bias = load_lane(biases + c * lane) if biases != 0 else splat(0.0)
            inputs = x + o, dy + o, side + o if side != 0 else 0, g + o if g != 0 else 0, rows, width, is_output
            write((inputs, dtotal + o if dtotal != 0 else 0), dx + o, n, (weight, bias), streams)

    return input_gradient
