"""Kernels for groups that are the columns of a matrix: channels-last memory, or (N, C).

Every thread sweeps blocks of rows. A pass over memory cannot end before all rows are seen, so a forward pass is two
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
    fma,
    lanes_sum,
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

ROWS_AT_ONCE = 8  # sums stay in registers over these rows: one load and store of the sums for eight of x


@numba.njit(forceinline=True)
def padded(columns: Any) -> Any:
    """Columns rounded up to whole vectors."""
    return (columns + LANES - 1) // LANES * LANES


def make_columns(storage: Storage) -> Any:
    """The work between the sweeps, on one thread: sums of blocks to statistics, statistics to coefficients."""
    load_splat = storage.load_splat
    size, lane = storage.bytes, 8 if storage.is_double else 4
    is_double = storage.is_double

    @numba.njit(forceinline=True)
    def sum_of(args: Any, which: Any, c: Any) -> Any:
        """Sum number `which` of channel `c` over the blocks, and over the rows that were taken as one."""
        group, fold = load_i64(args + at.GROUP * 8), load_i64(args + at.FOLD * 8)
        width = padded(group * fold)
        start = load_i64(args + at.SCRATCH * 8) + which * width * 8
        total = 0.0
        for task in range(load_i64(args + at.TASKS * 8)):
            for k in range(fold):
                total += load_f64(start + (task * 2 * width + k * group + c) * 8)
        return total

    @numba.njit(forceinline=True)
    def to_moments(args: Any, c: Any) -> Any:
        per_count = load_f64(args + at.PER_COUNT * 8)
        pivot = lanes_sum(widen(load_splat(load_i64(args + at.X * 8) + c * size))) / LANES
        shift = sum_of(args, 0, c) * per_count
        var = sum_of(args, 1, c) * per_count - shift * shift
        if var < 0.0:
            var = 0.0
        store_f64(load_i64(args + at.MEAN * 8) + c * 8, pivot + shift)
        store_f64(load_i64(args + at.VAR * 8) + c * 8, var)

    @numba.njit(forceinline=True)
    def keep(args: Any, which: Any, c: Any, value: Any) -> Any:
        """Write a coefficient of channel `c` to each of its columns, in the arithmetic's precision."""
        group, fold = load_i64(args + at.GROUP * 8), load_i64(args + at.FOLD * 8)
        width = padded(group * fold)
        start = load_i64(args + at.COLUMNS * 8) + which * width * lane
        for k in range(fold):
            if is_double:
                store_f64(start + (k * group + c) * lane, value)
            else:
                store_f32(start + (k * group + c) * lane, numba.float32(value))

    @numba.njit(forceinline=True)
    def statistics_of(args: Any, c: Any) -> Any:
        mean = load_f64(load_i64(args + at.MEAN * 8) + c * 8)
        var = load_f64(load_i64(args + at.VAR * 8) + c * 8)
        high = mean if is_double else numba.float64(numba.float32(mean))
        return high, mean - high, 1.0 / square_root_of(var + load_f64(args + at.EPS * 8))

    def kernel(args: Any) -> Any:
        stages, group = load_i64(args + at.STAGES * 8), load_i64(args + at.GROUP * 8)
        per_count = load_f64(args + at.PER_COUNT * 8)
        weights, weight_bytes = load_i64(args + at.WEIGHT * 8), load_i64(args + at.WEIGHT_BYTES * 8)
        biases, bias_bytes = load_i64(args + at.BIAS * 8), load_i64(args + at.BIAS_BYTES * 8)
        dweight, dbias = load_i64(args + at.DWEIGHT * 8), load_i64(args + at.DBIAS * 8)
        if stages & TO_MOMENTS:
            for c in range(group):
                to_moments(args, c)
        if stages & TO_SUMS:
            for c in range(group):
                _, rest, invstd = statistics_of(args, c)
                total = sum_of(args, 0, c)
                store_f64(dbias + c * 8, total)
                store_f64(dweight + c * 8, (sum_of(args, 1, c) - rest * total) * invstd)
        if stages & TO_COEFFICIENTS:
            for which in range(5 if stages & TO_BACK else 3):
                for c in range(group):
                    high, rest, invstd = statistics_of(args, c)
                    scale = parameter(weights, weight_bytes, c, 1.0) * invstd
                    value = high
                    if which == 1:
                        value = scale
                    elif which == 2:
                        value = parameter(biases, bias_bytes, c, 0.0) - rest * scale
                    elif which >= 3:
                        of_var = load_f64(dweight + c * 8) * per_count * invstd
                        value = -scale * of_var
                        if which == 4:
                            value = scale * (rest * of_var - load_f64(dbias + c * 8) * per_count)
                    keep(args, which, c, value)

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

    @numba.njit(forceinline=True)
    def add(row: Any, stride: Any, rows: Any, j: Any, left: Any, pivots: Any, sums: Any, width: Any) -> Any:
        total, squares = load_v64(sums + j * 8), load_v64(sums + (width + j) * 8)
        if left >= LANES:
            pivot = load(pivots + j * size)
            for k in range(rows):
                value = widen(load(row + k * stride + j * size) - pivot)
                total = total + value
                squares = fma(value, value, squares)
        else:
            pivot = load_first(pivots + j * size, left, splat(0.0))
            for k in range(rows):
                value = widen(load_first(row + k * stride + j * size, left, pivot) - pivot)
                total = total + value
                squares = fma(value, value, squares)
        store_vector(sums + j * 8, total)
        store_vector(sums + (width + j) * 8, squares)

    @numba.njit(forceinline=True)
    def block(args: Any, task: Any, first: Any, rows: Any, columns: Any) -> Any:
        all_columns = load_i64(args + at.GROUP * 8) * load_i64(args + at.FOLD * 8)
        width, stride = padded(all_columns), all_columns * size
        sums = load_i64(args + at.SCRATCH * 8) + task * 2 * width * 8
        x, pivots = load_i64(args + at.X * 8) + first * stride, load_i64(args + at.PIVOT * 8)
        if columns == all_columns:
            for j in range(0, 2 * width, LANES):
                store_vector(sums + j * 8, splat64(0.0))
        done = 0
        while done < rows:
            together = min(ROWS_AT_ONCE, rows - done)
            row = x + done * stride
            if together == ROWS_AT_ONCE:
                for j in range(0, columns, LANES):
                    add(row, stride, ROWS_AT_ONCE, j, columns - j, pivots, sums, width)
            else:
                for j in range(0, columns, LANES):
                    add(row, stride, together, j, columns - j, pivots, sums, width)
            done += together

    return _blocks(block)


def _load_lane(storage: Storage) -> Any:
    from steadynorm.kernels.cpu.simd import load_v32

    return load_v64 if storage.is_double else load_v32


def make_normalize(storage: Storage, activation: str | None) -> Any:
    """The second sweep forward."""
    apply, _ = activations.make(storage, activation)
    load, load_first, store, store_first = storage.load, storage.load_first, storage.store, storage.store_first
    stream, splat, size = storage.stream, storage.splat, storage.bytes
    coefficient, lane = _load_lane(storage), 8 if storage.is_double else 4

    @numba.njit(forceinline=True)
    def block(args: Any, task: Any, first: Any, rows: Any, columns: Any) -> Any:
        all_columns = load_i64(args + at.GROUP * 8) * load_i64(args + at.FOLD * 8)
        width, stride = padded(all_columns) * lane, all_columns * size
        coefficients = load_i64(args + at.COLUMNS * 8)
        streams = load_i64(args + at.STREAMS * 8) != 0
        residual = load_i64(args + at.RESIDUAL * 8)
        for r in range(first, first + rows):
            x, y = load_i64(args + at.X * 8) + r * stride, load_i64(args + at.Y * 8) + r * stride
            beside = residual + r * stride if residual != 0 else 0
            for j in range(0, columns, LANES):
                at_j = coefficients + j * lane
                high, scale, shift = coefficient(at_j), coefficient(at_j + width), coefficient(at_j + 2 * width)
                if columns - j >= LANES:
                    z = fma(load(x + j * size) - high, scale, shift)
                    if beside != 0:
                        z = z + load(beside + j * size)
                    if streams:
                        stream(y + j * size, apply(z))
                    else:
                        store(y + j * size, apply(z))
                else:
                    z = fma(load_first(x + j * size, columns - j, splat(0.0)) - high, scale, shift)
                    if beside != 0:
                        z = z + load_first(beside + j * size, columns - j, splat(0.0))
                    store_first(y + j * size, columns - j, apply(z))

    return _blocks(block)


def _gradient(storage: Storage, activation: str | None) -> Any:
    """g = dy · activation'(z) of one vector, with its loads; `centred` is x − high."""
    _, back = activations.make(storage, activation)
    load, load_first, splat, size = storage.load, storage.load_first, storage.splat, storage.bytes
    has_activation = activation is not None

    @numba.njit(forceinline=True)
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
    coefficient, lane = _load_lane(storage), 8 if storage.is_double else 4

    @numba.njit(forceinline=True)
    def add(args: Any, offset: Any, stride: Any, rows: Any, j: Any, left: Any, sums: Any, width: Any) -> Any:
        x, dy = load_i64(args + at.X * 8), load_i64(args + at.DY * 8)
        side, g = load_i64(args + at.SIDE * 8), load_i64(args + at.G * 8)
        is_output = load_i64(args + at.IS_OUTPUT * 8) != 0
        at_j = load_i64(args + at.COLUMNS * 8) + j * lane
        high, scale, shift = coefficient(at_j), coefficient(at_j + width * lane), coefficient(at_j + 2 * width * lane)
        total, products = load_v64(sums + j * 8), load_v64(sums + (width + j) * 8)
        for k in range(rows):
            o = offset + k * stride + j * size
            if left >= LANES:
                centred = load(x + o) - high
                value = gradient(centred, dy, side, o, left, is_output, scale, shift)
                if g != 0:
                    store(g + o, value)
            else:
                centred = load_first(x + o, left, high) - high
                value = gradient(centred, dy, side, o, left, is_output, scale, shift)
                if g != 0:
                    store_first(g + o, left, value)
            total = total + widen(value)
            products = fma(widen(value), widen(centred), products)
        store_vector(sums + j * 8, total)
        store_vector(sums + (width + j) * 8, products)

    @numba.njit(forceinline=True)
    def block(args: Any, task: Any, first: Any, rows: Any, columns: Any) -> Any:
        all_columns = load_i64(args + at.GROUP * 8) * load_i64(args + at.FOLD * 8)
        width, stride = padded(all_columns), all_columns * size
        sums = load_i64(args + at.SCRATCH * 8) + task * 2 * width * 8
        if columns == all_columns:
            for j in range(0, 2 * width, LANES):
                store_vector(sums + j * 8, splat64(0.0))
        done = 0
        while done < rows:
            together = min(ROWS_AT_ONCE, rows - done)
            offset = (first + done) * stride
            for j in range(0, columns, LANES):
                add(args, offset, stride, together, j, columns - j, sums, width)
            done += together

    return _blocks(block)


def make_input(storage: Storage, activation: str | None) -> Any:
    """The second sweep back: dx = (x − high) · slope + g · scale + centre."""
    gradient = _gradient(storage, activation)
    load, load_first, store, store_first = storage.load, storage.load_first, storage.store, storage.store_first
    stream, splat, size = storage.stream, storage.splat, storage.bytes
    coefficient, lane = _load_lane(storage), 8 if storage.is_double else 4

    @numba.njit(forceinline=True)
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
                left = columns - j
                o = r * stride + j * size
                at_j = coefficients + j * lane
                high, scale = coefficient(at_j), coefficient(at_j + width)
                slope, centre = coefficient(at_j + 3 * width), coefficient(at_j + 4 * width)
                centred = (load(x + o) if left >= LANES else load_first(x + o, left, splat(0.0))) - high
                if g != 0:
                    value = load(g + o) if left >= LANES else load_first(g + o, left, splat(0.0))
                else:
                    value = gradient(centred, dy, side, o, left, is_output, scale, coefficient(at_j + 2 * width))
                value = fma(centred, slope, fma(value, scale, centre))
                if left < LANES:
                    store_first(dx + o, left, value)
                elif streams:
                    stream(dx + o, value)
                else:
                    store(dx + o, value)

    return _blocks(block)
