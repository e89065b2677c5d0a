"""Statistics within samples whose channels are last in memory: a sample is a matrix, a group some of its columns.

A unit is a sample. The first sweep leaves sums for every column, which are added over the columns of a group between
the sweeps; the second has coefficients for every column. A large sample is shared by all threads, block of rows by
block. Values are taken less a pivot of their column, the mean of the first valid rows of the block.

Columns that do not fill a vector are done by one that ends with the row and overlaps the one before; its sums are
kept apart, after those of the whole vectors.
"""

from functools import cache
from typing import Any

import numba

from steadynorm.kernels.cpu import activations
from steadynorm.kernels.cpu import samples as at
from steadynorm.kernels.cpu.frontend import inlined
from steadynorm.kernels.cpu.samples import make_add, make_write, make_zero, over_units, place, pool
from steadynorm.kernels.cpu.samples_rows import make_narrow
from steadynorm.kernels.cpu.simd import (
    LANES,
    Storage,
    fma,
    keep_last,
    larger,
    load_f32,
    load_f64,
    load_i64,
    parameter,
    smaller,
    square_root_of,
    store_f32,
    store_f64,
    store_i64,
    store_vector,
)

PIVOT_ROWS = 16
"""Rows whose mean is the pivot: no further from the mean of n rows than sqrt(n / 16) deviations, whatever they hold."""
ROWS_ADDED = 16
"""Rows whose values are added in the arithmetic's precision before the sums are widened: 16 terms a lane."""
COEFFICIENTS = 5
HEAD = 64
"""Bytes at the start of a part, for its number of valid rows."""


@inlined
def padded(columns: Any) -> Any:
    """Columns of a narrow row: whole vectors, and one for the end."""
    return columns // LANES * LANES + LANES


@inlined
def slot_of(c: Any, columns: Any) -> Any:
    """Where the sum of column `c` is in a narrow row."""
    end = columns % LANES
    return c if c < columns - end or columns < LANES else c + LANES - end


@cache
def _make_part_bytes(storage: Storage) -> Any:
    """Bytes of a part: its head, its pivots, two narrow rows and two wide ones."""
    lane = storage.lane_bytes

    @inlined
    def part_bytes(columns: Any) -> Any:
        return HEAD + padded(columns) * (3 * lane + 16)

    return part_bytes


@cache
def _make_places(storage: Storage) -> Any:
    """Of a part: its first and last row; where its head, pivots, narrow and wide sums are."""
    lane, part_bytes = storage.lane_bytes, _make_part_bytes(storage)

    @inlined
    def places(args: Any, part: Any, slot: Any) -> Any:
        splits, outer = place(args, at.SPLITS), place(args, at.OUTER)
        columns = place(args, at.GROUPS) * place(args, at.CHANNELS)
        width, each = padded(columns), (outer + splits - 1) // splits
        head = slot + COEFFICIENTS * width * lane + part * part_bytes(columns)
        pivots = head + HEAD
        narrow = pivots + width * lane
        return (
            smaller(part * each, outer),
            smaller((part + 1) * each, outer),
            head,
            pivots,
            narrow,
            narrow + 2 * width * lane,
        )

    return places


@inlined
def is_valid(mask: Any, row: Any) -> Any:
    """Whether a row of a sample enters its statistics."""
    return mask == 0 or at.load_bool(mask + row) != 0


@cache
def _make_lane(storage: Storage) -> Any:
    """One number in the arithmetic's precision: read, write."""
    is_double, lane = storage.is_double, storage.lane_bytes

    @inlined
    def read(row: Any, i: Any) -> Any:
        return load_f64(row + i * lane) if is_double else numba.float64(load_f32(row + i * lane))

    @inlined
    def keep(row: Any, i: Any, value: Any) -> Any:
        if is_double:
            store_f64(row + i * lane, value)
        else:
            store_f32(row + i * lane, value)

    return read, keep


def make_forward(storage: Storage, activation: str | None) -> Any:
    """Sums of columns, statistics of groups, then y = activation(x̂ · weight + bias + residual) row by row."""
    places, add, (clear, flush) = _make_places(storage), make_add(storage), make_narrow(storage)
    part_bytes = _make_part_bytes(storage)
    set_pivots, gather = _make_pivots(storage), _make_gather(storage)
    (read, _), coefficients, size = _make_lane(storage), _make_coefficients(storage), storage.bytes

    @inlined
    def first(args: Any, unit: Any, part: Any, slot: Any) -> Any:
        start, stop, head, pivots, narrow, wide = places(args, part, slot)
        columns = place(args, at.GROUPS) * place(args, at.CHANNELS)
        width, o = padded(columns), unit * place(args, at.OUTER) * columns * size
        mask = place(args, at.MASK)
        if mask != 0:
            mask += unit * place(args, at.OUTER)
        x, total = place(args, at.X) + o, place(args, at.TOTAL)
        if total != 0:
            addend, total = place(args, at.ADDEND) + o, total + o
            for r in range(start, stop):
                add(x + r * columns * size, addend + r * columns * size, total + r * columns * size, columns)
            x = total
        clear(narrow, wide, 2 * width)
        set_pivots(x, start, stop if place(args, at.IS_CENTRED) != 0 else start, mask, columns, narrow, pivots)
        count = 0
        for r in range(start, stop):
            if is_valid(mask, r):
                gather(x + r * columns * size, columns, pivots, narrow)
                count += 1
                if count % ROWS_ADDED == 0:
                    flush(narrow, wide, 2 * width)
        flush(narrow, wide, 2 * width)
        store_i64(head, count)

    @inlined
    def group_of(wide: Any, pivots: Any, start: Any, channels: Any, columns: Any, per_row: Any, is_centred: Any) -> Any:
        """Mean and variance of a group within a part: those of its columns, which are of the same length, pooled."""
        squares, per_channel = wide + padded(columns) * 8, 1.0 / channels
        mean = var = 0.0
        if is_centred:
            for c in range(start, start + channels):
                mean += read(pivots, c) + load_f64(wide + slot_of(c, columns) * 8) * per_row
            mean *= per_channel
        for c in range(start, start + channels):
            square = load_f64(squares + slot_of(c, columns) * 8) * per_row
            if is_centred:
                shift = load_f64(wide + slot_of(c, columns) * 8) * per_row
                step, square = read(pivots, c) + shift - mean, square - shift * shift
                square = step * step + (0.0 if square < 0.0 else square)
            var += square
        return mean, var * per_channel

    @inlined
    def between(args: Any, unit: Any, slot: Any) -> Any:
        groups, channels = place(args, at.GROUPS), place(args, at.CHANNELS)
        columns, splits = groups * channels, place(args, at.SPLITS)
        is_centred = place(args, at.IS_CENTRED) != 0
        means = place(args, at.MEAN) + unit * groups * 8
        variances = place(args, at.VAR) + unit * groups * 8
        _, _, first_head, pivots, _, wide = places(args, 0, slot)
        apart = part_bytes(columns)
        for group in range(groups):
            count = mean = var = 0.0
            for o in range(0, splits * apart, apart):
                rows = numba.float64(load_i64(first_head + o))
                if rows > 0.0:
                    start, per_row = group * channels, 1.0 / rows
                    found = group_of(wide + o, pivots + o, start, channels, columns, per_row, is_centred)
                    count, mean, var = pool(count, mean, var, rows, found[0], found[1])
            store_f64(means + group * 8, mean)
            store_f64(variances + group * 8, var)
        coefficients(args, unit, slot)

    return over_units(first, between, _make_normalize(storage, activation))


@cache
def _make_pivots(storage: Storage) -> Any:
    """The means of the first valid rows, column by column; zero where there are none."""
    load, load_first, load_lanes = storage.load, storage.load_first, storage.load_lanes
    splat, size, lane, (read, keep) = storage.splat, storage.bytes, storage.lane_bytes, _make_lane(storage)

    @inlined
    def set_pivots(x: Any, start: Any, stop: Any, mask: Any, columns: Any, narrow: Any, pivots: Any) -> Any:
        whole, taken, r = columns // LANES * LANES, 0, start
        while r < stop and taken < PIVOT_ROWS:
            if is_valid(mask, r):
                row = x + r * columns * size
                for i in range(0, whole, LANES):
                    store_vector(narrow + i * lane, load_lanes(narrow + i * lane) + load(row + i * size))
                if whole < columns:
                    if columns >= LANES:
                        value = load(row + (columns - LANES) * size)
                    else:
                        value = load_first(row, columns, splat(0.0))
                    store_vector(narrow + whole * lane, load_lanes(narrow + whole * lane) + value)
                taken += 1
            r += 1
        for i in range(0, padded(columns), LANES):
            store_vector(pivots + i * lane, splat(0.0))
        per_row = 1.0 / larger(taken, 1)
        for c in range(columns):
            keep(pivots, c, read(narrow, slot_of(c, columns)) * per_row)
        for i in range(0, padded(columns), LANES):
            store_vector(narrow + i * lane, splat(0.0))

    return set_pivots


@cache
def _make_gather(storage: Storage) -> Any:
    """Add a row to the narrow sums: x − pivot and its square."""
    load, load_first, load_lanes = storage.load, storage.load_first, storage.load_lanes
    splat, size, lane = storage.splat, storage.bytes, storage.lane_bytes

    @inlined
    def gather_one(value: Any, sums: Any, squares: Any) -> Any:
        store_vector(sums, load_lanes(sums) + value)
        store_vector(squares, fma(value, value, load_lanes(squares)))

    @inlined
    def gather(row: Any, columns: Any, pivots: Any, narrow: Any) -> Any:
        whole = columns // LANES * LANES
        squares = narrow + (whole + LANES) * lane
        for i in range(0, whole, LANES):
            o = i * lane
            gather_one(load(row + i * size) - load_lanes(pivots + o), narrow + o, squares + o)
        if whole < columns:
            if columns >= LANES:
                i = columns - LANES
                value = keep_last(load(row + i * size) - load_lanes(pivots + i * lane), columns - whole)
            else:
                value = load_first(row, columns, splat(0.0)) - load_lanes(pivots)
            gather_one(value, narrow + whole * lane, squares + whole * lane)

    return gather


@cache
def _make_coefficients(storage: Storage) -> Any:
    """Of every column: high, scale and shift of z = (x − high) · scale + shift."""
    is_double, lane, (_, keep) = storage.is_double, storage.lane_bytes, _make_lane(storage)

    @inlined
    def coefficients(args: Any, unit: Any, slot: Any) -> Any:
        groups, channels = place(args, at.GROUPS), place(args, at.CHANNELS)
        width = padded(groups * channels) * lane
        weights, biases = place(args, at.WEIGHT), place(args, at.BIAS)
        weight_bytes, bias_bytes = place(args, at.WEIGHT_BYTES), place(args, at.BIAS_BYTES)
        offset, eps = load_f64(args + at.WEIGHT_OFFSET * 8), load_f64(args + at.EPS * 8)
        for group in range(groups):
            at_group = (unit * groups + group) * 8
            mean = load_f64(place(args, at.MEAN) + at_group)
            invstd = 1.0 / square_root_of(load_f64(place(args, at.VAR) + at_group) + eps)
            high = mean if is_double else numba.float64(numba.float32(mean))
            for c in range(group * channels, (group + 1) * channels):
                scale = (parameter(weights, weight_bytes, c, 1.0) + offset) * invstd
                keep(slot, c, high)
                keep(slot + width, c, scale)
                keep(slot + 2 * width, c, parameter(biases, bias_bytes, c, 0.0) + (high - mean) * scale)

    return coefficients


@cache
def _make_normalize(storage: Storage, activation: str | None) -> Any:
    apply, _ = activations.make(storage, activation)
    load, load_first, load_lanes = storage.load, storage.load_first, storage.load_lanes
    splat, size, lane, zero = storage.splat, storage.bytes, storage.lane_bytes, make_zero(storage)

    @inlined
    def value_at(run: Any, i: Any, n: Any, width: Any) -> Any:
        x, residual, slot = run
        slot += i * lane
        high, scale, shift = load_lanes(slot), load_lanes(slot + width), load_lanes(slot + 2 * width)
        if n == LANES:
            z = fma(load(x + i * size) - high, scale, shift)
            if residual != 0:
                z = z + load(residual + i * size)
        else:
            z = fma(load_first(x, n, splat(0.0)) - high, scale, shift)
            if residual != 0:
                z = z + load_first(residual, n, splat(0.0))
        return apply(z)

    write = make_write(storage, value_at)

    @inlined
    def second(args: Any, unit: Any, part: Any, slot: Any) -> Any:
        splits, outer, mask = place(args, at.SPLITS), place(args, at.OUTER), place(args, at.MASK)
        columns = place(args, at.GROUPS) * place(args, at.CHANNELS)
        width, each, residual = padded(columns) * lane, (outer + splits - 1) // splits, place(args, at.RESIDUAL)
        x, y = place(args, at.TOTAL), place(args, at.Y)
        if x == 0:
            x = place(args, at.X)
        streams = place(args, at.STREAMS) != 0
        if mask != 0:
            mask += unit * outer
        for r in range(smaller(part * each, outer), smaller((part + 1) * each, outer)):
            o = (unit * outer + r) * columns * size
            if is_valid(mask, r):
                write((x + o, residual + o if residual != 0 else 0, slot), y + o, columns, width, streams)
            else:
                zero(y + o, columns)

    return second


def make_backward(storage: Storage, activation: str | None) -> Any:
    """h = g · weight; dx = (h − mean(h) − x̂ · mean(h·x̂)) · invstd + dtotal, the first mean only where it is centred."""
    places, (clear, flush), gather = _make_places(storage), make_narrow(storage), _make_sums(storage, activation)
    coefficients, size, zero = _make_coefficients(storage), storage.bytes, make_zero(storage)

    @inlined
    def first(args: Any, unit: Any, part: Any, slot: Any) -> Any:
        start, stop, head, _, narrow, wide = places(args, part, slot)
        columns, outer = place(args, at.GROUPS) * place(args, at.CHANNELS), place(args, at.OUTER)
        x, dy, side, g = place(args, at.X), place(args, at.DY), place(args, at.SIDE), place(args, at.G)
        width, mask, is_output = padded(columns), place(args, at.MASK), place(args, at.IS_OUTPUT) != 0
        if mask != 0:
            mask += unit * outer
        # Every part of a unit writes the same here, which it needs at once.
        coefficients(args, unit, slot)
        clear(narrow, wide, 2 * width)
        count = 0
        for r in range(start, stop):
            o = (unit * outer + r) * columns * size
            if is_valid(mask, r):
                run = x + o, dy + o, side + o if side != 0 else 0, g + o if g != 0 else 0, slot, is_output
                gather(run, columns, narrow)
                count += 1
                if count % ROWS_ADDED == 0:
                    flush(narrow, wide, 2 * width)
            elif g != 0:
                zero(g + o, columns)
        flush(narrow, wide, 2 * width)
        store_i64(head, count)

    return over_units(first, _make_between(storage), _make_input(storage, activation))


@cache
def _make_gradient(storage: Storage, activation: str | None) -> Any:
    """x − high and g of a vector; lanes after the first `n` are zero in g."""
    _, back = activations.make(storage, activation)
    has_activation, size, lane = activation is not None, storage.bytes, storage.lane_bytes
    load, load_first, load_lanes, splat = storage.load, storage.load_first, storage.load_lanes, storage.splat

    @inlined
    def values_at(run: Any, i: Any, n: Any, width: Any) -> Any:
        x, dy, side, _, slot, is_output = run
        o, zero = i * size, splat(0.0)
        slot += i * lane
        beside = zero
        if n == LANES:
            centred, value = load(x + o) - load_lanes(slot), load(dy + o)
            if has_activation and side != 0:
                beside = load(side + o)
        else:
            centred, value = load_first(x, n, zero) - load_lanes(slot), load_first(dy, n, zero)
            if has_activation and side != 0:
                beside = load_first(side, n, zero)
        if has_activation:
            if is_output:
                value = back(beside, value)
            else:
                z = fma(centred, load_lanes(slot + width), load_lanes(slot + 2 * width))
                value = back(z + beside, value)
        return centred, value

    return values_at


@cache
def _make_sums(storage: Storage, activation: str | None) -> Any:
    """Add a row to the narrow sums: g and g·(x − high); g kept where asked for."""
    load_lanes, store, store_first = storage.load_lanes, storage.store, storage.store_first
    size, lane, values_at = storage.bytes, storage.lane_bytes, _make_gradient(storage, activation)

    @inlined
    def gather_one(centred: Any, value: Any, totals: Any, products: Any) -> Any:
        store_vector(totals, load_lanes(totals) + value)
        store_vector(products, fma(value, centred, load_lanes(products)))

    @inlined
    def gather(run: Any, columns: Any, narrow: Any) -> Any:
        _, _, _, g, _, _ = run
        whole = columns // LANES * LANES
        width = (whole + LANES) * lane
        end, rest = narrow + whole * lane, columns - whole
        if rest > 0:
            # Read before anything is written near it, for g may be kept where it is read.
            if columns < LANES:
                centred, value = values_at(run, 0, columns, width)
                if g != 0:
                    store_first(g, columns, value)
                gather_one(centred, value, end, end + width)
                return
            centred, value = values_at(run, columns - LANES, LANES, width)
            gather_one(keep_last(centred, rest), keep_last(value, rest), end, end + width)
        else:
            value = load_lanes(narrow)
        for i in range(0, whole, LANES):
            centred, other = values_at(run, i, LANES, width)
            if g != 0:
                store(g + i * size, other)
            gather_one(centred, other, narrow + i * lane, narrow + i * lane + width)
        if rest > 0 and g != 0:
            store(g + (columns - LANES) * size, value)

    return gather


@cache
def _make_between(storage: Storage) -> Any:
    """Sums of columns and of groups, and slope and centre of dx = (x − high) · slope + g · scale + centre."""
    places, is_double, lane = _make_places(storage), storage.is_double, storage.lane_bytes
    part_bytes, (_, keep) = _make_part_bytes(storage), _make_lane(storage)

    @inlined
    def between(args: Any, unit: Any, slot: Any) -> Any:
        groups, channels = place(args, at.GROUPS), place(args, at.CHANNELS)
        columns, splits = groups * channels, place(args, at.SPLITS)
        width, is_centred = padded(columns), place(args, at.IS_CENTRED) != 0
        weights, weight_bytes = place(args, at.WEIGHT), place(args, at.WEIGHT_BYTES)
        offset, eps = load_f64(args + at.WEIGHT_OFFSET * 8), load_f64(args + at.EPS * 8)
        _, _, first_head, _, _, wide = places(args, 0, slot)
        rows, apart = 0, part_bytes(columns)
        for o in range(0, splits * apart, apart):
            rows += load_i64(first_head + o)
        per_count = 1.0 / (larger(rows, 1) * channels)
        products = place(args, at.PRODUCTS) + unit * columns * 8
        totals = place(args, at.TOTALS) + unit * columns * 8
        for group in range(groups):
            mean = load_f64(place(args, at.MEAN) + (unit * groups + group) * 8)
            var = load_f64(place(args, at.VAR) + (unit * groups + group) * 8)
            high = mean if is_double else numba.float64(numba.float32(mean))
            rest, invstd = high - mean, 1.0 / square_root_of(var + eps)
            of_mean = of_var = 0.0
            for c in range(group * channels, (group + 1) * channels):
                total = product = 0.0
                at_c = wide + slot_of(c, columns) * 8
                for o in range(at_c, at_c + splits * apart, apart):
                    total += load_f64(o)
                    product += load_f64(o + width * 8)
                product = (product + rest * total) * invstd
                store_f64(totals + c * 8, total)
                store_f64(products + c * 8, product)
                weight = parameter(weights, weight_bytes, c, 1.0) + offset
                of_mean += weight * total
                of_var += weight * product
            of_mean = of_mean * per_count if is_centred else 0.0
            slope = -of_var * per_count * invstd * invstd
            for c in range(group * channels, (group + 1) * channels):
                keep(slot + 3 * width * lane, c, slope)
                keep(slot + 4 * width * lane, c, rest * slope - invstd * of_mean)

    return between


@cache
def _make_input(storage: Storage, activation: str | None) -> Any:
    load, load_first, load_lanes, splat = storage.load, storage.load_first, storage.load_lanes, storage.splat
    size, lane, zero = storage.bytes, storage.lane_bytes, make_zero(storage)
    values_at = _make_gradient(storage, activation)

    @inlined
    def value_at(run: Any, i: Any, n: Any, factors: Any) -> Any:
        inputs, dtotal = run
        x, _, _, g, slot, _ = inputs
        slot, o, nothing, width = slot + i * lane, i * size, splat(0.0), factors
        if g != 0:
            centred = (load(x + o) if n == LANES else load_first(x, n, nothing)) - load_lanes(slot)
            value = load(g + o) if n == LANES else load_first(g, n, nothing)
        else:
            centred, value = values_at(inputs, i, n, width)
        more = nothing
        if dtotal != 0:
            more = load(dtotal + o) if n == LANES else load_first(dtotal, n, nothing)
        scale, slope, centre = load_lanes(slot + width), load_lanes(slot + 3 * width), load_lanes(slot + 4 * width)
        return fma(centred, slope, fma(value, scale, centre)) + more

    write = make_write(storage, value_at)

    @inlined
    def second(args: Any, unit: Any, part: Any, slot: Any) -> Any:
        splits, outer, mask = place(args, at.SPLITS), place(args, at.OUTER), place(args, at.MASK)
        columns = place(args, at.GROUPS) * place(args, at.CHANNELS)
        width, each = padded(columns) * lane, (outer + splits - 1) // splits
        x, dy, dx = place(args, at.X), place(args, at.DY), place(args, at.DX)
        side, g, dtotal = place(args, at.SIDE), place(args, at.G), place(args, at.DTOTAL)
        is_output, streams = place(args, at.IS_OUTPUT) != 0, place(args, at.STREAMS) != 0
        if mask != 0:
            mask += unit * outer
        for r in range(smaller(part * each, outer), smaller((part + 1) * each, outer)):
            o = (unit * outer + r) * columns * size
            if is_valid(mask, r):
                inputs = x + o, dy + o, side + o if side != 0 else 0, g + o if g != 0 else 0, slot, is_output
                write((inputs, dtotal + o if dtotal != 0 else 0), dx + o, columns, width, streams)
            else:
                zero(dx + o, columns)

    return second
