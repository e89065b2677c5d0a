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

from functools import cache
from typing import Any, NamedTuple

import numba

from steadynorm.kernels.cpu import activations
from steadynorm.kernels.cpu import arguments as at
from steadynorm.kernels.cpu.arguments import TO_BACK, TO_COEFFICIENTS, TO_MOMENTS, TO_SUMS
from steadynorm.kernels.cpu.frontend import inlined
from steadynorm.kernels.cpu.planes import make_gradient, make_take, operands_of
from steadynorm.kernels.cpu.simd import (
    LANES,
    Storage,
    first_lane,
    fma,
    load_f64,
    load_i64,
    load_v32,
    load_v64,
    narrowed,
    next_ticket,
    parameter,
    smaller,
    splat64,
    square_root_of,
    store_f32,
    store_f64,
    store_vector,
    stores_fence,
    where_positive,
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


@cache
def _make_flush(storage: Storage) -> Any:
    """Add the narrow sums of all columns to the wide ones, and start them again from zero."""
    load_lanes, lane, splat = storage.load_lanes, storage.lane_bytes, storage.splat

    @inlined
    def flush(narrow: Any, sums: Any, width: Any) -> Any:
        for j in range(0, 2 * width, LANES):
            store_vector(sums + j * 8, load_v64(sums + j * 8) + widen(load_lanes(narrow + j * lane)))
            store_vector(narrow + j * lane, splat(0.0))

    return flush


class _Lanes(NamedTuple):
    """The same work on one column or on a vector of them: how sums are read and statistics kept, all float64."""

    load: Any  # address: float64
    store: Any
    splat: Any
    sum_of: Any  # (sums, c, group, fold): a sum of channel c over rows that were taken as one
    keep: Any  # (address of a coefficient of channel c, group, fold, value), in the arithmetic's precision
    first: Any  # (x, c): a value of the first row
    parameter: Any  # (address, bytes of an element, c, default)
    rounded: Any  # to the arithmetic's precision
    not_negative: Any  # zero for what is negative, NaN for NaN


@inlined
def _itself(value: Any) -> Any:
    return value


@inlined
def _sum_of(sums: Any, c: Any, group: Any, fold: Any) -> Any:
    total = load_f64(sums + c * 8)
    for k in range(1, fold):
        total += load_f64(sums + (k * group + c) * 8)
    return total


@inlined
def _sums_of(sums: Any, c: Any, group: Any, fold: Any) -> Any:
    return load_v64(sums + c * 8)


@inlined
def _parameters(address: Any, size: Any, c: Any, default: Any) -> Any:
    if address == 0:
        return splat64(default)
    if size == 8:
        return load_v64(address + c * 8)
    return widen(load_v32(address + c * 4))


@inlined
def _not_negative(value: Any) -> Any:
    return 0.0 if value < 0.0 else value


@inlined
def _not_negative_lanes(value: Any) -> Any:
    return where_positive(splat64(0.0) - value, splat64(0.0), value)


def _one_column(storage: Storage) -> _Lanes:
    load_splat, size, lane, is_double = storage.load_splat, storage.bytes, storage.lane_bytes, storage.is_double

    @inlined
    def keep(at_c: Any, group: Any, fold: Any, value: Any) -> Any:
        for k in range(fold):
            if is_double:
                store_f64(at_c + k * group * lane, value)
            else:
                store_f32(at_c + k * group * lane, value)

    @inlined
    def first(x: Any, c: Any) -> Any:
        return first_lane(widen(load_splat(x + c * size)))

    @inlined
    def rounded(value: Any) -> Any:
        return value if is_double else numba.float64(numba.float32(value))

    return _Lanes(load_f64, store_f64, _itself, _sum_of, keep, first, parameter, rounded, _not_negative)


def _columns_of_a_vector(storage: Storage) -> _Lanes:
    """For rows that are not folded."""
    load, size, narrow = storage.load, storage.bytes, _itself if storage.is_double else narrowed

    @inlined
    def keep(at_c: Any, group: Any, fold: Any, value: Any) -> Any:
        store_vector(at_c, narrow(value))

    @inlined
    def first(x: Any, c: Any) -> Any:
        return widen(load(x + c * size))

    @inlined
    def rounded(value: Any) -> Any:
        return widen(narrow(value))

    return _Lanes(load_v64, store_vector, splat64, _sums_of, keep, first, _parameters, rounded, _not_negative_lanes)


def _make_column(storage: Storage, lanes: _Lanes) -> Any:
    """`column(args, c, width)`: the stages that are asked for, of the channels from `c` on."""
    load, store, splat, sum_of, keep, first, parameter_of, rounded, not_negative = lanes
    lane = storage.lane_bytes

    @inlined
    def column(args: Any, c: Any, width: Any) -> Any:
        stages, group, fold = (
            load_i64(args + at.STAGES * 8),
            load_i64(args + at.GROUP * 8),
            load_i64(args + at.FOLD * 8),
        )
        sums, other, x = load_i64(args + at.SCRATCH * 8), width * 8, load_i64(args + at.X * 8)
        per_count, eps = splat(load_f64(args + at.PER_COUNT * 8)), splat(load_f64(args + at.EPS * 8))
        means, variances = load_i64(args + at.MEAN * 8) + c * 8, load_i64(args + at.VAR * 8) + c * 8
        dweight, dbias = load_i64(args + at.DWEIGHT * 8) + c * 8, load_i64(args + at.DBIAS * 8) + c * 8
        if stages & TO_MOMENTS:
            shift = sum_of(sums, c, group, fold) * per_count
            store(means, first(x, c) + shift)
            square = sum_of(sums + other, c, group, fold) * per_count
            store(variances, not_negative(square - shift * shift))
            if stages == TO_MOMENTS:
                return
        mean = load(means)
        high = rounded(mean)
        rest, invstd = mean - high, splat(1.0) / square_root_of(load(variances) + eps)
        if stages & TO_SUMS:
            total = sum_of(sums, c, group, fold)
            products = sum_of(sums + other, c, group, fold)
            store(dbias, total)
            store(dweight, (products - rest * total) * invstd)
        if stages & TO_COEFFICIENTS:
            at_c = load_i64(args + at.COLUMNS * 8) + c * lane
            weights, weight_bytes = load_i64(args + at.WEIGHT * 8), load_i64(args + at.WEIGHT_BYTES * 8)
            biases, bias_bytes = load_i64(args + at.BIAS * 8), load_i64(args + at.BIAS_BYTES * 8)
            scale = parameter_of(weights, weight_bytes, c, 1.0) * invstd
            keep(at_c, group, fold, high)
            keep(at_c + width * lane, group, fold, scale)
            keep(at_c + 2 * width * lane, group, fold, parameter_of(biases, bias_bytes, c, 0.0) - rest * scale)
            if stages & TO_BACK:
                of_var = load(dweight) * per_count * invstd
                keep(at_c + 3 * width * lane, group, fold, splat(0.0) - scale * of_var)
                keep(at_c + 4 * width * lane, group, fold, scale * (rest * of_var - load(dbias) * per_count))

    return column


@cache
def make_columns(storage: Storage) -> Any:
    """The work between the sweeps, on one thread: sums of blocks to statistics, statistics to coefficients."""
    lane = storage.lane_bytes
    one, vector = (_make_column(storage, lanes(storage)) for lanes in (_one_column, _columns_of_a_vector))

    @inlined
    def add_blocks(sums: Any, count: Any, tasks: Any, apart: Any) -> Any:
        """Add the sums of all blocks, `apart` bytes from each other, to those of the first."""
        for o in range(sums, sums + count * 8, SUM):
            total = load_v64(o)
            for task in range(1, tasks):
                total = total + load_v64(o + task * apart)
            store_vector(o, total)

    def kernel(args: Any) -> Any:
        group, fold = load_i64(args + at.GROUP * 8), load_i64(args + at.FOLD * 8)
        width = padded(group * fold)
        tasks = load_i64(args + at.TASKS * 8)
        if tasks > 1 and load_i64(args + at.STAGES * 8) & (TO_MOMENTS | TO_SUMS):
            add_blocks(load_i64(args + at.SCRATCH * 8), 2 * width, tasks, 2 * width * (8 + lane))
        c = 0
        while fold == 1 and c + LANES <= group:
            vector(args, c, width)
            c += LANES
        while c < group:
            one(args, c, width)
            c += 1

    return kernel


@inlined
def _all_columns(args: Any) -> Any:
    return load_i64(args + at.GROUP * 8) * load_i64(args + at.FOLD * 8)


@inlined
def _padded_columns(args: Any) -> Any:
    return padded(_all_columns(args))


def _blocks(block_of_rows: Any) -> Any:
    """A kernel that runs `block_of_rows(args, task, first row, rows, columns)` over all blocks."""

    def kernel(args: Any) -> Any:
        tasks, block = load_i64(args + at.TASKS * 8), load_i64(args + at.BLOCK * 8)
        rows, extra = load_i64(args + at.OUTER * 8), load_i64(args + at.EXTRA * 8)
        columns = _all_columns(args)
        task = next_ticket(args)
        while task < tasks:
            first = task * block
            block_of_rows(args, task, first, smaller(first + block, rows) - first, columns)
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
    def add(value: Any, narrow: Any, width: Any) -> Any:
        store_vector(narrow, load_lanes(narrow) + value)
        store_vector(narrow + width, fma(value, value, load_lanes(narrow + width)))

    @inlined
    def block(args: Any, task: Any, first: Any, rows: Any, columns: Any) -> Any:
        width, stride = _padded_columns(args), _all_columns(args) * size
        sums = load_i64(args + at.SCRATCH * 8) + task * 2 * width * (8 + lane)
        narrow = sums + 2 * width * 8
        x, pivots = load_i64(args + at.X * 8) + first * stride, load_i64(args + at.PIVOT * 8)
        if columns * size == stride:
            clear(sums, narrow, width, lane)
        whole, wide = columns - columns % LANES, width * lane
        for done in range(rows):
            row = x + done * stride
            for j in range(0, whole, LANES):
                add(load(row + j * size) - load(pivots + j * size), narrow + j * lane, wide)
            if whole < columns:
                pivot = load_first(pivots + whole * size, columns - whole, splat(0.0))
                value = load_first(row + whole * size, columns - whole, pivot) - pivot
                add(value, narrow + whole * lane, wide)
            if done % ROWS_ADDED == ROWS_ADDED - 1:
                flush(narrow, sums, width)
        flush(narrow, sums, width)

    return _blocks(block)


def make_normalize(storage: Storage, activation: str | None, has_residual: bool) -> Any:
    """The second sweep forward."""
    apply, _ = activations.make(storage, activation)
    coefficient, lane, take = storage.load_lanes, storage.lane_bytes, make_take(storage)

    @inlined
    def value_at(operands: Any, o: Any, n: Any, at_j: Any, width: Any) -> Any:
        x, residual = operands
        high, scale, shift = coefficient(at_j), coefficient(at_j + width), coefficient(at_j + 2 * width)
        z = fma(take(x + o, n) - high, scale, shift)
        if has_residual:
            z = z + take(residual + o, n)
        return apply(z)

    write, size = _make_write(storage, value_at), storage.bytes

    @inlined
    def block(args: Any, task: Any, first: Any, rows: Any, columns: Any) -> Any:
        width, stride = _padded_columns(args) * lane, _all_columns(args) * size
        operands = load_i64(args + at.X * 8), load_i64(args + at.RESIDUAL * 8)
        write(args, operands, load_i64(args + at.Y * 8), first * stride, rows, columns, stride, width)

    return _blocks(block)


@cache
def _make_write(storage: Storage, value_at: Any) -> Any:
    """Write a block of rows, each vector made by `value_at(operands, o, n, coefficients, width)`."""
    store, store_first, stream = storage.store, storage.store_first, storage.stream
    size, lane = storage.bytes, storage.lane_bytes

    @inlined
    def write(args: Any, operands: Any, out: Any, start: Any, rows: Any, columns: Any, stride: Any, width: Any) -> Any:
        coefficients, whole = load_i64(args + at.COLUMNS * 8), columns - columns % LANES
        streams = load_i64(args + at.STREAMS * 8) != 0
        for o in range(start, start + rows * stride, stride):
            if streams:
                for j in range(0, whole, LANES):
                    stream(out + o + j * size, value_at(operands, o + j * size, LANES, coefficients + j * lane, width))
            else:
                for j in range(0, whole, LANES):
                    store(out + o + j * size, value_at(operands, o + j * size, LANES, coefficients + j * lane, width))
            if whole < columns:
                at_end, left = o + whole * size, columns - whole
                store_first(out + at_end, left, value_at(operands, at_end, left, coefficients + whole * lane, width))

    return write


def make_sums(storage: Storage, activation: str | None, side: str, keeps_g: bool) -> Any:
    """The first sweep back: Σ g and Σ g·(x − high) of every column, block by block; see planes.make_backward."""
    gradient = make_gradient(storage, activation, side)
    store, store_first, take = storage.store, storage.store_first, make_take(storage)
    size, coefficient, lane, flush = storage.bytes, storage.load_lanes, storage.lane_bytes, _make_flush(storage)

    @inlined
    def add(operands: Any, o: Any, n: Any, at_j: Any, width: Any, narrow: Any) -> Any:
        high, scale, shift = coefficient(at_j), coefficient(at_j + width), coefficient(at_j + 2 * width)
        centred = take(operands[0] + o, n) - high
        value = gradient(operands, o, n, centred, scale, shift)
        if keeps_g:
            if n == LANES:
                store(operands[3] + o, value)
            else:
                store_first(operands[3] + o, n, value)
        store_vector(narrow, coefficient(narrow) + value)
        store_vector(narrow + width, fma(value, centred, coefficient(narrow + width)))

    @inlined
    def block(args: Any, task: Any, first: Any, rows: Any, columns: Any) -> Any:
        width, stride = _padded_columns(args), _all_columns(args) * size
        sums = load_i64(args + at.SCRATCH * 8) + task * 2 * width * (8 + lane)
        narrow, coefficients = sums + 2 * width * 8, load_i64(args + at.COLUMNS * 8)
        operands = operands_of(args)
        if columns * size == stride:
            clear(sums, narrow, width, lane)
        whole, wide = columns - columns % LANES, width * lane
        for done in range(rows):
            o = (first + done) * stride
            for j in range(0, whole, LANES):
                add(operands, o + j * size, LANES, coefficients + j * lane, wide, narrow + j * lane)
            if whole < columns:
                at_end = coefficients + whole * lane
                add(operands, o + whole * size, columns - whole, at_end, wide, narrow + whole * lane)
            if done % ROWS_ADDED == ROWS_ADDED - 1:
                flush(narrow, sums, width)
        flush(narrow, sums, width)

    return _blocks(block)


def make_input(storage: Storage, activation: str | None, side: str, keeps_g: bool) -> Any:
    """The second sweep back: dx = (x − high) · slope + g · scale + centre."""
    gradient, take = make_gradient(storage, activation, side), make_take(storage)
    size, coefficient, lane = storage.bytes, storage.load_lanes, storage.lane_bytes

    @inlined
    def value_at(operands: Any, o: Any, n: Any, at_j: Any, width: Any) -> Any:
        high, scale, shift = coefficient(at_j), coefficient(at_j + width), coefficient(at_j + 2 * width)
        slope, centre = coefficient(at_j + 3 * width), coefficient(at_j + 4 * width)
        centred = take(operands[0] + o, n) - high
        value = take(operands[3] + o, n) if keeps_g else gradient(operands, o, n, centred, scale, shift)
        return fma(centred, slope, fma(value, scale, centre))

    write = _make_write(storage, value_at)

    @inlined
    def block(args: Any, task: Any, first: Any, rows: Any, columns: Any) -> Any:
        width, stride = _padded_columns(args) * lane, _all_columns(args) * size
        write(args, operands_of(args), load_i64(args + at.DX * 8), first * stride, rows, columns, stride, width)

    return _blocks(block)
