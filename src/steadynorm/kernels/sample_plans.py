"""How a call of the kernels within a sample is planned: what depends on sizes and settings only, and is kept.

How a tensor is cut into tasks and parts never depends on the number of threads, so that results do not.
"""

import math
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch

from steadynorm.grouping import SampleGrouping
from steadynorm.kernels.batch_plans import SERIAL_BELOW, STORAGE, STREAMED_RUN, last_level_cache
from steadynorm.kernels.cpu import build
from steadynorm.kernels.cpu import samples as at
from steadynorm.kernels.cpu.memory import LARGE

LANES = 16
FORWARD_BLOCK = 1 << 14  # values in one task of rows forward
ROWS_PER_TASK = 32  # at least, backward: every task has sums for all parameters, of eight bytes each
MOST_TASKS = 64
FEW_TASKS = 4  # where there are less rows than that
LEAST_TASKS = 16  # units; fewer are shared by the threads
TURNS = 8  # of all threads: with that many of whole units nobody waits long for the last
LARGE_UNIT = 1 << 17  # values; about what a second cache holds
SMALL_PART = 1 << 13  # values; what a thread should have to do at least
ROWS_PER_PART = 64  # at least, where channels are last: every part has sums for all channels
TILE = 1 << 16  # values in a tile of positions: half as many cost a third more, twice as many no less
WIDEST_TILE = 1 << 11  # positions
STREAMED_SHARE = 0.75  # of the last cache: a larger output is gone from it before anybody reads it
LEAST_PIECE = 1 << 13  # values of a channel that are cut off together


def _layout(grouping: SampleGrouping, is_masked: bool) -> str:
    """Which kernels take a grouping."""
    if grouping.inner == 1:
        return "last" if grouping.outer > 1 else "rows"
    if grouping.is_per_position:
        return "positions"
    # Short runs are rows whose weight repeats itself: no vector is left nearly empty.
    return "rows" if grouping.inner < LANES and not is_masked else "planes"


@cache
def _kernel(kind: str, dtype: torch.dtype, activation: str | None, is_masked: bool = False) -> Any:
    """A compiled kernel by name, for one dtype and activation; a layout whose masks run along vectors has two."""
    storage = STORAGE[dtype]

    def make() -> Any:
        from steadynorm.kernels.cpu import samples_last, samples_planes, samples_positions, samples_rows
        from steadynorm.kernels.cpu.simd import STORAGES

        layout, _, way = kind.partition("_")
        module: Any = {
            "rows": samples_rows,
            "planes": samples_planes,
            "last": samples_last,
            "positions": samples_positions,
        }[layout]
        masked = () if layout in ("rows", "last") else (is_masked,)
        return getattr(module, f"make_{way}")(STORAGES[storage], activation, *masked)

    return build.load(f"sample_{kind}{'_masked' * is_masked}_{storage}_{activation or 'none'}", make)


@cache
def affine() -> Any:
    """The compiled kernel of the last sums, which are float64 whatever the tensors are."""

    def make() -> Any:
        return at.make_affine()

    return build.load("sample_affine", make)


class Plan(NamedTuple):
    """What a call does that depends on sizes and settings only."""

    kernel: Any
    template: bytes
    threads: int
    scratch_bytes: int
    is_large: bool  # whether a tensor is so large that memory for another comes fresh from the system
    statistics: int
    streams: int  # whether the output bypasses the caches: 0 no, 1 where it begins with a whole vector, 2 yes
    shared_bytes: int = 0  # memory that all threads use, and flags there, which are zero at first
    flags: int = 0
    products: int = 0  # backward: how many sums of parameters there are; 0 where the kernel writes the result itself
    affine_tasks: int = 0
    affine_block: int = 0


class Settings(NamedTuple):
    """All that a plan is made of."""

    grouping: SampleGrouping
    dtype: torch.dtype
    eps: float
    activation: str | None
    is_centred: bool
    weight_offset: float
    weight_bytes: int
    bias_bytes: int
    needs_affine: bool
    is_masked: bool
    threads: int


def _values(settings: Settings) -> dict[int, int | float]:
    samples, outer, groups, channels, inner, _ = settings.grouping
    return {
        at.SAMPLES: samples,
        at.OUTER: outer,
        at.GROUPS: groups,
        at.CHANNELS: channels,
        at.INNER: inner,
        at.REPEATED: 1,
        at.EPS: float(settings.eps),
        at.IS_CENTRED: settings.is_centred,
        at.WEIGHT_OFFSET: float(settings.weight_offset),
        at.WEIGHT_BYTES: settings.weight_bytes,
        at.BIAS_BYTES: settings.bias_bytes,
        at.NEEDS_AFFINE: settings.needs_affine,
    }


@lru_cache(maxsize=1024)
def plan(is_backward: bool, *settings: Any) -> Plan:
    """The plan of a call with these `Settings`."""
    named = Settings(*settings)
    layout = _layout(named.grouping, named.is_masked)
    planned = {"rows": _plan_rows, "planes": _plan_planes, "last": _plan_last, "positions": _plan_positions}[layout]
    return planned(named, is_backward)


def _outputs(settings: Settings, is_backward: bool, run: int) -> dict[str, Any]:
    """What there is to know about output memory; `run` is how many values are written one after the other."""
    size = math.prod(settings.grouping.sizes) * settings.dtype.itemsize
    streams = 0
    # Back, three tensors share the cache, of which two were just read.
    if size >= last_level_cache() * (0.5 if is_backward else STREAMED_SHARE):
        streams = 2 if run * settings.dtype.itemsize >= STREAMED_RUN else int(run % LANES == 0)
    return {"is_large": size >= LARGE, "statistics": settings.grouping.statistics, "streams": streams}


def _last_sums(settings: Settings, products: int) -> dict[str, Any]:
    """How the sums of the parts are added."""
    parameters = settings.grouping.groups * settings.grouping.channels
    tasks = 1 if products < SERIAL_BELOW else 4 * settings.threads
    block = max(64, -(-parameters // tasks))
    return {"products": products, "affine_tasks": -(-parameters // block), "affine_block": block}


def _plan_rows(settings: Settings, is_backward: bool) -> Plan:
    samples, _, groups, channels, inner, _ = settings.grouping
    size = settings.dtype.itemsize
    lane = max(size, 4)
    columns, width = channels * inner, groups * channels * inner
    values = _values(settings)
    values[at.REPEATED] = inner
    is_prepared = (
        settings.weight_bytes == lane
        and settings.bias_bytes in (0, lane)
        and not settings.weight_offset
        and inner == 1
        and columns >= LANES
    )
    values[at.IS_PREPARED] = is_prepared
    last_sums: dict[str, Any] = {}
    narrow = (width + LANES) * lane
    if is_backward:
        tasks = _tasks_backward(samples, width)
        block = -(-samples // tasks)
        tasks = -(-samples // block)
        worker = 4 * narrow + 1024
        if settings.needs_affine and (tasks > 1 or inner > 1):
            values[at.PARTS] = tasks
            last_sums = _last_sums(settings, tasks * width)
    else:
        # Which asks for its next row while it writes one: of long rows there must be several.
        block = max(1, FORWARD_BLOCK // width, samples // MOST_TASKS)
        tasks = -(-samples // block)
        worker = 0 if is_prepared else 2 * narrow
    threads = 1 if samples * width < SERIAL_BELOW else min(settings.threads, tasks)
    values |= {at.BLOCK: block, at.TASKS: tasks, at.WORKER_BYTES: worker}
    return Plan(
        _kernel("rows_backward" if is_backward else "rows_forward", settings.dtype, settings.activation),
        at.template(values),
        threads,
        worker * threads,
        **_outputs(settings, is_backward, columns),
        **last_sums,
    )


def _plan_planes(settings: Settings, is_backward: bool) -> Plan:
    samples, _, groups, channels, inner, _ = settings.grouping
    values = _values(settings)
    units, count = samples * groups, channels * inner
    wanted = _splits(units, count)
    piece, cuts, splits = inner, 1, min(wanted, channels)
    if splits < wanted:
        piece = max(LEAST_PIECE, -(-inner * channels // wanted // LANES) * LANES)
        cuts = -(-inner // piece)
        splits = cuts * channels if cuts > 1 else splits
    values |= {at.UNITS: units, at.SPLITS: splits, at.CUTS: cuts, at.PIECE: piece}
    block = max(1, FORWARD_BLOCK // count)
    tasks = -(-units // block)
    threads = 1 if units * count < SERIAL_BELOW else min(settings.threads, max(tasks, units * splits))
    slot = 16 if is_backward else 24 * splits
    is_shared = _is_shared(units, splits, threads)
    last_sums: dict[str, Any] = {}
    if is_backward and (samples * cuts > 1 or not settings.needs_affine):
        values |= {at.PARTS: samples, at.REPEATED: cuts}
        last_sums = _last_sums(settings, units * channels * cuts)
    worker = -(-slot // 64) * 64
    values |= {at.IS_SHARED: is_shared, at.BLOCK: block, at.TASKS: tasks, at.WORKER_BYTES: worker, at.SLOT_BYTES: slot}
    kind = "planes_backward" if is_backward else "planes_forward"
    return Plan(
        _kernel(kind, settings.dtype, settings.activation, settings.is_masked),
        at.template(values),
        threads,
        0 if is_shared else worker * threads,
        shared_bytes=units * slot if is_shared else 0,
        flags=2 * units if is_shared else 0,
        **_outputs(settings, is_backward, inner),
        **last_sums,
    )


def _plan_last(settings: Settings, is_backward: bool) -> Plan:
    samples, outer, groups, channels, _, _ = settings.grouping
    size, values = settings.dtype.itemsize, _values(settings)
    columns, lane = groups * channels, max(size, 4)
    count = outer * columns
    splits = min(_splits(samples, count), max(1, outer // ROWS_PER_PART))
    width = columns // LANES * LANES + LANES
    part = 64 + 3 * width * lane + 2 * width * 8
    slot = 5 * width * lane + splits * part
    block = max(1, FORWARD_BLOCK // count)
    tasks = -(-samples // block)
    threads = 1 if samples * count < SERIAL_BELOW else min(settings.threads, max(tasks, samples * splits))
    is_shared = _is_shared(samples, splits, threads)
    values |= {at.UNITS: samples, at.SPLITS: splits, at.IS_SHARED: is_shared, at.BLOCK: block, at.TASKS: tasks}
    values |= {at.WORKER_BYTES: slot, at.SLOT_BYTES: slot}
    last_sums: dict[str, Any] = {}
    if is_backward and (samples > 1 or not settings.needs_affine):
        values[at.PARTS] = samples
        last_sums = _last_sums(settings, samples * columns)
    kind = "last_backward" if is_backward else "last_forward"
    return Plan(
        _kernel(kind, settings.dtype, settings.activation),
        at.template(values),
        threads,
        0 if is_shared else slot * threads,
        shared_bytes=samples * slot if is_shared else 0,
        flags=2 * samples if is_shared else 0,
        **_outputs(settings, is_backward, columns),
        **last_sums,
    )


def _plan_positions(settings: Settings, is_backward: bool) -> Plan:
    samples, _, _, channels, inner, _ = settings.grouping
    size, values = settings.dtype.itemsize, _values(settings)
    lane = max(size, 4)
    tile = min(max(TILE // channels // 64 * 64, 64), WIDEST_TILE, -(-inner // LANES) * LANES)
    units = samples * -(-inner // tile)
    tasks = min(units, MOST_TASKS) if is_backward else units
    block = -(-units // tasks)
    tasks = -(-units // block)
    is_prepared = settings.weight_bytes == lane and settings.bias_bytes in (0, lane) and not settings.weight_offset
    values |= {at.UNITS: units, at.BLOCK: block, at.TASKS: tasks, at.PIECE: tile, at.IS_PREPARED: is_prepared}
    worker = (
        2 * (channels + LANES) * lane + tile * (7 * lane + 16) + (2 * channels * LANES * lane if is_backward else 0)
    )
    values[at.WORKER_BYTES] = worker
    threads = 1 if samples * channels * inner < SERIAL_BELOW else min(settings.threads, tasks)
    last_sums: dict[str, Any] = {}
    if is_backward and (tasks > 1 or not settings.needs_affine):
        values[at.PARTS] = tasks
        last_sums = _last_sums(settings, tasks * channels)
    kind = "positions_backward" if is_backward else "positions_forward"
    return Plan(
        _kernel(kind, settings.dtype, settings.activation, settings.is_masked),
        at.template(values),
        threads,
        worker * threads,
        **_outputs(settings, is_backward, math.gcd(inner, tile)),
        **last_sums,
    )


def _splits(units: int, count: int) -> int:
    """In how many parts the threads share a unit of `count` values: one, unless there are few units or large ones."""
    if units * count < 2 * SERIAL_BELOW:
        return 1
    least = -(-LEAST_TASKS // units)
    return min(max(least if units < LEAST_TASKS else 1, count // LARGE_UNIT), max(1, count // SMALL_PART))


def _is_shared(units: int, splits: int, threads: int) -> bool:
    """Whether threads share units of several parts: where they would not be done at about the same time otherwise."""
    return splits > 1 and threads > 1 and units % threads != 0 and units < TURNS * threads


def _tasks_backward(samples: int, width: int) -> int:
    """Blocks of samples: as many as give every thread some, and few enough that their sums cost little memory."""
    most = max(samples // ROWS_PER_TASK, min(samples, FEW_TASKS))
    return max(1, min(most, MOST_TASKS, samples * width // SERIAL_BELOW))
