"""Where the values of a program are: tiles over dense `(samples, outer, groups, channels, inner)` memory.

A program works for one unit: a block of neighbouring statistics of one sample. Its values are cut into chunks, each a
tile of OUTER × GROUPS × CHANNELS × INNER, of which some sizes are 1:

    planes      1 × GROUPS × CHANNELS × INNER       (N, 1, G, C, L)     a statistic is the sum over all but GROUPS
    last        OUTER × GROUPS × CHANNELS × 1       (N, L, G, C, 1)     the same
    long rows   1 × 1 × CHANNELS × 1                (N, 1, G, C, 1)     the same
    positions   1 × 1 × CHANNELS × INNER            (N, 1, 1, C, L)     a statistic is the sum over all but INNER

so that one kernel serves all: what it does for a statistic goes through `total` and `spread`, what it does for a
channel through `total_of_channels` and `affine`. Kernels hand on `sizes = (outer, groups, channels, inner)`,
`span = (unit, first, last)`, a range of the chunks of a unit, and

    TILE = (OUTER, GROUPS, CHANNELS, INNER, IS_POSITIONS, STAGES, IS_DOUBLE, ALIGN, IS_ONE_BLOCK)

STAGES: loads in flight; IS_DOUBLE: the arithmetic is float64, else float32; ALIGN: a power of two that divides `inner`,
or `channels` where that is 1; IS_ONE_BLOCK: whether all chunks of a unit are of the same channels.
"""

import triton
import triton.language as tl

from steadynorm.kernels.gpu.tiles import parameter


@triton.jit
def statistics(unit, sizes, TILE: tl.constexpr):
    """The statistics of a unit, their indices (GROUPS,) or (INNER,), and which of them there are."""
    GROUPS: tl.constexpr = TILE[1]
    INNER: tl.constexpr = TILE[3]
    IS_POSITIONS: tl.constexpr = TILE[4]
    sample, block = _sample(unit, sizes, TILE)
    _, groups, _, inner = sizes
    if IS_POSITIONS:
        position = block * INNER + tl.arange(0, INNER)
        return sample * inner + position, position < inner
    else:
        group = block * GROUPS + tl.arange(0, GROUPS)
        return sample * groups + group, group < groups


@triton.jit
def _sample(unit, sizes, TILE: tl.constexpr):
    """The sample of a unit, and which block of its statistics."""
    GROUPS: tl.constexpr = TILE[1]
    INNER: tl.constexpr = TILE[3]
    IS_POSITIONS: tl.constexpr = TILE[4]
    _, groups, _, inner = sizes
    blocks = tl.cdiv(inner, INNER) if IS_POSITIONS else tl.cdiv(groups, GROUPS)
    return tl.cast(unit // blocks, tl.int64), unit % blocks


@triton.jit
def spread(value, TILE: tl.constexpr):
    """A number of each statistic, as it meets a tile."""
    IS_POSITIONS: tl.constexpr = TILE[4]
    if IS_POSITIONS:
        return value[None, None, None, :]
    else:
        return value[None, :, None, None]


@triton.jit
def total(tile, TILE: tl.constexpr):
    """The sum of a tile for each statistic."""
    IS_POSITIONS: tl.constexpr = TILE[4]
    if IS_POSITIONS:
        return tl.sum(tl.sum(tl.sum(tile, 2), 1), 0)
    else:
        return tl.sum(tl.sum(tl.sum(tile, 3), 2), 0)


@triton.jit
def total_of_channels(tile):
    """The sum of a tile for each channel, (GROUPS, CHANNELS)."""
    return tl.sum(tl.sum(tile, 3), 0)


@triton.jit
def _blocks(chunk, unit, sizes, TILE: tl.constexpr):
    """Of a chunk: its blocks of outer, channels and inner, and which part of the sums of a channel it is."""
    OUTER: tl.constexpr = TILE[0]
    CHANNELS: tl.constexpr = TILE[2]
    INNER: tl.constexpr = TILE[3]
    IS_POSITIONS: tl.constexpr = TILE[4]
    outer, _, channels, inner = sizes
    sample, block = _sample(unit, sizes, TILE)
    if IS_POSITIONS:
        return 0, chunk, block, sample * tl.cdiv(inner, INNER) + block
    elif INNER > 1:
        # One run of memory after the other.
        runs = tl.cdiv(inner, INNER)
        return 0, chunk // runs, chunk % runs, sample * runs + chunk % runs
    else:
        blocks = tl.cdiv(channels, CHANNELS)
        return chunk // blocks, chunk % blocks, 0, sample * tl.cdiv(outer, OUTER) + chunk // blocks


@triton.jit
def place(chunk, unit, sizes, TILE: tl.constexpr):
    """Where the values of a chunk are (see `sample_values`); a mask is (samples, outer·inner).

    Offsets are 64 bits wide: a tensor may hold more than 2^31 values.
    """
    OUTER: tl.constexpr = TILE[0]
    GROUPS: tl.constexpr = TILE[1]
    CHANNELS: tl.constexpr = TILE[2]
    INNER: tl.constexpr = TILE[3]
    IS_POSITIONS: tl.constexpr = TILE[4]
    ALIGN: tl.constexpr = TILE[7]
    outer, groups, channels, inner = sizes
    # Says to the compiler what divides it, which is what makes loads wide.
    if INNER > 1:
        inner = inner // ALIGN * ALIGN
    else:
        channels = channels // ALIGN * ALIGN
    sample, block = _sample(unit, sizes, TILE)
    row_block, channel_block, run_block, _ = _blocks(chunk, unit, sizes, TILE)
    row = (row_block * OUTER + tl.arange(0, OUTER))[:, None, None, None]
    group = ((0 if IS_POSITIONS else block) * GROUPS + tl.arange(0, GROUPS))[None, :, None, None]
    channel = (channel_block * CHANNELS + tl.arange(0, CHANNELS))[None, None, :, None]
    position = (run_block * INNER + tl.arange(0, INNER))[None, None, None, :]
    within = (row < outer) & (position < inner)
    there = within & (group < groups) & (channel < channels)
    row = sample * outer + row
    offset = ((row * groups + group) * channels + channel) * inner + position
    return offset, row * inner + position, within, there


@triton.jit
def part_of(unit, splits, units, sizes, TILE: tl.constexpr):
    """The part that this program leaves of the sums of its one block of channels."""
    sample, _ = _sample(unit, sizes, TILE)
    return sample * splits + tl.program_id(0) // units


@triton.jit
def channels_of(chunk, unit, sizes, TILE: tl.constexpr):
    """Of the channels of a chunk (GROUPS, CHANNELS): their index, which there are, and the part of their sums."""
    GROUPS: tl.constexpr = TILE[1]
    CHANNELS: tl.constexpr = TILE[2]
    INNER: tl.constexpr = TILE[3]
    IS_POSITIONS: tl.constexpr = TILE[4]
    ALIGN: tl.constexpr = TILE[7]
    _, groups, channels, _ = sizes
    if INNER == 1:
        channels = channels // ALIGN * ALIGN
    _, block = _sample(unit, sizes, TILE)
    _, channel_block, _, part = _blocks(chunk, unit, sizes, TILE)
    group = ((0 if IS_POSITIONS else block) * GROUPS + tl.arange(0, GROUPS))[:, None]
    channel = (channel_block * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    return group * channels + channel, (group < groups) & (channel < channels), part


@triton.jit
def affine(weight, bias, chunk, unit, sizes, OFFSET: tl.constexpr, TILE: tl.constexpr):
    """Scale and shift of the channels of a chunk, as they meet a tile."""
    ACC: tl.constexpr = tl.float64 if TILE[6] else tl.float32
    at, there, _ = channels_of(chunk, unit, sizes, TILE)
    scale = parameter(weight, at, there, 1.0, ACC)
    if weight is not None and OFFSET != 0:
        scale += OFFSET
    shift = parameter(bias, at, there, 0.0, ACC)
    return scale[None, :, :, None], shift[None, :, :, None]


@triton.jit
def values_in(chunk, unit, sizes, TILE: tl.constexpr):
    """How many values of each statistic a chunk has."""
    OUTER: tl.constexpr = TILE[0]
    CHANNELS: tl.constexpr = TILE[2]
    INNER: tl.constexpr = TILE[3]
    IS_POSITIONS: tl.constexpr = TILE[4]
    outer, _, channels, inner = sizes
    row_block, channel_block, run_block, _ = _blocks(chunk, unit, sizes, TILE)
    here = tl.minimum(channels - channel_block * CHANNELS, CHANNELS).to(tl.int64)
    if IS_POSITIONS:
        return here
    else:
        here *= tl.minimum(outer - row_block * OUTER, OUTER)
        return here * tl.minimum(inner - run_block * INNER, INNER)
