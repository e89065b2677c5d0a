"""How a call is laid over the device: the tile of a program, and how many programs there are.

A rule from sizes alone, so that a call costs no measurement, a graph can be captured, and the same sizes give the same
bits on the same device.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

from steadynorm.grouping import Grouping

# Values of a tile, 16 for each thread of 8 warps: two sums, two inputs and an output stay in its registers without a
# spill, and loads are 16 bytes wide in half types (tests/kernels/test_triton_compiled.py).
TILE = 4096
WARPS = 8
VALUES_PER_WARP = 512
# Channels of a tile over rows: in half types a line of the cache. Half of that where there are few rows, and so few
# programs; and a sector of memory where there are few values, so that programs see whole channels and are soon done.
ROW_CHANNELS = 64
FEW_ROWS = 1024
SECTOR_CHANNELS = 16
FEW_VALUES = 1 << 18
# Loads in flight beside the ones that are used: other programs of the multiprocessor have theirs.
STAGES = 1
# Programs for each multiprocessor where a unit is split: the loads of some hide the sums of others.
PROGRAMS = 8
# And where it need not be split, since units alone are so many and their last wave is nearly full. Registers hold so
# many programs of a multiprocessor at a time.
UNITS = 3
RESIDENT = 2
FULL = 0.85
# Registers of a thread at most; None leaves them to the compiler.
REGISTERS: int | None = None
# Values of a unit that one program is soon done with, however few units there are: another launch costs more.
WHOLE = 16 * TILE
# A program takes this many chunks at least, and a merge at most this many parts.
CHUNKS = 2
PARTS = 1024
# Positions of a tile over planes, at least: whole sectors of memory. A wider run may waste so much more of its lanes at
# the end of a plane.
RUN = 64
WASTE = 1.05
# What divides a plane matters up to the 16 bytes of a load.
ALIGN = 16


@dataclass(frozen=True)
class Launch:
    """The programs of a call: `units` times `splits`, each over its share of the `chunks` of a unit.

    `splits` is 1 where one program takes the statistics of a unit; `sweeps` are the splits where they are given.
    """

    tile: tuple[int, int, bool, int, bool, int]
    units: int
    chunks: int
    splits: int
    sweeps: int
    warps: int
    registers: int | None

    @property
    def is_whole(self) -> bool:
        """Whether one program does all that is to be done for a unit."""
        return self.splits == 1


@lru_cache(maxsize=4096)
def plan(grouping: Grouping, is_double: bool, multiprocessors: int) -> Launch:
    """The launch of a normalization of `grouping` on a device."""
    size = TILE // 2 if is_double else TILE
    if grouping.is_rows:
        inner = ROW_CHANNELS if grouping.outer > FEW_ROWS else ROW_CHANNELS // 2
        if grouping.outer * grouping.group <= FEW_VALUES and grouping.outer * inner > WHOLE:
            inner = SECTOR_CHANNELS
        inner = min(inner, above(grouping.group))
        outer = min(size // inner, above(grouping.outer))
        units, chunks = -(-grouping.group // inner), -(-grouping.outer // outer)
        values = grouping.outer * inner
    else:
        inner = run(grouping.inner, size)
        outer = min(size // inner, above(grouping.outer))
        units, chunks = grouping.group, -(-grouping.outer // outer) * -(-grouping.inner // inner)
        values = grouping.values_per_group
    sweeps = max(1, min(-(-multiprocessors * PROGRAMS // units), chunks // CHUNKS))
    is_whole = values <= WHOLE or fills(units, multiprocessors)
    align = min(grouping.inner & -grouping.inner, ALIGN)
    tile = (outer, inner, grouping.is_rows, STAGES, is_double, align)
    warps = max(1, min(WARPS, outer * inner // VALUES_PER_WARP))
    return Launch(tile, units, chunks, 1 if is_whole else min(sweeps, PARTS), sweeps, warps, REGISTERS)


def fills(units: int, multiprocessors: int) -> bool:
    """Whether one program for each unit keeps the device busy to the end."""
    waves = units / (RESIDENT * multiprocessors)
    return units >= UNITS * multiprocessors and waves >= FULL * math.ceil(waves)


def run(inner: int, size: int) -> int:
    """Positions of a tile over planes: the longest run that wastes few lanes at the end of a plane."""
    runs = [RUN << k for k in range((size // RUN).bit_length())]
    lanes = {run: -(-inner // run) * run for run in runs}
    least = min(lanes.values())
    return min(max(run for run in runs if lanes[run] <= least * WASTE), above(inner))


def above(number: int) -> int:
    """The next power of two."""
    return 1 << max(number - 1, 0).bit_length()
