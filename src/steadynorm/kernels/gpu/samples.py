"""Statistics within a sample, chunk by chunk (see `sample_tiles`): whatever the registers of a program do not hold.

Where one program sees all values of a statistic it finishes them in one launch, and a cache holds them meanwhile. Else
each leaves a part, float64; whoever needs the whole puts the parts together, in a fixed order: the same input gives the
same bits. The sums of a channel are left by every chunk, and `columns.merge` adds them up.
"""

import triton
import triton.language as tl

from steadynorm.kernels.gpu.sample_tiles import (
    affine,
    channels_of,
    part_of,
    place,
    spread,
    statistics,
    total,
    total_of_channels,
    values_in,
)
from steadynorm.kernels.gpu.sample_values import added, finish, gradients, leave, valid
from steadynorm.kernels.gpu.tiles import halves, keep, load, own_span


@triton.jit
def _moments(x, addend, total_out, mask, span, sizes, IS_CENTRED: tl.constexpr, TILE: tl.constexpr):
    """Count, mean and sum of squared deviations of a span, in float64; not centred, zero and the sum of squares.

    Differences from a pivot are added in the lanes of a tile, each a short chain; the lanes by a tree. The pivot is the
    mean of the first chunk that has a valid value.
    """
    OUTER: tl.constexpr = TILE[0]
    GROUPS: tl.constexpr = TILE[1]
    CHANNELS: tl.constexpr = TILE[2]
    INNER: tl.constexpr = TILE[3]
    STAGES: tl.constexpr = TILE[5]
    ACC: tl.constexpr = tl.float64 if TILE[6] else tl.float32
    unit, first, last = span
    at, _ = statistics(unit, sizes, TILE)
    seen = at * 0
    pivot = seen.to(ACC)
    if IS_CENTRED:
        where = place(first, unit, sizes, TILE)
        is_there = valid(mask, where)
        values = tl.where(is_there, added(x, addend, None, where, ACC), 0)
        pivot = total(values, TILE) / tl.maximum(total(is_there.to(ACC), TILE), 1)
    sums = tl.zeros((OUTER, GROUPS, CHANNELS, INNER), ACC)
    squares = tl.zeros((OUTER, GROUPS, CHANNELS, INNER), ACC)
    for chunk in tl.range(first, last, num_stages=STAGES):
        where = place(chunk, unit, sizes, TILE)
        values = added(x, addend, total_out, where, ACC)
        is_there = valid(mask, where)
        if mask is None:
            seen += values_in(chunk, unit, sizes, TILE)
        else:
            here = total(is_there.to(tl.int32), TILE)
            if IS_CENTRED:
                # As long as nothing was seen nothing has been added, and the pivot may still be chosen.
                mean = total(tl.where(is_there, values, 0), TILE) / tl.maximum(here, 1).to(ACC)
                pivot = tl.where(seen == 0, mean, pivot)
            seen += here
        values = tl.where(is_there, values - spread(pivot, TILE), 0)
        if IS_CENTRED:
            sums += values
        squares += values * values
    count = seen.to(tl.float64)
    shift = total(sums, TILE).to(tl.float64)
    away = shift / tl.maximum(count, 1)
    deviations = total(squares, TILE).to(tl.float64) - shift * away
    return count, pivot.to(tl.float64) + away, tl.where(deviations < 0, 0, deviations)


@triton.jit
def _normalize(
    source, residual, mask, y, moments, parameters, span, sizes,
    EPS: tl.constexpr, ACTIVATION: tl.constexpr, OFFSET: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """y of a span; `moments` are values, `parameters` pointers."""
    STAGES: tl.constexpr = TILE[5]
    ACC: tl.constexpr = tl.float64 if TILE[6] else tl.float32
    mean, var = moments
    unit, first, last = span
    high, low = halves(mean, ACC)
    invstd = tl.rsqrt(var + EPS).to(ACC)
    high, low, invstd = spread(high, TILE), spread(low * invstd, TILE), spread(invstd, TILE)
    for chunk in tl.range(first, last, num_stages=STAGES):
        where = place(chunk, unit, sizes, TILE)
        scaling = affine(parameters[0], parameters[1], chunk, unit, sizes, OFFSET, TILE)
        normalized = (load(source, where[0], where[3], ACC) - high) * invstd - low
        finish(normalized, residual, mask, y, where, scaling, ACTIVATION, ACC)


@triton.jit
def forward(
    x, addend, residual, mask, y, total_out, mean_out, var_out, weight, bias,
    outer, groups, channels, inner, chunks, splits, units,
    EPS: tl.constexpr, ACTIVATION: tl.constexpr, IS_CENTRED: tl.constexpr, OFFSET: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """y, total, mean and var of a unit."""
    span = own_span(chunks, splits, units)
    sizes = (outer, groups, channels, inner)
    count, mean, deviations = _moments(x, addend, total_out, mask, span, sizes, IS_CENTRED, TILE)
    var = deviations / tl.maximum(count, 1)
    at, there = statistics(span[0], sizes, TILE)
    tl.store(mean_out + at, mean, mask=there)
    tl.store(var_out + at, var, mask=there)
    if addend is not None:
        # What one thread has written another may read.
        tl.debug_barrier()
        _normalize(
            total_out, residual, mask, y, (mean, var), (weight, bias), span, sizes, EPS, ACTIVATION, OFFSET, TILE
        )
    else:
        _normalize(x, residual, mask, y, (mean, var), (weight, bias), span, sizes, EPS, ACTIVATION, OFFSET, TILE)


@triton.jit
def _leave(parts, one, two, three, span, sizes, units, TILE: tl.constexpr):
    """Write three numbers of each statistic to parts (3, splits, statistics)."""
    at, there = statistics(span[0], sizes, TILE)
    width, splits, out = parts
    at += tl.cast(tl.program_id(0) // units, tl.int64) * width
    tl.store(out + at, one, mask=there)
    tl.store(out + splits * width + at, two, mask=there)
    tl.store(out + 2 * splits * width + at, three, mask=there)


@triton.jit
def _parts(parts, span, sizes, PARTS: tl.constexpr, TILE: tl.constexpr):
    """What `_leave` wrote for the statistics of a unit: three times (PARTS, statistics)."""
    at, there = statistics(span[0], sizes, TILE)
    width, splits, out = parts
    part = tl.arange(0, PARTS)[:, None]
    there = (part < splits) & there[None, :]
    at = part * width + at[None, :]
    one = tl.load(out + at, mask=there, other=0.0)
    two = tl.load(out + splits * width + at, mask=there, other=0.0)
    return one, two, tl.load(out + 2 * splits * width + at, mask=there, other=0.0)


@triton.jit
def moments(
    x, addend, mask, total_out, parts, width, outer, groups, channels, inner, chunks, splits, units,
    IS_CENTRED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """total, and count, mean and sum of squared deviations of a span, to parts (3, splits, width)."""
    span = own_span(chunks, splits, units)
    sizes = (outer, groups, channels, inner)
    count, mean, deviations = _moments(x, addend, total_out, mask, span, sizes, IS_CENTRED, TILE)
    _leave((tl.cast(width, tl.int64), splits, parts), count, mean, deviations, span, sizes, units, TILE)


@triton.jit
def normalize(
    source, residual, mask, y, mean_out, var_out, weight, bias, parts, width,
    outer, groups, channels, inner, chunks, splits, units,
    EPS: tl.constexpr, ACTIVATION: tl.constexpr, OFFSET: tl.constexpr, PARTS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Mean and var of what `moments` left (`steadynorm.moments.merge`, all parts at once), and y of a span."""
    span = own_span(chunks, splits, units)
    sizes = (outer, groups, channels, inner)
    count, mean, inside = _parts((tl.cast(width, tl.int64), splits, parts), span, sizes, PARTS, TILE)
    n = tl.maximum(tl.sum(count, 0), 1)
    merged = tl.sum(count * mean, 0) / n
    between = tl.where(count > 0, mean - merged[None, :], 0)
    var = tl.sum(inside + count * between * between, 0) / n
    at, there = statistics(span[0], sizes, TILE)
    if tl.program_id(0) < units:
        tl.store(mean_out + at, merged, mask=there)
        tl.store(var_out + at, var, mask=there)
    _normalize(source, residual, mask, y, (merged, var), (weight, bias), span, sizes, EPS, ACTIVATION, OFFSET, TILE)


@triton.jit
def _constants(mean, var, unit, sizes, EPS: tl.constexpr, TILE: tl.constexpr):
    """What `gradients` needs of each statistic, as it meets a tile: high and low · invstd, invstd."""
    ACC: tl.constexpr = tl.float64 if TILE[6] else tl.float32
    at, there = statistics(unit, sizes, TILE)
    high, low = halves(tl.load(mean + at, mask=there, other=0.0), ACC)
    invstd = tl.rsqrt(tl.load(var + at, mask=there, other=1.0) + EPS).to(ACC)
    return spread(high, TILE), spread(low * invstd, TILE), spread(invstd, TILE)


@triton.jit
def _sums(
    dy, x, side, mask, moments, parameters, sums_out, part, span, sizes,
    EPS: tl.constexpr, ACTIVATION: tl.constexpr, IS_CENTRED: tl.constexpr, OFFSET: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Count, Σ h·x̂ and Σ h of a span, in float64.

    Of one block of channels it adds up g·x̂ and g channel by channel, which is what weight and bias want, and the rest
    follows from that: nothing is put together across a program before its last chunk.
    """
    OUTER: tl.constexpr = TILE[0]
    GROUPS: tl.constexpr = TILE[1]
    CHANNELS: tl.constexpr = TILE[2]
    INNER: tl.constexpr = TILE[3]
    STAGES: tl.constexpr = TILE[5]
    ACC: tl.constexpr = tl.float64 if TILE[6] else tl.float32
    IS_ONE_BLOCK: tl.constexpr = TILE[8]
    unit, first, last = span
    constants = _constants(moments[0], moments[1], unit, sizes, EPS, TILE)
    at, _ = statistics(unit, sizes, TILE)
    seen = at * 0
    products = tl.zeros((OUTER, GROUPS, CHANNELS, INNER), ACC)
    totals = tl.zeros((OUTER, GROUPS, CHANNELS, INNER), ACC)
    for chunk in tl.range(first, last, num_stages=STAGES):
        where = place(chunk, unit, sizes, TILE)
        scaling = affine(parameters[0], parameters[1], chunk, unit, sizes, OFFSET, TILE)
        normalized, g = gradients(dy, x, side, mask, where, constants, scaling, ACTIVATION, ACC)
        if mask is None:
            seen += values_in(chunk, unit, sizes, TILE)
        else:
            seen += total(valid(mask, where).to(tl.int32), TILE)
        h = g if IS_ONE_BLOCK else g * scaling[0]
        products += h * normalized
        if IS_CENTRED or (IS_ONE_BLOCK and sums_out[1] is not None):
            totals += h
    count = seen.to(tl.float64)
    if not IS_ONE_BLOCK:
        return count, total(products, TILE).to(tl.float64), total(totals, TILE).to(tl.float64)
    else:
        of_weight, of_bias = total_of_channels(products), total_of_channels(totals)
        at, there, _ = channels_of(0, unit, sizes, TILE)
        at += part * sizes[1] * sizes[2]
        if sums_out[0] is not None:
            keep(sums_out[0], at, of_weight, there)
        if sums_out[1] is not None:
            keep(sums_out[1], at, of_bias, there)
        scale, _ = affine(parameters[0], None, 0, unit, sizes, OFFSET, TILE)
        product = total(scale.to(tl.float64) * of_weight[None, :, :, None], TILE)
        return count, product, total(scale.to(tl.float64) * of_bias[None, :, :, None], TILE)


@triton.jit
def _input(
    dy, dtotal, x, side, mask, g_out, dx, moments, parameters, means, sums_out, span, sizes,
    EPS: tl.constexpr, ACTIVATION: tl.constexpr, IS_CENTRED: tl.constexpr, OFFSET: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """dx and g of a span; of more than one block of channels also Σ g·x̂ and Σ g of the channels of each chunk.

    `means` are those of h·x̂ and h.
    """
    IS_ONE_BLOCK: tl.constexpr = TILE[8]
    STAGES: tl.constexpr = TILE[5]
    ACC: tl.constexpr = tl.float64 if TILE[6] else tl.float32
    unit, first, last = span
    constants = _constants(moments[0], moments[1], unit, sizes, EPS, TILE)
    product, constant = spread(means[0].to(ACC), TILE), spread(means[1].to(ACC), TILE)
    width = tl.cast(sizes[1], tl.int64) * sizes[2]
    for chunk in tl.range(first, last, num_stages=STAGES):
        where = place(chunk, unit, sizes, TILE)
        scaling = affine(parameters[0], parameters[1], chunk, unit, sizes, OFFSET, TILE)
        normalized, g = gradients(dy, x, side, mask, where, constants, scaling, ACTIVATION, ACC)
        if g_out is not None:
            tl.store(g_out + where[0], g, mask=where[3])
        if not IS_ONE_BLOCK:
            at, there, part = channels_of(chunk, unit, sizes, TILE)
            if sums_out[0] is not None:
                keep(sums_out[0], part * width + at, total_of_channels(g * normalized), there)
            if sums_out[1] is not None:
                keep(sums_out[1], part * width + at, total_of_channels(g), there)
        inside = g * scaling[0] - normalized * product
        if IS_CENTRED:
            inside -= constant
        leave(inside * constants[2], dtotal, mask, dx, where, ACC)


@triton.jit
def backward(
    dy, dtotal, x, residual, y, mask, g_out, dx, mean, var, weight, bias, dweight_out, dbias_out,
    outer, groups, channels, inner, chunks, splits, units,
    EPS: tl.constexpr, ACTIVATION: tl.constexpr, IS_CENTRED: tl.constexpr, OFFSET: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """dx and g of a unit, and its parts of dweight and dbias (parts, groups, channels)."""
    span = own_span(chunks, splits, units)
    sizes = (outer, groups, channels, inner)
    side, moments, parameters = (residual, y), (mean, var), (weight, bias)
    count, product, constant = _sums(
        dy, x, side, mask, moments, parameters, (dweight_out, dbias_out), part_of(span[0], splits, units, sizes, TILE),
        span, sizes, EPS, ACTIVATION, IS_CENTRED, OFFSET, TILE,
    )  # fmt: skip
    n = tl.maximum(count, 1)
    _input(
        dy, dtotal, x, side, mask, g_out, dx, moments, parameters, (product / n, constant / n),
        (dweight_out, dbias_out), span, sizes, EPS, ACTIVATION, IS_CENTRED, OFFSET, TILE,
    )  # fmt: skip


@triton.jit
def sums(
    dy, x, residual, y, mask, mean, var, weight, bias, dweight_out, dbias_out, parts, width,
    outer, groups, channels, inner, chunks, splits, units,
    EPS: tl.constexpr, ACTIVATION: tl.constexpr, IS_CENTRED: tl.constexpr, OFFSET: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Count, Σ h·x̂ and Σ h of a span, to parts (3, splits, width); of one block also its parts of dweight and dbias."""
    span = own_span(chunks, splits, units)
    sizes = (outer, groups, channels, inner)
    count, product, constant = _sums(
        dy, x, (residual, y), mask, (mean, var), (weight, bias), (dweight_out, dbias_out),
        part_of(span[0], splits, units, sizes, TILE), span, sizes, EPS, ACTIVATION, IS_CENTRED, OFFSET, TILE,
    )  # fmt: skip
    _leave((tl.cast(width, tl.int64), splits, parts), count, product, constant, span, sizes, units, TILE)


@triton.jit
def input_gradient(
    dy, dtotal, x, residual, y, mask, g_out, dx, mean, var, weight, bias, dweight_out, dbias_out, parts, width,
    outer, groups, channels, inner, chunks, splits, units,
    EPS: tl.constexpr, ACTIVATION: tl.constexpr, IS_CENTRED: tl.constexpr, OFFSET: tl.constexpr,
    PARTS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """dx and g of a span for what `sums` left, and its parts of dweight and dbias (parts, groups, channels)."""
    span = own_span(chunks, splits, units)
    sizes = (outer, groups, channels, inner)
    count, product, constant = _parts((tl.cast(width, tl.int64), splits, parts), span, sizes, PARTS, TILE)
    n = tl.maximum(tl.sum(count, 0), 1)
    _input(
        dy, dtotal, x, (residual, y), mask, g_out, dx, (mean, var), (weight, bias),
        (tl.sum(product, 0) / n, tl.sum(constant, 0) / n), (dweight_out, dbias_out), span, sizes,
        EPS, ACTIVATION, IS_CENTRED, OFFSET, TILE,
    )  # fmt: skip
