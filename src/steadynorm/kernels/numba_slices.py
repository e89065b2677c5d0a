"""Batch normalization of slices of a batch, each by its own statistics: the compiled kernels, run once for all slices.

A slice is a call of its own whose arguments differ in addresses and sizes only. They lie one after the other, and one
kernel (`kernels/cpu/each.py`) goes through them on all threads.
"""

import ctypes
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from steadynorm.grouping import Grouping
from steadynorm.kernels.batch_plans import CPU, SERIAL_BELOW, compiled, last_level_cache, plan
from steadynorm.kernels.cpu import arguments as at
from steadynorm.kernels.cpu import build
from steadynorm.kernels.cpu import each as to
from steadynorm.kernels.cpu.memory import empty_like
from steadynorm.kernels.numba_cpu import kept_gradient, side_of
from steadynorm.kernels.numba_small import PLANES, ROWS

LINE = 64  # bytes: memory that different threads write to is apart by these


class Plan(NamedTuple):
    """What a call does that depends on sizes only."""

    template: np.ndarray[Any, np.dtype[np.int64]]  # (slices, places)
    starts: np.ndarray[Any, np.dtype[np.int64]]  # of each slice, in values
    group: int
    is_rows: bool
    is_whole: bool  # whether threads share slices, instead of the tasks of each
    threads: int
    scratch_bytes: int
    columns: np.ndarray[Any, np.dtype[np.int64]]  # of each slice, in the scratch memory; what it needs besides follows
    scratch: np.ndarray[Any, np.dtype[np.int64]]
    fold: int
    is_streamable: np.ndarray[Any, np.dtype[np.bool_]]


@lru_cache(maxsize=256)
def _plan(grouping: Grouping, sizes: tuple[int, ...], dtype: torch.dtype, eps: float, threads: int) -> Plan:
    rows = grouping.outer // sum(sizes)
    parts = [grouping._replace(outer=size * rows) for size in sizes]
    plans = [plan(part, dtype, eps, False, threads) for part in parts]
    most = max(p.threads for p in plans)
    # A slice that was planned for one thread is gone through by all of them too.
    room = [-(-p.scratch_bytes * (most // p.threads) // LINE) * LINE for p in plans]
    values = [part.values_per_group * part.group for part in parts]
    columns = np.cumsum([0, *room[:-1]])
    return Plan(
        np.frombuffer(b"".join(p.template for p in plans), np.int64).reshape(len(plans), -1),
        np.cumsum([0, *values[:-1]]),
        grouping.group,
        grouping.is_rows,
        most == 1,
        min(threads, len(plans)) if most == 1 else most,
        sum(room),
        columns,
        columns + [p.columns_bytes for p in plans],
        max(p.fold for p in plans),
        np.array([p.is_streamable for p in plans]),
    )


class _Calls:
    """The arguments of all slices, in the rows of one array."""

    def __init__(
        self,
        x: Tensor,
        grouping: Grouping,
        sizes: tuple[int, ...],
        eps: float,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> None:
        threads = torch.get_num_threads() if x.numel() >= SERIAL_BELOW else 1
        self.x, self.plan = x, (made := _plan(grouping, sizes, x.dtype, eps, threads))
        self.values = values = made.template.copy()
        scratch = torch.empty(made.scratch_bytes, dtype=torch.uint8, device=CPU)
        self.alive = [scratch]
        values[:, at.COLUMNS] = made.columns + scratch.data_ptr()
        values[:, at.SCRATCH] = made.scratch + scratch.data_ptr()
        self.point(at.X, x)
        values[:, at.PIVOT] = values[:, at.X]
        if made.fold > 1:
            self._fold(made.fold)
        for place, size, value in ((at.WEIGHT, at.WEIGHT_BYTES, weight), (at.BIAS, at.BIAS_BYTES, bias)):
            if value is not None:
                values[:, place], values[:, size] = value.data_ptr(), value.element_size()

    def _fold(self, fold: int) -> None:
        """The first row of every slice, repeated as often as rows are taken as one."""
        flat = torch.as_strided(self.x, (self.x.numel(),), (1,), self.x.storage_offset())
        firsts = torch.from_numpy(self.plan.starts).unsqueeze(1) + torch.arange(self.plan.group, device=CPU)
        pivots = flat[firsts].repeat(1, fold)
        self.alive.append(pivots)
        self.values[:, at.PIVOT] = pivots.data_ptr() + np.arange(len(pivots)) * pivots[0].nbytes

    def point(self, place: int, tensor: Tensor | None) -> None:
        """Give every slice its part of a tensor in the order of x."""
        if tensor is not None:
            self.values[:, place] = tensor.data_ptr() + self.plan.starts * tensor.element_size()

    def point_statistics(self, place: int, tensor: Tensor) -> None:
        """Give every slice its row of a tensor (slices, group)."""
        self.values[:, place] = tensor.data_ptr() + np.arange(len(tensor)) * tensor[0].nbytes

    def set_streaming(self, place: int, tensors: int) -> None:
        """Let the output at `place` bypass the caches if the `tensors` of a pass are more than they hold."""
        if self.x.numel() * self.x.element_size() * tensors >= last_level_cache():
            aligned = self.values[:, place] % (16 * self.x.element_size()) == 0
            self.values[:, at.STREAMS] = self.plan.is_streamable & (aligned if self.plan.is_rows else True)

    def run(self, direction: str, variant: tuple[str | bool | None, ...]) -> None:
        """Run the kernels of a direction, each for all slices before the next begins."""
        values = self.values
        kinds = ROWS if self.plan.is_rows else PLANES
        launch = (ctypes.c_int64 * 6)()
        launch[to.CALLS], launch[to.FIRST], launch[to.STRIDE] = len(values), values.ctypes.data, values.strides[0]
        for kind, is_variant, stages in kinds[direction]:
            kernel = compiled(kind, self.x.dtype, *(variant if is_variant else ()))
            values[:, (at.TICKET, at.WORKERS)], values[:, at.STAGES] = 0, stages
            launch[to.TICKET], launch[to.KERNEL] = 0, ctypes.cast(kernel, ctypes.c_void_p).value or 0
            # The work on columns has no tasks to share.
            launch[to.IS_WHOLE] = self.plan.is_whole or kind == "rows_columns"
            build.run(compiled("each", torch.float64), ctypes.addressof(launch), self.plan.threads)


def forward(
    x: Tensor,
    grouping: Grouping,
    sizes: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, and mean and var (slices, group).

    Args:
        x: (outer, group, inner), all slices one after the other.
        sizes: samples of each slice; their sum divides the outer size.
        residual, weight, bias, eps, activation: as in the contract in `steadynorm.kernels`.
    """
    calls = _Calls(x, grouping, sizes, eps, weight, bias)
    mean = torch.empty(len(sizes), grouping.group, dtype=torch.float64, device=CPU)
    y, var = empty_like(x), torch.empty_like(mean)
    calls.point(at.Y, y)
    calls.point(at.RESIDUAL, residual)
    calls.point_statistics(at.MEAN, mean)
    calls.point_statistics(at.VAR, var)
    calls.set_streaming(at.Y, 2 + (residual is not None))
    calls.run("forward", (activation, residual is not None))
    return y, mean, var


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
    """dx, dweight and dbias (slices, group), and g if it was asked for; otherwise as `forward`."""
    calls = _Calls(x, grouping, sizes, eps, weight, bias)
    dx, dweight, dbias = empty_like(x), torch.empty_like(mean), torch.empty_like(mean)
    dresidual = empty_like(x) if needs_dresidual else None
    keeps_g = kept_gradient(activation, residual, y)
    g = dresidual if dresidual is not None else (dx if keeps_g else None)
    for place, tensor in ((at.DY, dy), (at.DX, dx), (at.G, g), (at.SIDE, residual if y is None else y)):
        calls.point(place, tensor)
    for place, rows in ((at.MEAN, mean), (at.VAR, var), (at.DWEIGHT, dweight), (at.DBIAS, dbias)):
        calls.point_statistics(place, rows)
    if g is not dx:
        calls.set_streaming(at.DX, 3 + 2 * (g is not None))
    calls.run("backward", (activation, side_of(activation, residual, y), g is not None))
    return dx, dweight, dbias, dresidual
