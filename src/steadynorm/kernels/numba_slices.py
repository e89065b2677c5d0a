"""Batch normalization of slices of a batch, each by its own statistics: the compiled kernels, run once for all slices.

A slice is a call of its own whose arguments differ in addresses and sizes only. They lie one after the other, and one
kernel (`kernels/cpu/each.py`) goes through them: a thread does whole slices, step after step while they are in its
caches, or all threads share the tasks of each. What depends on sizes is kept, so that a call adds addresses to it.
"""

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from heapq import heappop, heappush
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from steadynorm.grouping import Grouping
from steadynorm.kernels.batch_plans import CPU, SERIAL_BELOW, compiled, last_level_cache, plan
from steadynorm.kernels.cpu import arguments as at
from steadynorm.kernels.cpu import build
from steadynorm.kernels.cpu import each as to
from steadynorm.kernels.cpu import slices as of
from steadynorm.kernels.cpu.memory import empty_like
from steadynorm.kernels.numba_cpu import kept_gradient, side_of
from steadynorm.kernels.numba_small import PLANES, ROWS

LINE = 64
"""Bytes: memory that different threads write to is apart by these."""
LONGEST = 1.15
"""Times a fair share that the busiest thread may get of whole slices; otherwise threads share the tasks of each."""

OF_TENSORS = (at.X, at.Y, at.RESIDUAL, at.DY, at.SIDE, at.G, at.DX)
OF_STATISTICS = (at.MEAN, at.VAR, at.DWEIGHT, at.DBIAS)

Array = np.ndarray[Any, Any]
Variant = tuple[str | bool | None, ...]


class Settings(NamedTuple):
    """All that a plan is made of."""

    direction: str
    grouping: Grouping
    sizes: tuple[int, ...]
    dtype: torch.dtype
    eps: float
    variant: Variant
    places: tuple[int, ...]  # of the arguments that point to a tensor
    weight_bytes: int
    bias_bytes: int
    output: int | None  # the place of what is written, if it may bypass the caches
    threads: int


class Plan(NamedTuple):
    """What a call does that depends on sizes only."""

    offsets: Array  # (slices, places): arguments, with the bytes from its beginning for what points to a tensor
    steps: tuple[tuple[int, int, bool], ...]  # a kernel, its stages, and whether calls are whole
    is_whole: bool
    threads: int
    scratch_bytes: int
    room: int
    first_rows: Array | None  # of each slice, in values, where rows are folded
    fold: int
    streams: Array | None  # slices whose output bypasses the caches, if it begins with a whole vector
    shares: Array


def _longest(sizes: Sequence[int], threads: int) -> float:
    """What the busiest thread does of slices that are taken in their order, in fair shares."""
    done = [0] * threads
    for size in sizes:
        heappush(done, heappop(done) + size)
    return max(done) * threads / max(sum(sizes), 1)


@lru_cache(maxsize=256)
def _plan(settings: Settings) -> Plan:
    grouping, sizes, size = settings.grouping, settings.sizes, settings.dtype.itemsize
    rows, samples = grouping.outer // sum(sizes), np.array(sizes)
    parts = [grouping._replace(outer=n * rows) for n in sizes]
    is_whole = _longest(sizes, settings.threads) <= LONGEST
    plans = [plan(part, settings.dtype, settings.eps, False, 1 if is_whole else settings.threads) for part in parts]
    if not is_whole and max(p.threads for p in plans) == 1:
        is_whole = True
    threads = min(settings.threads, len(sizes)) if is_whole else max(p.threads for p in plans)
    # A slice that was planned for one thread is gone through by all of them too.
    each = [1 if is_whole else threads // p.threads for p in plans]
    rooms = [-(-p.scratch_bytes * n // LINE) * LINE for p, n in zip(plans, each, strict=True)]
    columns = np.zeros_like(samples) if is_whole else np.cumsum([0, *rooms[:-1]])
    values = np.frombuffer(b"".join(p.template for p in plans), np.int64).reshape(len(plans), -1).copy()
    starts = np.cumsum([0, *(samples[:-1] * rows * grouping.group * grouping.inner)])
    for place in settings.places:
        values[:, place] = starts * size if place in OF_TENSORS else 0
        if place in OF_STATISTICS:
            values[:, place] = np.arange(len(sizes)) * grouping.group * 8
    values[:, at.PIVOT] = values[:, at.X]
    values[:, at.COLUMNS], values[:, at.SCRATCH] = columns, columns + [p.columns_bytes for p in plans]
    values[:, at.WEIGHT_BYTES], values[:, at.BIAS_BYTES] = settings.weight_bytes, settings.bias_bytes
    fold = max(p.fold for p in plans)
    return Plan(
        values,
        tuple(_steps(settings, is_whole)),
        is_whole,
        threads,
        max(rooms) * threads if is_whole else sum(rooms),
        max(rooms),
        starts if fold > 1 else None,
        fold,
        np.array([p.is_streamable for p in plans]) if _streams(settings) else None,
        samples / samples.sum(),
    )


def _steps(settings: Settings, is_whole: bool) -> Any:
    for kind, is_variant, stages in (ROWS if settings.grouping.is_rows else PLANES)[settings.direction]:
        kernel = compiled(kind, settings.dtype, *(settings.variant if is_variant else ()))
        # The work on columns has no tasks to share.
        yield ctypes.cast(kernel, ctypes.c_void_p).value, stages, is_whole or kind == "rows_columns"


def _streams(settings: Settings) -> bool:
    """Whether the output bypasses the caches: where the tensors of a pass are more than they hold."""
    passes = sum(place in OF_TENSORS for place in settings.places)
    size = settings.grouping.values_per_group * settings.grouping.group * settings.dtype.itemsize
    return settings.output is not None and size * passes >= last_level_cache()


class _Calls:
    """The arguments of all slices, in the rows of one array."""

    def __init__(
        self,
        direction: str,
        tensors: dict[int, Tensor | None],
        grouping: Grouping,
        sizes: tuple[int, ...],
        eps: float,
        variant: Variant,
        output: int | None,
    ) -> None:
        given = {place: tensor for place, tensor in tensors.items() if tensor is not None}
        x, weight, bias = given[at.X], given.get(at.WEIGHT), given.get(at.BIAS)
        weight_bytes, bias_bytes = (0 if t is None else t.element_size() for t in (weight, bias))
        threads = torch.get_num_threads() if x.numel() >= SERIAL_BELOW else 1
        places = tuple(given)
        self.plan = made = _plan(
            Settings(
                direction, grouping, sizes, x.dtype, eps, variant, places, weight_bytes, bias_bytes, output, threads
            )
        )
        bases = np.zeros(at.LENGTH, np.int64)
        for place, tensor in given.items():
            bases[place] = tensor.data_ptr()
        scratch = torch.empty(made.scratch_bytes, dtype=torch.uint8, device=CPU)
        self.alive = [scratch]
        bases[at.COLUMNS] = bases[at.SCRATCH] = scratch.data_ptr()
        bases[at.PIVOT] = bases[at.X]
        self.values = values = made.offsets + bases
        if made.first_rows is not None:
            self._fold(x, made.first_rows, grouping.group)
        if made.streams is not None:
            is_aligned = values[:, output] % (16 * x.element_size()) == 0
            values[:, at.STREAMS] = made.streams & (is_aligned if grouping.is_rows else True)

    def _fold(self, x: Tensor, starts: Array, group: int) -> None:
        """The first row of every slice, repeated as often as rows are taken as one."""
        flat = torch.as_strided(x, (x.numel(),), (1,), x.storage_offset())
        firsts = torch.from_numpy(starts).unsqueeze(1) + torch.arange(group, device=CPU)
        pivots = flat[firsts].repeat(1, self.plan.fold)
        self.alive.append(pivots)
        self.values[:, at.PIVOT] = pivots.data_ptr() + np.arange(len(pivots)) * pivots[0].nbytes

    def run(self) -> None:
        """All steps for a slice, and then for the next; or every step for all slices before the next begins."""
        made, values = self.plan, self.values
        for steps in (made.steps,) if made.is_whole else ((step,) for step in made.steps):
            launch = (ctypes.c_int64 * (to.STEP + 2 * len(steps)))()
            launch[to.CALLS], launch[to.FIRST], launch[to.STRIDE] = len(values), values.ctypes.data, values.strides[0]
            launch[to.IS_WHOLE], launch[to.ROOM] = steps[0][2], made.room if made.is_whole else 0
            launch[to.STEPS] = len(steps)
            for i, (kernel, stages, _) in enumerate(steps):
                launch[to.STEP + 2 * i], launch[to.STEP + 2 * i + 1] = kernel, stages
            if not made.is_whole:
                values[:, at.TICKET], values[:, at.WORKERS], values[:, at.STAGES] = 0, 0, steps[0][1]
            build.run(compiled("each", torch.float64), ctypes.addressof(launch), made.threads)

    def together(self, kernel: str, tensors: dict[int, Tensor]) -> tuple[Tensor, Tensor]:
        """Two sums over the slices, float64 (group,)."""
        slices, group = next(iter(tensors.values())).shape
        first = torch.empty(group, dtype=torch.float64, device=CPU)
        second = torch.empty_like(first)
        values = (ctypes.c_int64 * of.LENGTH)()
        values[of.SLICES], values[of.GROUP], values[of.SHARES] = slices, group, self.plan.shares.ctypes.data
        for place, tensor in tensors.items():
            values[place] = tensor.data_ptr()
        values[of.FIRST], values[of.SECOND] = first.data_ptr(), second.data_ptr()
        threads = self.plan.threads if slices * group >= SERIAL_BELOW else 1
        build.run(compiled(kernel, torch.float64), ctypes.addressof(values), threads)
        return first, second


class Statistics(NamedTuple):
    """Mean and biased variance, float64."""

    mean: Tensor
    var: Tensor


def forward(
    x: Tensor,
    grouping: Grouping,
    sizes: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str | None,
) -> tuple[Tensor, Statistics, Statistics]:
    """y, the statistics (slices, group) of each slice, and those (group,) of all together.

    Args:
        x: (outer, group, inner), all slices one after the other.
        sizes: samples of each slice, one or more; their sum divides the outer size.
        residual, weight, bias, eps, activation: as in the contract in `steadynorm.kernels`.
    """
    mean = torch.empty(len(sizes), grouping.group, dtype=torch.float64, device=CPU)
    y, var = empty_like(x), torch.empty_like(mean)
    tensors = {at.X: x, at.Y: y, at.RESIDUAL: residual, at.WEIGHT: weight, at.BIAS: bias, at.MEAN: mean, at.VAR: var}
    calls = _Calls("forward", tensors, grouping, sizes, eps, (activation, residual is not None), at.Y)
    calls.run()
    pooled = calls.together("slices_pool", {of.MEAN: mean, of.VAR: var})
    return y, Statistics(mean, var), Statistics(*pooled)


def backward(
    dy: Tensor,
    x: Tensor,
    grouping: Grouping,
    sizes: tuple[int, ...],
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor | None,
    eps: float,
    activation: str | None,
    needs_dresidual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dx, dweight and dbias (group,) float64, and g if it was asked for; otherwise as `forward`."""
    dx, dweight, dbias = empty_like(x), torch.empty_like(mean), torch.empty_like(mean)
    dresidual = empty_like(x) if needs_dresidual else None
    keeps_g = kept_gradient(activation, residual, y)
    g = dresidual if dresidual is not None else (dx if keeps_g else None)
    tensors = {
        at.X: x, at.DY: dy, at.SIDE: residual if y is None else y, at.G: g, at.DX: dx, at.WEIGHT: weight,
        at.BIAS: bias, at.MEAN: mean, at.VAR: var, at.DWEIGHT: dweight, at.DBIAS: dbias,
    }  # fmt: skip
    variant = activation, side_of(activation, residual, y), g is not None
    # What was just read is written over: streaming stores would only push it out of the cache first.
    calls = _Calls("backward", tensors, grouping, sizes, eps, variant, None if g is dx else at.DX)
    calls.run()
    return dx, *calls.together("slices_add", {of.DWEIGHT: dweight, of.DBIAS: dbias}), dresidual
