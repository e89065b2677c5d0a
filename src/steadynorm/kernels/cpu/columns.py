"""The work between the sweeps of `rows`: sums of columns to statistics, statistics to coefficients.

Vectors of columns at a time where rows are not folded; the same formulas for one column at a time elsewhere.
"""

from functools import cache
from typing import Any, NamedTuple

import numba

from steadynorm.kernels.cpu import arguments as at
from steadynorm.kernels.cpu.arguments import TO_BACK, TO_COEFFICIENTS, TO_MOMENTS, TO_SUMS
from steadynorm.kernels.cpu.frontend import inlined
from steadynorm.kernels.cpu.rows import SUM, padded
from steadynorm.kernels.cpu.simd import (
    LANES,
    Storage,
    first_lane,
    itself,
    load_f64,
    load_i64,
    load_v32,
    load_v64,
    narrowed,
    parameter,
    splat64,
    square_root_of,
    store_f32,
    store_f64,
    store_vector,
    where_positive,
    widen,
)


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

    return _Lanes(load_f64, store_f64, itself, _sum_of, keep, first, parameter, rounded, _not_negative)


def _columns_of_a_vector(storage: Storage) -> _Lanes:
    """For rows that are not folded."""
    load, size, narrow = storage.load, storage.bytes, itself if storage.is_double else narrowed

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
        stages, fold = load_i64(args + at.STAGES * 8), load_i64(args + at.FOLD * 8)
        group = load_i64(args + at.GROUP * 8)
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
                slope = centre = splat(0.0)
                if load_f64(args + at.PER_COUNT * 8) != 0.0:  # else zero, even of sums that are not finite
                    of_var = load(dweight) * per_count * invstd
                    slope = slope - scale * of_var
                    centre = scale * (rest * of_var - load(dbias) * per_count)
                keep(at_c + 3 * width * lane, group, fold, slope)
                keep(at_c + 4 * width * lane, group, fold, centre)

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
