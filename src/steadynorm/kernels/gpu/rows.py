"""Statistics over rows that the registers of a program hold: `(samples, 1, groups, channels, 1)`, and forward also
`(samples, 1, groups, channels, inner)`, where a row is a run of `channels` times `inner` values.

A program reads a block of rows of one group once and finishes it. Backward it takes one block after the other, keeps
the sums of weight and bias meanwhile, and leaves them as one part of each; `columns.merge` adds the parts up. Kernels
hand on `sizes = (samples, groups, columns, inner)`, columns those of a row, and

    TILE = (ROWS, COLUMNS, STAGES, IS_DOUBLE, ALIGN, IS_RUNS)

STAGES: blocks in flight; IS_DOUBLE: the arithmetic is float64, else float32; ALIGN: a power of two that divides
`columns`; IS_RUNS: whether `inner` is more than 1.
"""

import triton
import triton.language as tl

from steadynorm.kernels.gpu.sample_values import added, finish, gradients, leave, valid
from steadynorm.kernels.gpu.tiles import halves, keep, parameter


@triton.jit
def place(block, first, group, sizes, TILE: tl.constexpr):
    """The statistics of a block of rows (ROWS,), which there are, and where its values from column `first` are."""
    ROWS: tl.constexpr = TILE[0]
    COLUMNS: tl.constexpr = TILE[1]
    ALIGN: tl.constexpr = TILE[4]
    IS_RUNS: tl.constexpr = TILE[5]
    samples, groups, columns, inner = sizes
    # Says to the compiler what divides it, which is what makes loads wide.
    columns = columns // ALIGN * ALIGN
    sample = tl.cast(block, tl.int64) * ROWS + tl.arange(0, ROWS)
    column = first + tl.arange(0, COLUMNS)
    row = sample * groups + group
    is_row = (sample < samples)[:, None]
    offset = (row * columns)[:, None] + column[None, :]
    there = is_row & (column < columns)[None, :]
    if IS_RUNS:
        position = column - _channel(column, inner) * inner
        return row, sample < samples, (offset, (sample * inner)[:, None] + position[None, :], there, there)
    else:
        return row, sample < samples, (offset, sample[:, None], is_row, there)


@triton.jit
def _channel(column, inner):
    """column // inner, in a few instructions: exact below 2^21, a rounding being far smaller than half of 1 / inner."""
    return ((column.to(tl.float32) + 0.5) * (1.0 / inner)).to(tl.int32)


@triton.jit
def affine(weight, bias, first, group, sizes, OFFSET: tl.constexpr, TILE: tl.constexpr):
    """Scale and shift (1, COLUMNS) of the columns of a group from column `first`."""
    COLUMNS: tl.constexpr = TILE[1]
    ACC: tl.constexpr = tl.float64 if TILE[3] else tl.float32
    ALIGN: tl.constexpr = TILE[4]
    IS_RUNS: tl.constexpr = TILE[5]
    _, _, columns, inner = sizes
    columns = columns // ALIGN * ALIGN
    column = first + tl.arange(0, COLUMNS)
    there = (column < columns)[None, :]
    if IS_RUNS:
        at = (group * (columns // inner) + _channel(column, inner))[None, :]
    else:
        at = (group * columns + column)[None, :]
    scale = parameter(weight, at, there, 1.0, ACC)
    if weight is not None and OFFSET != 0:
        scale += OFFSET
    return scale, parameter(bias, at, there, 0.0, ACC)


@triton.jit
def constants_of(mean, var, row, is_row, EPS: tl.constexpr, IS_CENTRED: tl.constexpr, ACC: tl.constexpr):
    """high, low · invstd and invstd of rows (ROWS, 1)."""
    invstd = tl.rsqrt(tl.load(var + row, mask=is_row, other=1.0) + EPS).to(ACC)
    if IS_CENTRED:
        high, low = halves(tl.load(mean + row, mask=is_row, other=0.0), ACC)
        return high[:, None], (low * invstd)[:, None], invstd[:, None]
    else:
        return 0.0, 0.0, invstd[:, None]


@triton.jit
def leave_sums(products, totals, dweight_out, dbias_out, part, first, group, sizes, TILE: tl.constexpr):
    """Write the sums of channels (COLUMNS,) from column `first` as a part of (parts, groups, channels)."""
    COLUMNS: tl.constexpr = TILE[1]
    _, groups, channels, _ = sizes
    column = first + tl.arange(0, COLUMNS)
    at = (tl.cast(part, tl.int64) * groups + group) * channels + column
    if dweight_out is not None:
        keep(dweight_out, at, tl.sum(products, 0), column < channels)
    if dbias_out is not None:
        keep(dbias_out, at, tl.sum(totals, 0), column < channels)


@triton.jit
def forward(
    x, addend, residual, mask, y, total_out, mean_out, var_out, weight, bias, samples, groups, columns, inner,
    EPS: tl.constexpr, ACTIVATION: tl.constexpr, IS_CENTRED: tl.constexpr, OFFSET: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """y, total, mean and var of one block of rows of a group."""
    ACC: tl.constexpr = tl.float64 if TILE[3] else tl.float32
    group = tl.program_id(0) % groups
    sizes = (samples, groups, columns, inner)
    row, is_row, where = place(tl.program_id(0) // groups, 0, group, sizes, TILE)
    values = added(x, addend, total_out, where, ACC)
    # Asked for before the sums are waited for.
    scaling = affine(weight, bias, 0, group, sizes, OFFSET, TILE)
    is_there = valid(mask, where)
    n = columns
    if mask is not None:
        n = tl.maximum(tl.sum(is_there.to(tl.int32), 1), 1)
    if IS_CENTRED:
        # From a pivot, which is the mean but for its rounding: differences are small and lose no digits.
        pivot = tl.sum(tl.where(is_there, values, 0), 1) / n
        values = tl.where(is_there, values - pivot[:, None], 0)
        away = tl.sum(values, 1) / n
        var = tl.sum(values * values, 1) / n - away * away
        var = tl.where(var < 0, 0, var)
        mean = pivot.to(tl.float64) + away.to(tl.float64)
        values = values - away[:, None]
    else:
        values = tl.where(is_there, values, 0)
        var = tl.sum(values * values, 1) / n
        mean = var.to(tl.float64) * 0
    tl.store(mean_out + row, mean, mask=is_row)
    tl.store(var_out + row, var.to(tl.float64), mask=is_row)
    normalized = values * tl.rsqrt(var.to(tl.float64) + EPS).to(ACC)[:, None]
    finish(normalized, residual, mask, y, where, scaling, ACTIVATION, ACC)


@triton.jit
def backward(
    dy, dtotal, x, residual, y, mask, g_out, dx, mean, var, weight, bias, dweight_out, dbias_out,
    samples, groups, channels, blocks, shares,
    EPS: tl.constexpr, ACTIVATION: tl.constexpr, IS_CENTRED: tl.constexpr, OFFSET: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """dx and g of every `shares`-th block of rows of a group, and a part of dweight and dbias."""
    ROWS: tl.constexpr = TILE[0]
    COLUMNS: tl.constexpr = TILE[1]
    STAGES: tl.constexpr = TILE[2]
    ACC: tl.constexpr = tl.float64 if TILE[3] else tl.float32
    group = tl.program_id(0) % groups
    share = tl.program_id(0) // groups
    sizes = (samples, groups, channels, 1)
    scaling = affine(weight, bias, 0, group, sizes, OFFSET, TILE)
    products = tl.zeros((ROWS, COLUMNS), ACC)
    totals = tl.zeros((ROWS, COLUMNS), ACC)
    for block in tl.range(share, blocks, shares, num_stages=STAGES):
        row, is_row, where = place(block, 0, group, sizes, TILE)
        constants = constants_of(mean, var, row, is_row, EPS, IS_CENTRED, ACC)
        normalized, g = gradients(dy, x, (residual, y), mask, where, constants, scaling, ACTIVATION, ACC)
        if g_out is not None:
            tl.store(g_out + where[0], g, mask=where[3])
        if dweight_out is not None:
            products += g * normalized
        if dbias_out is not None:
            totals += g
        h = g * scaling[0]
        inside = h - normalized * (tl.sum(h * normalized, 1) / channels)[:, None]
        if IS_CENTRED:
            inside -= (tl.sum(h, 1) / channels)[:, None]
        leave(inside * constants[2], dtotal, mask, dx, where, ACC)
    leave_sums(products, totals, dweight_out, dbias_out, share, 0, group, sizes, TILE)
