"""How a call within a sample is laid over the device: by which kernels, in which tiles, in how many programs.

A rule from sizes alone, as `launch` has for the batch, whose constants it shares.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

from steadynorm.grouping import SampleGrouping
from steadynorm.kernels.gpu import launch
from steadynorm.kernels.gpu.launch import above, run

# Columns of a row that registers hold, in float32 arithmetic, without a spill (compiled for sm_90): forward one array
# of them, backward also their sums for weight and bias, of which a norm without a bias has one.
HELD = 16384
HELD_BACKWARD = 8192
# Values of a run of memory that is a row of its own: shorter ones share a program with their neighbours.
RUN = 512
# Up to this width a program backward reads a row for its means and then a piece of it, which a cache holds, again: all
# of it where registers hold the sums, else half. Beyond this width the means have a launch of their own, and a program
# has a piece so wide.
NEAR = 16384
PIECE = 4096
# Bytes of a row that a program of 16 warps reads in a step towards its means: 16 in each thread.
STEP = 8192
# Values of a program of rows, where a row has no more: few warps put their sums together in few steps. Forward every
# block of rows is a program, and to begin one costs too.
ROW_TILE, ROW_TILE_BACKWARD = 2048, 1024
# Values of a warp, and warps of a program at most.
VALUES_PER_WARP = 512
WARPS = 16
# Blocks of rows that are read while one is worked on, and one.
STAGES = 2
# Programs of 8 warps for each multiprocessor that keep sums in registers: 128 for each thread.
KEEPERS = 2
# Rows in a chain of float32 additions, at most.
CHAIN = 256
# Positions of a tile with a statistic each; parts of each statistic that a program puts together.
POSITIONS = 64
PARTS = 1024


@dataclass(frozen=True)
class Launch:
    """One kernel over a call.

    kind: the file it is in, "rows", "columns" or "samples".
    units: what there is to do, by programs that do not meet: groups in rows and columns, else blocks of statistics.
    chunks: blocks of rows of a group; pieces of columns; chunks of a unit.
    splits: programs that share a unit (or a piece of it).
    parts: parts of the sums of a channel that are left backward.
    step: columns of a step along a row, in columns.
    """

    kind: str
    tile: tuple[int, ...]
    units: int
    chunks: int
    splits: int
    parts: int
    warps: int
    step: int = 0

    @property
    def programs(self) -> int:
        """How many there are."""
        return self.units * self.splits * (self.chunks if self.kind == "columns" else 1)


@lru_cache(maxsize=4096)
def plan(grouping: SampleGrouping, size: int, multiprocessors: int, sums: int = -1) -> tuple[Launch, ...]:
    """The launches of a normalization of `grouping` on a device, but for the one that puts sums of channels together.

    size: of a value in bytes.
    sums: how many of a channel are wanted backward, 0 to 2; -1 forward.
    """
    width, is_backward = above(grouping.channels * grouping.inner) * _words(size), sums >= 0
    if grouping.outer * grouping.inner > 1:
        is_run = grouping.outer == 1 and not grouping.is_per_position and RUN <= width <= HELD
        if is_run and not is_backward:
            return (_rows(grouping, size, multiprocessors, is_backward),)
        return (_samples(grouping, size, multiprocessors),)
    if width <= (HELD_BACKWARD if is_backward else HELD):
        return (_rows(grouping, size, multiprocessors, is_backward),)
    if not is_backward:
        return (_samples(grouping, size, multiprocessors),)
    last = _columns(grouping, size, multiprocessors, sums)
    # The sums of channels are left by the last launch alone: its parts are not those of the one before.
    return (last,) if width <= NEAR else (_samples(grouping, size, multiprocessors, leaves_channels=False), last)


def _words(size: int) -> int:
    """Registers for a value in the arithmetic."""
    return 2 if size == 8 else 1


def _align(number: int) -> int:
    return min(number & -number, launch.ALIGN)


def _warps(values: int) -> int:
    return max(1, min(WARPS, values // VALUES_PER_WARP))


def _keepers(warps: int) -> int:
    """Programs for each multiprocessor that keep sums in registers."""
    return KEEPERS * launch.WARPS // warps


def _rows(grouping: SampleGrouping, size: int, multiprocessors: int, is_backward: bool) -> Launch:
    width = grouping.channels * grouping.inner
    columns = above(width)
    # Fewer rows in a program where there are few in all.
    few = above(grouping.samples * grouping.groups // multiprocessors)
    values = ROW_TILE_BACKWARD if is_backward else ROW_TILE
    rows = max(1, min(values // _words(size) // columns, few, above(grouping.samples)))
    blocks = -(-grouping.samples // rows)
    warps = _warps(rows * columns * _words(size))
    tile = (rows, columns, STAGES, size == 8, _align(width), grouping.inner > 1)
    if not is_backward:
        return Launch("rows", tile, grouping.groups, blocks, blocks, 0, warps)
    keepers = _keepers(warps) * multiprocessors
    shares = min(max(-(-keepers // grouping.groups), -(-blocks // CHAIN)), blocks)
    return Launch("rows", tile, grouping.groups, blocks, shares, shares, warps)


def _columns(grouping: SampleGrouping, size: int, multiprocessors: int, sums: int) -> Launch:
    columns = PIECE
    if above(grouping.channels) * _words(size) <= NEAR:
        columns = NEAR if sums < 2 and size == 2 else HELD_BACKWARD
    warps = _warps(columns)
    columns //= _words(size)
    pieces = -(-grouping.channels // columns)
    keepers = _keepers(warps) * multiprocessors
    shares = max(-(-keepers // (grouping.groups * pieces)), -(-grouping.samples // CHAIN))
    shares = min(shares, grouping.samples)
    tile = (1, columns, STAGES, size == 8, _align(grouping.channels), False)
    return Launch("columns", tile, grouping.groups, pieces, shares, shares, warps, STEP // size)


def _samples(grouping: SampleGrouping, size: int, multiprocessors: int, *, leaves_channels: bool = True) -> Launch:
    samples, outer, groups, channels, inner, is_per_position = grouping
    shape = _shape(grouping, launch.TILE // _words(size))
    if is_per_position:
        blocks, statistics, parts = -(-inner // shape[3]), shape[3], samples * -(-inner // shape[3])
        chunks = -(-channels // shape[2])
    else:
        blocks, statistics = -(-groups // shape[1]), shape[1]
        runs = -(-outer // shape[0]) * -(-inner // shape[3])
        chunks, parts = runs * -(-channels // shape[2]), samples * runs
    units = samples * blocks
    values = grouping.values_per_group * min(statistics, inner if is_per_position else groups)
    splits = min(-(-multiprocessors * launch.PROGRAMS // units), chunks // launch.CHUNKS, PARTS // statistics)
    is_whole = values <= launch.WHOLE or launch.fills(units, multiprocessors)
    splits = 1 if is_whole else max(1, splits)
    is_one_block = leaves_channels and not is_per_position and channels <= shape[2]
    if is_one_block:
        parts = samples * splits
    align = _align(inner if shape[3] > 1 else channels)
    tile = (*shape, is_per_position, 1, size == 8, align, is_one_block)
    warps = _warps(math.prod(shape) * _words(size))
    return Launch("samples", tile, units, chunks, splits, parts, warps)


def _shape(grouping: SampleGrouping, size: int) -> tuple[int, int, int, int]:
    """OUTER, GROUPS, CHANNELS and INNER of a tile of `size` values."""
    _, outer, groups, channels, inner, is_per_position = grouping
    if is_per_position:
        positions = min(POSITIONS, above(inner))
        return 1, 1, min(size // positions, above(channels)), positions
    if inner > 1:
        positions = run(inner, size)
        here = min(size // positions, above(channels))
        return 1, min(size // positions // here, above(groups)), here, positions
    if outer > 1:
        here = min(launch.ROW_CHANNELS, above(channels))
        beside = min(launch.ROW_CHANNELS // here, above(groups))
        return min(size // here // beside, above(outer)), beside, here, 1
    return 1, 1, size, 1
