"""Statistics over the batch: the four functions of the contract, and their fusions for channels of few values.

Grids are one long dimension, `splits` times the units (see `tiles`), so that no limit of the device is near. Where one
program sees all values of a channel (`splits` = 1) it finishes them; else the parts, float64, are put together by
`merge_moments` or `merge_sums`, in a fixed order: the same input gives the same bits.
"""

import triton
import triton.language as tl

from steadynorm.kernels.gpu.activations import activate, gradient_at
from steadynorm.kernels.gpu.tiles import (
    channels,
    count_of,
    halves,
    is_valid,
    keep,
    load,
    numbers,
    own_span,
    own_span_backwards,
    parameter,
    place,
    spread,
    total,
    values_in,
)


@triton.jit
def _moments(x, mask, span, sizes, TILE: tl.constexpr):
    """Count, mean and sum of squared deviations of a span, in float64.

    Differences from a pivot are added in the lanes of a tile, each a short chain; the lanes by a tree. The pivot is the
    mean of the first chunk that has a valid value.
    """
    OUTER: tl.constexpr = TILE[0]
    INNER: tl.constexpr = TILE[1]
    STAGES: tl.constexpr = TILE[3]
    ACC: tl.constexpr = tl.float64 if TILE[4] else tl.float32
    unit, first, last = span
    channel, _ = channels(unit, sizes[1], TILE)
    seen = tl.cast(channel * 0, tl.int64)
    offset, at, there = place(first, unit, sizes, TILE)
    valid = is_valid(mask, at, there)
    values = tl.where(valid, load(x, offset, there, ACC), 0)
    pivot = total(values, TILE) / tl.maximum(total(valid.to(ACC), TILE), 1)
    sums = tl.zeros((OUTER, INNER), ACC)
    squares = tl.zeros((OUTER, INNER), ACC)
    for chunk in tl.range(first, last, num_stages=STAGES):
        offset, at, there = place(chunk, unit, sizes, TILE)
        values = load(x, offset, there, ACC)
        valid = is_valid(mask, at, there)
        if mask is None:
            seen += values_in(chunk, sizes, TILE)
        else:
            here = total(valid.to(tl.int32), TILE)
            # As long as nothing was seen nothing has been added, and the pivot may still be chosen.
            mean = total(tl.where(valid, values, 0), TILE) / tl.maximum(here, 1).to(ACC)
            pivot = tl.where(seen == 0, mean, pivot)
            seen += here
        values = tl.where(valid, values - spread(pivot, TILE), 0)
        sums += values
        squares += values * values
    count = seen.to(tl.float64)
    shift = total(sums, TILE).to(tl.float64)
    away = shift / tl.maximum(count, 1)
    deviations = total(squares, TILE).to(tl.float64) - shift * away
    return count, pivot.to(tl.float64) + away, tl.where(deviations < 0, 0, deviations)


@triton.jit
def moments(
    x, mask, mean_out, var_out, count_out, outer, group, inner, chunks, splits, units,
    IS_WHOLE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Mean and var (group,); or, not IS_WHOLE, mean and sum of squares (splits, group) and count (splits, group)."""
    span = own_span(chunks, splits, units)
    count, mean, deviations = _moments(x, mask, span, (outer, group, inner), TILE)
    channel, is_channel = channels(span[0], group, TILE)
    if IS_WHOLE:
        tl.store(mean_out + channel, mean, mask=is_channel)
        tl.store(var_out + channel, deviations / tl.maximum(count, 1), mask=is_channel)
    else:
        at = tl.cast(tl.program_id(0) // units, tl.int64) * group + channel
        tl.store(mean_out + at, mean, mask=is_channel)
        tl.store(var_out + at, deviations, mask=is_channel)
        tl.store(count_out + at, count, mask=is_channel)


@triton.jit
def merge_moments(
    means, deviations, counts, mean_out, var_out, group, splits, PARTS: tl.constexpr, CHANNELS: tl.constexpr
):
    """Mean and var (group,) of parts (splits, group): `steadynorm.moments.merge`, all parts at once."""
    part = tl.arange(0, PARTS)[:, None]
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    there = (part < splits) & (channel < group)[None, :]
    at = part.to(tl.int64) * group + channel[None, :]
    count = tl.load(counts + at, mask=there, other=0.0)
    mean = tl.load(means + at, mask=there, other=0.0)
    inside = tl.load(deviations + at, mask=there, other=0.0)
    n = tl.maximum(tl.sum(count, 0), 1)
    merged = tl.sum(count * mean, 0) / n
    between = tl.where(count > 0, mean - merged[None, :], 0)
    var = tl.sum(inside + count * between * between, 0) / n
    tl.store(mean_out + channel, merged, mask=channel < group)
    tl.store(var_out + channel, var, mask=channel < group)


@triton.jit
def _normalize(
    x, residual, mask, y, statistics, affine, span, sizes,
    EPS: tl.constexpr, ACTIVATION: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """y of a span; `statistics` and `affine` are values and pointers for its channels."""
    STAGES: tl.constexpr = TILE[3]
    ACC: tl.constexpr = tl.float64 if TILE[4] else tl.float32
    mean, var = statistics
    weight, bias = affine
    unit, first, last = span
    channel, is_channel = channels(unit, sizes[1], TILE)
    high, low = halves(mean, ACC)
    scale = tl.rsqrt(var + EPS).to(ACC) * parameter(weight, channel, is_channel, 1.0, ACC)
    shift = parameter(bias, channel, is_channel, 0.0, ACC) - low * scale
    high, scale, shift = spread(high, TILE), spread(scale, TILE), spread(shift, TILE)
    for step in tl.range(first, last, num_stages=STAGES):
        chunk = last - 1 - (step - first)  # what was read last is in the cache
        offset, at, there = place(chunk, unit, sizes, TILE)
        z = (load(x, offset, there, ACC) - high) * scale + shift
        if residual is not None:
            z += load(residual, offset, there, ACC)
        z = activate(z, ACTIVATION)
        if mask is not None:
            z = tl.where(is_valid(mask, at, there), z, 0)
        tl.store(y + offset, z, mask=there)


@triton.jit
def normalize(
    x, residual, mask, y, mean, var, weight, bias, outer, group, inner, chunks, splits, units,
    EPS: tl.constexpr, ACTIVATION: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """y = activation(weight · x̂ + bias + residual) for given mean and var (group,)."""
    span = own_span_backwards(chunks, splits, units)
    statistics = numbers(mean, var, span[0], group, 1.0, TILE)
    sizes = (outer, group, inner)
    _normalize(x, residual, mask, y, statistics, (weight, bias), span, sizes, EPS, ACTIVATION, TILE)


@triton.jit
def forward(
    x, residual, mask, y, mean_out, var_out, weight, bias, outer, group, inner, chunks, splits, units,
    EPS: tl.constexpr, ACTIVATION: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """`moments`, then `normalize`, of a unit whose values a cache holds meanwhile."""
    span = own_span(chunks, splits, units)
    sizes = (outer, group, inner)
    count, mean, deviations = _moments(x, mask, span, sizes, TILE)
    var = deviations / tl.maximum(count, 1)
    channel, is_channel = channels(span[0], group, TILE)
    tl.store(mean_out + channel, mean, mask=is_channel)
    tl.store(var_out + channel, var, mask=is_channel)
    _normalize(x, residual, mask, y, (mean, var), (weight, bias), span, sizes, EPS, ACTIVATION, TILE)


@triton.jit
def _constants(statistics, affine, unit, group, EPS: tl.constexpr, TILE: tl.constexpr):
    """What `_gradient` needs of each channel, as it meets a tile: high and low · invstd, invstd, weight, bias."""
    ACC: tl.constexpr = tl.float64 if TILE[4] else tl.float32
    mean, var = statistics
    channel, is_channel = channels(unit, group, TILE)
    high, low = halves(mean, ACC)
    invstd = tl.rsqrt(var + EPS).to(ACC)
    weight = parameter(affine[0], channel, is_channel, 1.0, ACC)
    bias = parameter(affine[1], channel, is_channel, 0.0, ACC)
    return (
        spread(high, TILE),
        spread(low * invstd, TILE),
        spread(invstd, TILE),
        spread(weight, TILE),
        spread(bias, TILE),
    )


@triton.jit
def _gradient(dy, x, side, mask, where, constants, ACTIVATION: tl.constexpr, TILE: tl.constexpr):
    """x̂ and g of a chunk, zero where nothing is valid."""
    ACC: tl.constexpr = tl.float64 if TILE[4] else tl.float32
    offset, at, there = where
    high, low, invstd, weight, bias = constants
    normalized = (load(x, offset, there, ACC) - high) * invstd - low
    g = gradient_at(dy, side, offset, there, normalized, weight, bias, ACTIVATION, ACC)
    valid = is_valid(mask, at, there)
    return tl.where(valid, normalized, 0), tl.where(valid, g, 0)


@triton.jit
def _sums(
    dy, x, side, mask, g_out, statistics, affine, span, sizes,
    EPS: tl.constexpr, ACTIVATION: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Σ g·x̂ and Σ g of a span, in float64; g is written where there is a place for it."""
    OUTER: tl.constexpr = TILE[0]
    INNER: tl.constexpr = TILE[1]
    STAGES: tl.constexpr = TILE[3]
    ACC: tl.constexpr = tl.float64 if TILE[4] else tl.float32
    unit, first, last = span
    constants = _constants(statistics, affine, unit, sizes[1], EPS, TILE)
    products = tl.zeros((OUTER, INNER), ACC)
    totals = tl.zeros((OUTER, INNER), ACC)
    for chunk in tl.range(first, last, num_stages=STAGES):
        where = place(chunk, unit, sizes, TILE)
        normalized, g = _gradient(dy, x, side, mask, where, constants, ACTIVATION, TILE)
        products += g * normalized
        totals += g
        if g_out is not None:
            tl.store(g_out + where[0], g, mask=where[2])
    return total(products, TILE).to(tl.float64), total(totals, TILE).to(tl.float64)


@triton.jit
def sums(
    dy, x, residual, y, mask, g_out, mean, var, weight, bias, dweight_out, dbias_out,
    outer, group, inner, chunks, splits, units,
    EPS: tl.constexpr, ACTIVATION: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Σ g·x̂ and Σ g (splits, group), which `merge_sums` adds up where there is more than one split."""
    span = own_span(chunks, splits, units)
    statistics = numbers(mean, var, span[0], group, 1.0, TILE)
    sizes = (outer, group, inner)
    dweight, dbias = _sums(
        dy, x, (residual, y), mask, g_out, statistics, (weight, bias), span, sizes, EPS, ACTIVATION, TILE
    )
    channel, is_channel = channels(span[0], group, TILE)
    at = tl.cast(tl.program_id(0) // units, tl.int64) * group + channel
    tl.store(dweight_out + at, dweight, mask=is_channel)
    tl.store(dbias_out + at, dbias, mask=is_channel)


@triton.jit
def merge_sums(
    dweights, dbiases, dweight_out, dbias_out, weight_gradient, bias_gradient, group, splits,
    PARTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Sums (group,) of sums (splits, group); and, where there is a place for them, in the types of weight and bias."""
    part = tl.arange(0, PARTS)[:, None]
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    there = (part < splits) & (channel < group)[None, :]
    at = part.to(tl.int64) * group + channel[None, :]
    dweight = tl.sum(tl.load(dweights + at, mask=there, other=0.0), 0)
    dbias = tl.sum(tl.load(dbiases + at, mask=there, other=0.0), 0)
    tl.store(dweight_out + channel, dweight, mask=channel < group)
    tl.store(dbias_out + channel, dbias, mask=channel < group)
    if weight_gradient is not None:
        keep(weight_gradient, channel, dweight, channel < group)
    if bias_gradient is not None:
        keep(bias_gradient, channel, dbias, channel < group)


@triton.jit
def _input(
    dy, x, side, mask, dx, statistics, affine, sums, span, sizes,
    EPS: tl.constexpr, ACTIVATION: tl.constexpr, IS_GIVEN: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """dx of a span; `sums` are Σ g·x̂ / n and Σ g / n of its channels."""
    STAGES: tl.constexpr = TILE[3]
    ACC: tl.constexpr = tl.float64 if TILE[4] else tl.float32
    unit, first, last = span
    constants = _constants(statistics, affine, unit, sizes[1], EPS, TILE)
    slope = constants[2] * constants[3]
    product, constant = spread(sums[0].to(ACC), TILE), spread(sums[1].to(ACC), TILE)
    for step in tl.range(first, last, num_stages=STAGES):
        chunk = last - 1 - (step - first)  # what was read last is in the cache
        where = place(chunk, unit, sizes, TILE)
        normalized, g = _gradient(dy, x, side, mask, where, constants, ACTIVATION, TILE)
        if not IS_GIVEN:
            g = g - constant - normalized * product
        g = g * slope
        if mask is not None:
            g = tl.where(is_valid(mask, where[1], where[2]), g, 0)
        tl.store(dx + where[0], g, mask=where[2])


@triton.jit
def input_gradient(
    dy, x, residual, y, mask, dx, mean, var, weight, bias, dweight, dbias, count, plain_count,
    outer, group, inner, chunks, splits, units,
    EPS: tl.constexpr, ACTIVATION: tl.constexpr, IS_GIVEN: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """dx for sums (group,), which may be None if IS_GIVEN. `dy` is g where there is no activation."""
    span = own_span_backwards(chunks, splits, units)
    statistics = numbers(mean, var, span[0], group, 1.0, TILE)
    sums = statistics  # of given statistics no sum is looked at
    if not IS_GIVEN:
        dweight, dbias = numbers(dweight, dbias, span[0], group, 0.0, TILE)
        n = tl.maximum(count_of(count, plain_count), 1)
        sums = dweight / n, dbias / n
    _input(
        dy, x, (residual, y), mask, dx, statistics, (weight, bias), sums, span,
        (outer, group, inner), EPS, ACTIVATION, IS_GIVEN, TILE,
    )  # fmt: skip


@triton.jit
def backward(
    dy, x, residual, y, mask, g_out, dx, mean, var, weight, bias, dweight_out, dbias_out, count, plain_count,
    outer, group, inner, chunks, splits, units,
    EPS: tl.constexpr, ACTIVATION: tl.constexpr, IS_GIVEN: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """`sums`, then `input_gradient`, of a unit whose values a cache holds meanwhile."""
    span = own_span(chunks, splits, units)
    sizes = (outer, group, inner)
    statistics = numbers(mean, var, span[0], group, 1.0, TILE)
    side, affine = (residual, y), (weight, bias)
    dweight, dbias = _sums(dy, x, side, mask, g_out, statistics, affine, span, sizes, EPS, ACTIVATION, TILE)
    channel, is_channel = channels(span[0], group, TILE)
    keep(dweight_out, channel, dweight, is_channel)
    keep(dbias_out, channel, dbias, is_channel)
    n = tl.maximum(count_of(count, plain_count), 1)
    _input(
        dy, x, side, mask, dx, statistics, affine, (dweight / n, dbias / n), span, sizes,
        EPS, ACTIVATION, IS_GIVEN, TILE,
    )  # fmt: skip
