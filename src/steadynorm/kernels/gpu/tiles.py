"""Where the values of a program are: tiles over dense `(outer, group, inner)` memory, in both layouts.

A program works for one unit: in planes (`inner > 1`) that is a channel, in rows (`inner = 1`) a block of neighbouring
channels. Its values are cut into chunks, each a tile of OUTER × INNER:

    planes      OUTER samples × INNER positions of one channel          a statistic is the sum over both
    rows        OUTER rows × INNER channels                             a statistic is the sum over the first

so that one kernel serves both: what it does for a statistic goes through `total` and `spread`. Kernels hand on
`sizes = (outer, group, inner)`, `span = (unit, first, last)`, a range of the chunks of a unit, and

    TILE = (OUTER, INNER, IS_ROWS, STAGES, IS_DOUBLE, ALIGN)

STAGES: loads in flight; IS_DOUBLE: the arithmetic is float64, else float32; ALIGN: a power of two that divides `inner`.
"""

import triton
import triton.language as tl


@triton.jit
def own_span(chunks, splits, units):
    """The unit of this program and its chunks [first, last): programs that run together are neighbours in memory."""
    return _span(tl.program_id(0), chunks, splits, units)


@triton.jit
def own_span_backwards(chunks, splits, units):
    """`own_span` from the end of memory on: what the launch before has read last is in the cache."""
    return _span(units * splits - 1 - tl.program_id(0), chunks, splits, units)


@triton.jit
def _span(program, chunks, splits, units):
    unit = program % units
    share = tl.cdiv(chunks, splits)
    first = program // units * share
    return unit, first, tl.minimum(first + share, chunks)


@triton.jit
def channels(unit, group, TILE: tl.constexpr):
    """The channels of a unit, a number or (INNER,), and which of them there are."""
    INNER: tl.constexpr = TILE[1]
    IS_ROWS: tl.constexpr = TILE[2]
    channel = unit * INNER + tl.arange(0, INNER) if IS_ROWS else unit
    return channel, channel < group


@triton.jit
def spread(value, TILE: tl.constexpr):
    """A number of each channel, as it meets a tile."""
    IS_ROWS: tl.constexpr = TILE[2]
    if IS_ROWS:
        return value[None, :]
    else:
        return value


@triton.jit
def total(tile, TILE: tl.constexpr):
    """The sum of a tile for each channel."""
    IS_ROWS: tl.constexpr = TILE[2]
    if IS_ROWS:
        return tl.sum(tile, 0)
    else:
        return tl.sum(tl.sum(tile, 1), 0)


@triton.jit
def place(chunk, unit, sizes, TILE: tl.constexpr):
    """Of each value of a chunk: its offset in x, its offset in a mask (outer, inner), and whether it is there.

    Offsets are 64 bits wide: a tensor may hold more than 2^31 values.
    """
    outer, group, inner = sizes
    OUTER: tl.constexpr = TILE[0]
    INNER: tl.constexpr = TILE[1]
    IS_ROWS: tl.constexpr = TILE[2]
    ALIGN: tl.constexpr = TILE[5]
    if IS_ROWS:
        row = (tl.cast(chunk, tl.int64) * OUTER + tl.arange(0, OUTER))[:, None]
        column = (unit * INNER + tl.arange(0, INNER))[None, :]
        return row * group + column, row + column * 0, (row < outer) & (column < group)
    else:
        # Says to the compiler what divides it, which is what makes loads wide.
        inner = inner // ALIGN * ALIGN
        blocks = tl.cdiv(inner, INNER)
        sample = (tl.cast(chunk // blocks, tl.int64) * OUTER + tl.arange(0, OUTER))[:, None]
        position = ((chunk % blocks) * INNER + tl.arange(0, INNER))[None, :]
        there = (sample < outer) & (position < inner)
        return (sample * group + unit) * inner + position, sample * inner + position, there


@triton.jit
def values_in(chunk, sizes, TILE: tl.constexpr):
    """How many values of each channel a chunk has."""
    outer, _, inner = sizes
    OUTER: tl.constexpr = TILE[0]
    INNER: tl.constexpr = TILE[1]
    IS_ROWS: tl.constexpr = TILE[2]
    if IS_ROWS:
        return tl.minimum(outer - tl.cast(chunk, tl.int64) * OUTER, OUTER)
    else:
        blocks = tl.cdiv(inner, INNER)
        samples = tl.minimum(outer - tl.cast(chunk // blocks, tl.int64) * OUTER, OUTER)
        return samples * tl.minimum(inner - (chunk % blocks) * INNER, INNER)


@triton.jit
def load(pointer, offset, there, ACC: tl.constexpr):
    """Values in the type of the arithmetic; zero where there are none."""
    return tl.load(pointer + offset, mask=there, other=0).to(ACC)


@triton.jit
def keep(pointer, at, value, there):
    """Write sums in the type of the memory: to a half type through float32, from which every one can be made."""
    if pointer.dtype.element_ty != tl.float64:
        value = value.to(tl.float32)
    tl.store(pointer + at, value, mask=there)


@triton.jit
def is_valid(mask, at, there):
    """Which values count: those that are there and, where there is a mask, that it has."""
    if mask is None:
        return there
    else:
        return there & (tl.load(mask + at, mask=there, other=0) != 0)


@triton.jit
def halves(mean, ACC: tl.constexpr):
    """A float64 mean in two parts of the arithmetic, so that a large one costs no digits."""
    high = mean.to(ACC)
    return high, (mean - high.to(tl.float64)).to(ACC)


@triton.jit
def parameter(pointer, channel, is_channel, default, ACC: tl.constexpr):
    """Weight or bias of the channels; None is the default."""
    if pointer is None:
        return channel.to(ACC) * 0 + default
    else:
        return tl.load(pointer + channel, mask=is_channel, other=0).to(ACC)


@triton.jit
def numbers(one, two, unit, group, default, TILE: tl.constexpr):
    """Two numbers of each channel of a unit in float64, as the span works with them: mean and var, or the two sums."""
    channel, is_channel = channels(unit, group, TILE)
    return (
        tl.load(one + channel, mask=is_channel, other=0.0).to(tl.float64),
        tl.load(two + channel, mask=is_channel, other=default).to(tl.float64),
    )


@triton.jit
def count_of(count, plain_count):
    """A count that is a tensor () or, None, a number; in float64."""
    if count is None:
        return tl.cast(plain_count, tl.float64)
    else:
        return tl.load(count).to(tl.float64)
