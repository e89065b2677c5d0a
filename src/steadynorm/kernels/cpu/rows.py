"""Kernels for groups that are the columns of a matrix: channels-last memory, or (N, C).

Every thread sweeps blocks of rows, one row after the other: memory is read in its own order. (Taking four rows together
spares loads of the coefficients and of the sums, and cost up to 2.2 times as much: the prefetcher does not follow.) A
pass over memory cannot end before all rows are seen, so a forward pass is two
sweeps with a little work on the columns between them, and so is a backward pass. Where there are few channels, `FOLD`
rows are taken as one (three channels would leave most lanes of a vector empty), and the sums of a channel's columns
are added at the end.

Sums per block are kept as float64, of values less a pivot (the channel's first value), and added in the order of the
blocks, which do not depend on the number of threads.
"""

from typing import Any

import numba

from steadynorm.kernels.cpu import activations
from steadynorm.kernels.cpu import arguments as at
from steadynorm.kernels.cpu.arguments import TO_BACK, TO_COEFFICIENTS, TO_MOMENTS, TO_SUMS
from steadynorm.kernels.cpu.simd import (
    LANES,
    Storage,
    first_lane,
    fma,
    inlined,
    load_f64,
    load_i64,
    load_v64,
    next_ticket,
    parameter,
    splat64,
    square_root_of,
    store_f32,
    store_f64,
    store_vector,
    stores_fence,
    widen,
)

SUM = LANES * 8

ROWS_ADDED = 16
"""Rows whose values are added in the arithmetic's precision before the sums are widened: 16 terms a lane."""


@inlined
def padded(columns: Any) -> Any:
    """Columns rounded up to whole vectors."""
    return (columns + LANES - 1) // LANES * LANES


@inlined
def clear(sums: Any, narrow: Any, width: Any, lane: Any) -> Any:
    """Set both sums of every column to zero, the wide and the narrow."""
    for j in range(0, 2 * width * (8 + lane), SUM):
        store_vector(sums + j, splat64(0.0))


def _make_flush(storage: Storage) -> Any:
    """Add the narrow sums of all columns to the wide ones, and start them again from zero."""
    load_lanes, lane, splat = storage.load_lanes, storage.lane_bytes, storage.splat

    @inlined
    def flush(narrow: Any, sums: Any, width: Any) -> Any:
        for j in range(0, 2 * width, LANES):
            store_vector(sums + j * 8, load_v64(sums + j * 8) + widen(load_lanes(narrow + j * lane)))
            store_vector(narrow + j * lane, splat(0.0))

    return flush


def make_columns(storage: Storage) -> Any:
    """The work between the sweeps, on one thread: sums of blocks to statistics, statistics to coefficients."""
    load_splat = storage.load_splat
    size, lane = storage.bytes, storage.lane_bytes
    is_double = storage.is_double

    @inlined
    def sum_of(sums: Any, c: Any, tasks: Any, apart: Any, group: Any, fold: Any) -> Any:
        """A sum of channel `c` over the blocks, `apart` bytes from each other, and over rows that were taken as one."""
        total = 0.0
        for task in range(tasks):
            for k in range(fold):
                total += load_f64(sums + task * apart + (k * group + c) * 8)
        return total

    @inlined
    def keep(at_c: Any, group: Any, fold: Any, value: Any) -> Any:
        """Write a coefficient of a channel to each of its columns, in the arithmetic's precision."""
        for k in range(fold):
            if is_double:
                store_f64(at_c + k * group * lane, value)
            else:
                store_f32(at_c + k * group * lane, value)

    def kernel(args: Any) -> Any:
        stages, tasks = load_i64(args + at.STAGES * 8), load_i64(args + at.TASKS * 8)
        group, fold, x = load_i64(args + at.GROUP * 8), load_i64(args + at.FOLD * 8), load_i64(args + at.X * 8)
        per_count, eps = load_f64(args + at.PER_COUNT * 8), load_f64(args + at.EPS * 8)
        weights, weight_bytes = load_i64(args + at.WEIGHT * 8), load_i64(args + at.WEIGHT_BYTES * 8)
        biases, bias_bytes = load_i64(args + at.BIAS * 8), load_i64(args + at.BIAS_BYTES * 8)
        means, variances = load_i64(args + at.MEAN * 8), load_i64(args + at.VAR * 8)
        dweight, dbias = load_i64(args + at.DWEIGHT * 8), load_i64(args + at.DBIAS * 8)
        sums, columns = load_i64(args + at.SCRATCH * 8), load_i64(args + at.COLUMNS * 8)
        width = padded(group * fold)
        apart, other = 2 * width * (8 + lane), width * 8
        for c in range(group):
            if stages & TO_MOMENTS:
                shift = sum_of(sums, c, tasks, apart, group, fold) * per_count
                var = sum_of(sums + other, c, tasks, apart, group, fold) * per_count - shift * shift
                if var < 0.0:
                    var = 0.0
                store_f64(means + c * 8, first_lane(widen(load_splat(x + c * size))) + shift)
                store_f64(variances + c * 8, var)
                if stages == TO_MOMENTS:
                    continue
            mean, var = load_f64(means + c * 8), load_f64(variances + c * 8)
            high = mean if is_double else numba.float64(numba.float32(mean))
            rest, invstd = mean - high, 1.0 / square_root_of(var + eps)
            if stages & TO_SUMS:
                total = sum_of(sums, c, tasks, apart, group, fold)
                products = sum_of(sums + other, c, tasks, apart, group, fold)
                store_f64(dbias + c * 8, total)
                store_f64(dweight + c * 8, (products - rest * total) * invstd)
            if stages & TO_COEFFICIENTS:
                at_c = columns + c * lane
                scale = parameter(weights, weight_bytes, c, 1.0) * invstd
                keep(at_c, group, fold, high)
                keep(at_c + width * lane, group, fold, scale)
                shift = parameter(biases, bias_bytes, c, 0.0) - rest * scale
                keep(at_c + 2 * width * lane, group, fold, shift)
                if stages & TO_BACK:
                    of_var = load_f64(dweight + c * 8) * per_count * invstd
                    keep(at_c + 3 * width * lane, group, fold, -scale * of_var)
                    centre = scale * (rest * of_var - load_f64(dbias + c * 8) * per_count)
                    keep(at_c + 4 * width * lane, group, fold, centre)

    return kernel


def _blocks(block_of_rows: Any) -> Any:
    """A kernel that runs `block_of_rows(args, task, first row, rows, columns)` over all blocks."""

    def kernel(args: Any) -> Any:
        tasks, block = load_i64(args + at.TASKS * 8), load_i64(args + at.BLOCK * 8)
        rows, extra = load_i64(args + at.OUTER * 8), load_i64(args + at.EXTRA * 8)
        columns = load_i64(args + at.GROUP * 8) * load_i64(args + at.FOLD * 8)
        task = next_ticket(args)
        while task < tasks:
            first = task * block
            block_of_rows(args, task, first, min(first + block, rows) - first, columns)
            if task == tasks - 1 and extra > 0:
                block_of_rows(args, task, rows, 1, extra)
            task = next_ticket(args)
        stores_fence()

    return kernel


def make_statistics(storage: Storage) -> Any:
    """The first sweep forward: Σ (x − pivot) and Σ (x − pivot)² of every column, block by block."""
    load, load_first, splat, size = storage.load, storage.load_first, storage.splat, storage.bytes

    flush, load_lanes, lane = _make_flush(storage), storage.load_lanes, storage.lane_bytes

    @inlined
    def add(row: Any, j: Any, left: Any, pivots: Any, narrow: Any, width: Any) -> Any:
        total, squares = load_lanes(narrow + j * lane), load_lanes(narrow + (width + j) * lane)
        if left >= LANES:
            value = load(row + j * size) - load(pivots + j * size)
        else:
            pivot = load_first(pivots + j * size, left, splat(0.0))
            value = load_first(row + j * size, left, pivot) - pivot
        store_vector(narrow + j * lane, total + value)
        store_vector(narrow + (width + j) * lane, fma(value, value, squares))

    @inlined
    def block(args: Any, task: Any, first: Any, rows: Any, columns: Any) -> Any:
        all_columns = load_i64(args + at.GROUP * 8) * load_i64(args + at.FOLD * 8)
        width, stride = padded(all_columns), all_columns * size
        sums = load_i64(args + at.SCRATCH * 8) + task * 2 * width * (8 + lane)
        narrow = sums + 2 * width * 8
        x, pivots = load_i64(args + at.X * 8) + first * stride, load_i64(args + at.PIVOT * 8)
        if columns == all_columns:
            clear(sums, narrow, width, lane)
        for done in range(rows):
            for j in range(0, columns, LANES):
                add(x + done * stride, j, columns - j, pivots, narrow, width)
            if done % ROWS_ADDED == ROWS_ADDED - 1:
                flush(narrow, sums, width)
        flush(narrow, sums, width)

    return _blocks(block)


def make_normalize(storage: Storage, activation: str | None) -> Any:
    """The second sweep forward."""
    apply, _ = activations.make(storage, activation)
    load, load_first, store, store_first = storage.load, storage.load_first, storage.store, storage.store_first
    stream, size = storage.stream, storage.bytes
    coefficient, lane = storage.load_lanes, storage.lane_bytes

    @inlined
    def block(args: Any, task: Any, first: Any, rows: Any, columns: Any) -> Any:
        all_columns = load_i64(args + at.GROUP * 8) * load_i64(args + at.FOLD * 8)
        width, stride = padded(all_columns) * lane, all_columns * size
        coefficients = load_i64(args + at.COLUMNS * 8)
        x, y, residual = load_i64(args + at.X * 8), load_i64(args + at.Y * 8), load_i64(args + at.RESIDUAL * 8)
        streams = load_i64(args + at.STREAMS * 8) != 0
        for r in range(first, first + rows):
            for j in range(0, columns, LANES):
                left, o, at_j = columns - j, r * stride + j * size, coefficients + j * lane
                high, scale, shift = coefficient(at_j), coefficient(at_j + width), coefficient(at_j + 2 * width)
                if left >= LANES:
                    z = fma(load(x + o) - high, scale, shift)
                    if residual != 0:
                        z = z + load(residual + o)
                    if streams:
                        stream(y + o, apply(z))
                    else:
                        store(y + o, apply(z))
                else:
                    z = fma(load_first(x + o, left, high) - high, scale, shift)
                    if residual != 0:
                        z = z + load_first(residual + o, left, high)
                    store_first(y + o, left, apply(z))

    return _blocks(block)


def _gradient(storage: Storage, activation: str | None) -> Any:
    """g = dy · activation'(z) of one vector, with its loads; `centred` is x − high."""
    _, back = activations.make(storage, activation)
    load, load_first, splat = storage.load, storage.load_first, storage.splat
    has_activation = activation is not None

    @inlined
    def gradient(
        centred: Any, dy: Any, side: Any, offset: Any, left: Any, is_output: Any, scale: Any, shift: Any
    ) -> Any:
        value = load(dy + offset) if left >= LANES else load_first(dy + offset, left, splat(0.0))
        if not has_activation:
            return value
        beside = splat(0.0)
        if side != 0:
            beside = load(side + offset) if left >= LANES else load_first(side + offset, left, splat(0.0))
        if is_output:
            return back(beside, value)
        return back(fma(centred, scale, shift) + beside, value)

    return gradient


def make_sums(storage: Storage, activation: str | None) -> Any:
    """The first sweep back: Σ g and Σ g·(x − high) of every column, block by block; g is kept where asked for."""
    gradient = _gradient(storage, activation)
    load, load_first, store, store_first = storage.load, storage.load_first, storage.store, storage.store_first
    size = storage.bytes
    coefficient, lane, flush = storage.load_lanes, storage.lane_bytes, _make_flush(storage)

    @inlined
    def add(args: Any, o: Any, j: Any, left: Any, narrow: Any, width: Any) -> Any:
        x, dy = load_i64(args + at.X * 8), load_i64(args + at.DY * 8)
        side, g = load_i64(args + at.SIDE * 8), load_i64(args + at.G * 8)
        is_output = load_i64(args + at.IS_OUTPUT * 8) != 0
        at_j = load_i64(args + at.COLUMNS * 8) + j * lane
        high, scale, shift = coefficient(at_j), coefficient(at_j + width * lane), coefficient(at_j + 2 * width * lane)
        total, products = coefficient(narrow + j * lane), coefficient(narrow + (width + j) * lane)
        centred = (load(x + o) if left >= LANES else load_first(x + o, left, high)) - high
        value = gradient(centred, dy, side, o, left, is_output, scale, shift)
        if g != 0:
            if left >= LANES:
                store(g + o, value)
            else:
                store_first(g + o, left, value)
        store_vector(narrow + j * lane, total + value)
        store_vector(narrow + (width + j) * lane, fma(value, centred, products))

    @inlined
    def block(args: Any, task: Any, first: Any, rows: Any, columns: Any) -> Any:
        all_columns = load_i64(args + at.GROUP * 8) * load_i64(args + at.FOLD * 8)
        width, stride = padded(all_columns), all_columns * size
        sums = load_i64(args + at.SCRATCH * 8) + task * 2 * width * (8 + lane)
        narrow = sums + 2 * width * 8
        if columns == all_columns:
            clear(sums, narrow, width, lane)
        for done in range(rows):
            for j in range(0, columns, LANES):
                add(args, (first + done) * stride + j * size, j, columns - j, narrow, width)
            if done % ROWS_ADDED == ROWS_ADDED - 1:
                flush(narrow, sums, width)
        flush(narrow, sums, width)

    return _blocks(block)


def make_input(storage: Storage, activation: str | None) -> Any:
    """The second sweep back: dx = (x − high) · slope + g · scale + centre."""
    gradient = _gradient(storage, activation)
    load, load_first, store, store_first = storage.load, storage.load_first, storage.store, storage.store_first
    stream, splat, size = storage.stream, storage.splat, storage.bytes
    coefficient, lane = storage.load_lanes, storage.lane_bytes

    @inlined
    def block(args: Any, task: Any, first: Any, rows: Any, columns: Any) -> Any:
        all_columns = load_i64(args + at.GROUP * 8) * load_i64(args + at.FOLD * 8)
        width, stride = padded(all_columns) * lane, all_columns * size
        coefficients = load_i64(args + at.COLUMNS * 8)
        x, dy, dx = load_i64(args + at.X * 8), load_i64(args + at.DY * 8), load_i64(args + at.DX * 8)
        side, g = load_i64(args + at.SIDE * 8), load_i64(args + at.G * 8)
        is_output = load_i64(args + at.IS_OUTPUT * 8) != 0
        streams = load_i64(args + at.STREAMS * 8) != 0
        for r in range(first, first + rows):
            for j in range(0, columns, LANES):
                left, o, at_j = columns - j, r * stride + j * size, coefficients + j * lane
                high, scale, shift = coefficient(at_j), coefficient(at_j + width), coefficient(at_j + 2 * width)
                slope, centre = coefficient(at_j + 3 * width), coefficient(at_j + 4 * width)
                centred = (load(x + o) if left >= LANES else load_first(x + o, left, high)) - high
                if g != 0:
                    value = load(g + o) if left >= LANES else load_first(g + o, left, splat(0.0))
                else:
                    value = gradient(centred, dy, side, o, left, is_output, scale, shift)
                value = fma(centred, slope, fma(value, scale, centre))
                if left < LANES:
                    store_first(dx + o, left, value)
                elif streams:
                    stream(dx + o, value)
                else:
                    store(dx + o, value)

    return _blocks(block)
