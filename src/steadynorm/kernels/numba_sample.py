"""Statistics within a sample on CPU tensors: plans a call, points the compiled kernels at memory, runs them.

Four layouts, four sets of kernels (kernels/cpu/samples.py); `reference_sample` says what they compute.
"""

import ctypes
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from steadynorm.grouping import SampleGrouping
from steadynorm.kernels import numba_cpu
from steadynorm.kernels.cpu import build
from steadynorm.kernels.cpu import samples as at
from steadynorm.kernels.cpu.memory import empty_like
from steadynorm.kernels.numba_cpu import SERIAL_BELOW, SMOOTH, STORAGE, STREAMED_RUN

LANES = 16
FORWARD_BLOCK = 1 << 14  # values in one task of rows forward
ROWS_PER_TASK = 32  # at least, backward: every task has sums for all parameters, of eight bytes each
MOST_TASKS = 64
FEW_TASKS = 4  # where there are less rows than that
LEAST_TASKS = 16  # units; fewer are shared by the threads
LARGE_UNIT = 1 << 17  # values; about what a second cache holds
SMALL_PART = 1 << 13  # values; what a thread should have to do at least
ROWS_PER_PART = 64  # at least, where channels are last: every part has sums for all channels
TILE = 1 << 15  # values in a tile of positions: what sweeps back read and write of it fits the second cache
WIDEST_TILE = 1 << 11  # positions
LEAST_PIECE = 1 << 13  # values of a channel that are cut off together


def why_not(x: Tensor | None = None, grouping: SampleGrouping | None = None, *, masked: bool = False) -> str:
    """Why this backend cannot run here, or cannot take `x`; empty where it can."""
    return numba_cpu.why_not(x)


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
        from steadynorm.kernels.cpu import samples, samples_last, samples_planes, samples_positions, samples_rows
        from steadynorm.kernels.cpu.simd import STORAGES

        if kind == "affine":
            return samples.make_affine()
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


class Plan(NamedTuple):
    """What a call does that depends on sizes and settings only."""

    kernel: Any
    template: bytes
    threads: int
    scratch_bytes: int
    shared_bytes: int = 0  # memory that all threads use; the flags of the units come first, and are zero
    flags: int = 0
    streams_whole_lines: bool = False  # whether an output in whole lines of memory can bypass the caches
    streams_always: bool = False
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
def _plan(settings: Settings, is_backward: bool) -> Plan:
    layout = _layout(settings.grouping, settings.is_masked)
    return {"rows": _plan_rows, "planes": _plan_planes, "last": _plan_last, "positions": _plan_positions}[layout](
        settings, is_backward
    )


def _affine(settings: Settings, products: int) -> dict[str, Any]:
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
    affine: dict[str, Any] = {}
    narrow = (width + LANES) * lane
    if is_backward:
        tasks = _tasks_backward(samples, width)
        block = -(-samples // tasks)
        tasks = -(-samples // block)
        worker = 4 * narrow + 1024
        if settings.needs_affine and (tasks > 1 or inner > 1):
            values[at.PARTS] = tasks
            affine = _affine(settings, tasks * width)
    else:
        block = max(1, FORWARD_BLOCK // width)
        tasks = -(-samples // block)
        worker = 0 if is_prepared else 2 * narrow
    threads = 1 if samples * width < SERIAL_BELOW else min(settings.threads, tasks)
    values |= {at.BLOCK: block, at.TASKS: tasks, at.WORKER_BYTES: worker}
    return Plan(
        _kernel("rows_backward" if is_backward else "rows_forward", settings.dtype, settings.activation),
        at.template(values),
        threads,
        worker * threads,
        streams_whole_lines=columns % LANES == 0,
        streams_always=columns * size >= STREAMED_RUN,
        **affine,
    )


def _plan_planes(settings: Settings, is_backward: bool) -> Plan:
    samples, _, groups, channels, inner, _ = settings.grouping
    size, values = settings.dtype.itemsize, _values(settings)
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
    affine: dict[str, Any] = {}
    if is_backward and (samples * cuts > 1 or not settings.needs_affine):
        values |= {at.PARTS: samples, at.REPEATED: cuts}
        affine = _affine(settings, units * channels * cuts)
    values |= {at.BLOCK: block, at.TASKS: tasks, at.WORKER_BYTES: 64, at.SLOT_BYTES: slot}
    kind = "planes_backward" if is_backward else "planes_forward"
    return Plan(
        _kernel(kind, settings.dtype, settings.activation, settings.is_masked),
        at.template(values),
        threads,
        64 * threads,
        shared_bytes=units * slot if splits > 1 else 0,
        flags=2 * units if splits > 1 else 0,
        streams_whole_lines=inner % LANES == 0,
        streams_always=inner * size >= STREAMED_RUN,
        **affine,
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
    values |= {at.UNITS: samples, at.SPLITS: splits, at.BLOCK: block, at.TASKS: tasks}
    values |= {at.WORKER_BYTES: slot, at.SLOT_BYTES: slot}
    affine: dict[str, Any] = {}
    if is_backward and (samples > 1 or not settings.needs_affine):
        values[at.PARTS] = samples
        affine = _affine(settings, samples * columns)
    kind = "last_backward" if is_backward else "last_forward"
    return Plan(
        _kernel(kind, settings.dtype, settings.activation),
        at.template(values),
        threads,
        slot * threads if splits == 1 else 0,
        shared_bytes=samples * slot if splits > 1 else 0,
        flags=2 * samples if splits > 1 else 0,
        streams_whole_lines=columns % LANES == 0,
        streams_always=columns * size >= STREAMED_RUN,
        **affine,
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
    affine: dict[str, Any] = {}
    if is_backward and (tasks > 1 or not settings.needs_affine):
        values[at.PARTS] = tasks
        affine = _affine(settings, tasks * channels)
    kind = "positions_backward" if is_backward else "positions_forward"
    return Plan(
        _kernel(kind, settings.dtype, settings.activation, settings.is_masked),
        at.template(values),
        threads,
        worker * threads,
        streams_whole_lines=inner % LANES == 0 and tile % LANES == 0,
        **affine,
    )


def _splits(units: int, count: int) -> int:
    """In how many parts the threads share a unit of `count` values: one, unless there are few units or large ones."""
    if units * count < 2 * SERIAL_BELOW:
        return 1
    least = -(-LEAST_TASKS // units)
    return min(max(least if units < LEAST_TASKS else 1, count // LARGE_UNIT), max(1, count // SMALL_PART))


def _tasks_backward(samples: int, width: int) -> int:
    """Blocks of samples: as many as give every thread some, and few enough that their sums cost little memory."""
    most = max(samples // ROWS_PER_TASK, min(samples, FEW_TASKS))
    return max(1, min(most, MOST_TASKS, samples * width // SERIAL_BELOW))


def _parameter(value: Tensor | None) -> Tensor | None:
    if value is None or ((value.dtype is torch.float32 or value.dtype is torch.float64) and value.is_contiguous()):
        return value
    return value.detach().float().contiguous()


def _share(plan: Plan, values: Any) -> tuple[Tensor, Tensor]:
    """Memory that all threads use; it must live as long as they run."""
    flags = torch.zeros(plan.flags, dtype=torch.int64)
    shared = torch.empty(plan.shared_bytes, dtype=torch.uint8)
    values[at.FLAGS], values[at.SHARED] = flags.data_ptr(), shared.data_ptr()
    return flags, shared


def _streams(plan: Plan, output: Tensor, least: int) -> bool:
    size = output.element_size()
    if output.numel() * size < least:
        return False
    return plan.streams_always or (plan.streams_whole_lines and output.data_ptr() % (LANES * size) == 0)


def sample_forward(
    x: Tensor,
    addend: Tensor | None,
    grouping: SampleGrouping,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    eps: float = 1e-5,
    activation: str | None = None,
    is_centred: bool = True,
    weight_offset: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `reference_sample.sample_forward`."""
    weight, bias = _parameter(weight), _parameter(bias)
    settings = Settings(
        grouping,
        x.dtype,
        eps,
        activation,
        is_centred,
        weight_offset,
        0 if weight is None else weight.element_size(),
        0 if bias is None else bias.element_size(),
        False,
        mask is not None,
        torch.get_num_threads(),
    )
    plan = _plan(settings, False)
    values = at.Integers.from_buffer_copy(plan.template)
    y = empty_like(x)
    statistics = grouping.statistics
    mean, var = torch.empty(statistics, dtype=torch.float64), torch.empty(statistics, dtype=torch.float64)
    values[at.X], values[at.Y] = x.data_ptr(), y.data_ptr()
    values[at.MEAN], values[at.VAR] = mean.data_ptr(), var.data_ptr()
    total = x
    if addend is not None:
        total = empty_like(x)
        values[at.ADDEND], values[at.TOTAL] = addend.data_ptr(), total.data_ptr()
    if weight is not None:
        values[at.WEIGHT] = weight.data_ptr()
    if bias is not None:
        values[at.BIAS] = bias.data_ptr()
    if residual is not None:
        values[at.RESIDUAL] = residual.data_ptr()
    if mask is not None:
        mask = mask.contiguous()
        values[at.MASK] = mask.data_ptr()
    if plan.scratch_bytes:
        scratch = torch.empty(plan.scratch_bytes, dtype=torch.uint8)
        values[at.SCRATCH] = scratch.data_ptr()
    alive = _share(plan, values) if plan.flags else None
    values[at.STREAMS] = _streams(plan, y, numba_cpu._last_level_cache())
    build.run(plan.kernel, ctypes.addressof(values), plan.threads)
    del alive
    return y, total, mean, var


def sample_backward(
    dy: Tensor,
    dtotal: Tensor | None,
    total: Tensor,
    grouping: SampleGrouping,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    y: Tensor | None = None,
    mask: Tensor | None = None,
    eps: float = 1e-5,
    activation: str | None = None,
    is_centred: bool = True,
    weight_offset: float = 0.0,
    needs_dresidual: bool = False,
    needs_affine: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """See `reference_sample.sample_backward`."""
    weight, bias = _parameter(weight), _parameter(bias)
    settings = Settings(
        grouping,
        total.dtype,
        eps,
        activation,
        is_centred,
        weight_offset,
        0 if weight is None else weight.element_size(),
        0 if bias is None else bias.element_size(),
        needs_affine,
        mask is not None,
        torch.get_num_threads(),
    )
    plan = _plan(settings, True)
    values = at.Integers.from_buffer_copy(plan.template)
    dx = empty_like(total)
    dresidual = empty_like(total) if needs_dresidual else None
    values[at.X], values[at.DY], values[at.DX] = total.data_ptr(), dy.data_ptr(), dx.data_ptr()
    values[at.MEAN], values[at.VAR] = mean.data_ptr(), var.data_ptr()
    if weight is not None:
        values[at.WEIGHT] = weight.data_ptr()
    if bias is not None:
        values[at.BIAS] = bias.data_ptr()
    if dtotal is not None:
        values[at.DTOTAL] = dtotal.data_ptr()
    if mask is not None:
        mask = mask.contiguous()
        values[at.MASK] = mask.data_ptr()
    if y is not None:
        values[at.SIDE], values[at.IS_OUTPUT] = y.data_ptr(), 1
    elif residual is not None:
        values[at.SIDE] = residual.data_ptr()
    if dresidual is not None:
        values[at.G] = dresidual.data_ptr()
    elif activation is not None and (activation in SMOOTH or residual is not None or y is not None):
        values[at.G] = dx.data_ptr()
    # What was just read is written over: streaming stores would only push it out of the cache first.
    values[at.STREAMS] = values[at.G] != dx.data_ptr() and _streams(plan, dx, numba_cpu._last_level_cache() // 2)
    width = grouping.groups * grouping.channels if needs_affine else 0
    dweight, dbias = torch.empty(width, dtype=torch.float64), torch.empty(width, dtype=torch.float64)
    values[at.PRODUCTS], values[at.TOTALS] = dweight.data_ptr(), dbias.data_ptr()
    if plan.products:
        sums = torch.empty(2 * plan.products, dtype=torch.float64)
        values[at.DWEIGHT], values[at.DBIAS] = values[at.PRODUCTS], values[at.TOTALS]
        values[at.PRODUCTS], values[at.TOTALS] = sums.data_ptr(), sums.data_ptr() + 8 * plan.products
    if plan.scratch_bytes:
        scratch = torch.empty(plan.scratch_bytes, dtype=torch.uint8)
        values[at.SCRATCH] = scratch.data_ptr()
    alive = _share(plan, values) if plan.flags else None
    address = ctypes.addressof(values)
    build.run(plan.kernel, address, plan.threads)
    if plan.affine_tasks and needs_affine:
        values[at.TICKET] = values[at.WORKERS] = 0
        values[at.TASKS], values[at.BLOCK] = plan.affine_tasks, plan.affine_block
        build.run(_kernel("affine", torch.float64, None), address, min(plan.threads, plan.affine_tasks))
    del alive
    return dx, dweight, dbias, dresidual
