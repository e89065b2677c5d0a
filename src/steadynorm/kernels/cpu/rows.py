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
from typing import Any

from steadynorm.kernels.cpu import activations
from steadynorm.kernels.cpu import arguments as at
from steadynorm.kernels.cpu.frontend import inlined
from steadynorm.kernels.cpu.planes import make_gradient, make_take, operands_of
from steadynorm.kernels.cpu.simd import (
    LANES,
    Storage,
    fma,
    load_i64,
    load_v64,
    next_ticket,
    smaller,
    splat64,
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
