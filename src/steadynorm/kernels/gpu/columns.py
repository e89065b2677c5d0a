"""The backward pass of rows too wide for registers, a piece of their columns at a time; and sums of parts.

A program keeps the sums of weight and bias of its piece over many rows. What it needs of a whole row, the means of h·x̂
and h, it reads the row for first, and finds its piece of it in a cache afterwards; or `samples.sums` left it.
"""

import triton
import triton.language as tl

from steadynorm.kernels.gpu.rows import affine, constants_of, leave_sums, place
from steadynorm.kernels.gpu.sample_values import gradients, leave
from steadynorm.kernels.gpu.tiles import keep


@triton.jit
def _means(
    dy, x, side, mask, row, group, constants, parameters, sizes,
    ACTIVATION: tl.constexpr, IS_CENTRED: tl.constexpr, OFFSET: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The means of h·x̂ and h of a whole row (1, 1), chunk by chunk."""
    COLUMNS: tl.constexpr = TILE[1]
    STAGES: tl.constexpr = TILE[2]
    ACC: tl.constexpr = tl.float64 if TILE[3] else tl.float32
    products = tl.zeros((1, COLUMNS), ACC)
    totals = tl.zeros((1, COLUMNS), ACC)
    for first in tl.range(0, sizes[2], COLUMNS, num_stages=STAGES):
        _, _, where = place(row, first, group, sizes, TILE)
        scaling = affine(parameters[0], parameters[1], first, group, sizes, OFFSET, TILE)
        normalized, g = gradients(dy, x, side, mask, where, constants, scaling, ACTIVATION, ACC)
        h = g * scaling[0]
        products += h * normalized
        if IS_CENTRED:
            totals += h
    return (tl.sum(products, 1) / sizes[2])[:, None], (tl.sum(totals, 1) / sizes[2])[:, None]


@triton.jit
def _left(parts, row, width, splits, count, PARTS: tl.constexpr, ACC: tl.constexpr):
    """The same from parts (3, splits, width)."""
    part = tl.arange(0, PARTS)[None, :]
    at = part * tl.cast(width, tl.int64) + row[:, None]
    at += splits * tl.cast(width, tl.int64)
    product = tl.load(parts + at, mask=part < splits, other=0.0)
    total = tl.load(parts + splits * tl.cast(width, tl.int64) + at, mask=part < splits, other=0.0)
    return (tl.sum(product, 1) / count).to(ACC)[:, None], (tl.sum(total, 1) / count).to(ACC)[:, None]


@triton.jit
def backward(
    dy, dtotal, x, residual, y, mask, g_out, dx, mean, var, weight, bias, dweight_out, dbias_out,
    parts, width, splits, samples, groups, channels, pieces, shares,
    EPS: tl.constexpr, ACTIVATION: tl.constexpr, IS_CENTRED: tl.constexpr, OFFSET: tl.constexpr,
    PARTS: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """dx and g of a piece of every `shares`-th row of a group, and a part of dweight and dbias.

    PARTS: no less than `splits`, the parts that there are of the sums of a row; 0 where there are none.
    """
    ROWS: tl.constexpr = TILE[0]
    COLUMNS: tl.constexpr = TILE[1]
    STAGES: tl.constexpr = TILE[2]
    ACC: tl.constexpr = tl.float64 if TILE[3] else tl.float32
    piece = tl.program_id(0) % pieces
    group = tl.program_id(0) // pieces % groups
    share = tl.program_id(0) // pieces // groups
    first = piece * COLUMNS
    sizes = (samples, groups, channels, 1)
    side = (residual, y)
    products = tl.zeros((ROWS, COLUMNS), ACC)
    totals = tl.zeros((ROWS, COLUMNS), ACC)
    for sample in tl.range(share, samples, shares, num_stages=STAGES if PARTS else 1):
        row, is_row, where = place(sample, first, group, sizes, TILE)
        constants = constants_of(mean, var, row, is_row, EPS, IS_CENTRED, ACC)
        if PARTS:
            product, constant = _left(parts, row, width, splits, channels, PARTS, ACC)
        else:
            product, constant = _means(
                dy, x, side, mask, sample, group, constants, (weight, bias), sizes,
                ACTIVATION, IS_CENTRED, OFFSET, CHUNK,
            )  # fmt: skip
        scaling = affine(weight, bias, first, group, sizes, OFFSET, TILE)
        normalized, g = gradients(dy, x, side, mask, where, constants, scaling, ACTIVATION, ACC)
        if g_out is not None:
            tl.store(g_out + where[0], g, mask=where[3])
        if dweight_out is not None:
            products += g * normalized
        if dbias_out is not None:
            totals += g
        inside = g * scaling[0] - normalized * product
        if IS_CENTRED:
            inside -= constant
        leave(inside * constants[2], dtotal, mask, dx, where, ACC)
    leave_sums(products, totals, dweight_out, dbias_out, share, first, group, sizes, TILE)


@triton.jit
def merge(dweights, dbiases, dweight_out, dbias_out, parts, width, splits, PARTS: tl.constexpr, CHANNELS: tl.constexpr):
    """Sums (splits, width) of parts (parts, width), in float64 and in a fixed order."""
    blocks = tl.cdiv(width, CHANNELS)
    channel = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    split = tl.program_id(0) // blocks
    share = tl.cdiv(parts, splits)
    first = split * share
    last = tl.minimum(first + share, parts)
    dweight = tl.zeros((PARTS, CHANNELS), tl.float64)
    dbias = tl.zeros((PARTS, CHANNELS), tl.float64)
    for start in tl.range(first, last, PARTS):
        part = start + tl.arange(0, PARTS)[:, None]
        there = (part < last) & (channel < width)
        at = part.to(tl.int64) * width + channel
        if dweights is not None:
            dweight += tl.load(dweights + at, mask=there, other=0.0).to(tl.float64)
        if dbiases is not None:
            dbias += tl.load(dbiases + at, mask=there, other=0.0).to(tl.float64)
    at = tl.cast(split, tl.int64) * width + channel
    if dweights is not None:
        keep(dweight_out, at, tl.sum(dweight, 0)[None, :], channel < width)
    if dbiases is not None:
        keep(dbias_out, at, tl.sum(dbias, 0)[None, :], channel < width)
