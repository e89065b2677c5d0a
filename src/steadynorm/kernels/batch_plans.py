"""What a call of the kernels needs to know before it sees a tensor: compiled code, blocks, threads, scratch memory."""

from functools import cache, lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from steadynorm.errors import InputError
from steadynorm.grouping import Grouping
from steadynorm.kernels.cpu import arguments as at
from steadynorm.kernels.cpu import build

CPU = torch.device("cpu")
"""Said wherever memory is made: torch.set_default_device may say something else."""

STORAGE = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}

SERIAL_BELOW = 1 << 16  # values; a parallel region costs about as much as 20,000 values
PLANE_BLOCK = 64 << 10  # bytes of neighbouring groups in one task: 16 KiB cost up to 1.4 times as much, 128 KiB no less
TASKS_PER_THREAD = 3  # at least, so that no thread waits long for the last one
STREAMED_RUN = 8 << 10  # bytes; shorter runs are streamed only if they are whole lines: shared lines cost twice as much
ROW_BLOCK = 1 << 18  # values in one task of rows
MOST_ROW_BLOCKS = 256
FOLDED_COLUMNS = 256  # rows are folded up to this many columns
FOLD_BELOW = 64  # channels; from here on a row fills its vectors well enough


def is_readable(parameter: Tensor | None) -> bool:
    """Whether the kernels can read a weight or bias where it is."""
    if parameter is None:
        return True
    dtype = parameter.dtype
    return (dtype is torch.float32 or dtype is torch.float64) and parameter.is_cpu and parameter.is_contiguous()


def readable(parameter: Tensor | None) -> Tensor | None:
    """A weight or bias as the kernels can read it: itself, or a copy that must live as long as they run."""
    if parameter is None or is_readable(parameter):
        return parameter
    if not parameter.is_cpu:
        raise InputError(
            f"a weight or bias is on {parameter.device}, expected it on the cpu, where x is: move it there."
        )
    return parameter.detach().float().contiguous()


@cache
def last_level_cache() -> int:
    """Bytes of the largest cache of the first core, or 32 MiB where the system does not say."""
    sizes = [32 << 20]
    folder = Path("/sys/devices/system/cpu/cpu0/cache")
    try:
        found = [(path / "size").read_text().strip() for path in folder.glob("index*")]
        sizes = [int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20}[text[-1]] for text in found] or sizes
    except (OSError, ValueError, KeyError):
        pass
    return max(sizes)


MAKERS = {
    "planes_forward": ("planes", "make_forward"),
    "planes_backward": ("planes", "make_backward"),
    "rows_columns": ("columns", "make_columns"),
    "rows_statistics": ("rows", "make_statistics"),
    "rows_normalize": ("rows", "make_normalize"),
    "rows_sums": ("rows", "make_sums"),
    "rows_input": ("rows", "make_input"),
    "running_update": ("running", "make_update"),
    "each": ("each", "make_each"),
    "slices_pool": ("slices", "make_pool"),
    "slices_add": ("slices", "make_add"),
}


@cache
def compiled(kind: str, dtype: torch.dtype, *variant: str | bool | None) -> Any:
    """A compiled kernel by name, for one dtype and one variant of its maker: what it need not ask while it runs."""
    module, maker = MAKERS[kind]

    def make() -> Any:
        from steadynorm.kernels.cpu.simd import STORAGES

        return getattr(import_module(f"steadynorm.kernels.cpu.{module}"), maker)(STORAGES[STORAGE[dtype]], *variant)

    return build.load("_".join([kind, STORAGE[dtype], *map(str, variant)]), make)


class Plan(NamedTuple):
    """What a call does that depends on sizes only."""

    template: bytes
    tasks: int
    threads: int
    scratch_bytes: int
    columns_bytes: int  # of it, for the coefficients of rows, which come first
    fold: int
    is_streamable: bool  # whether an output is written in whole lines of memory, if it starts at one


@lru_cache(maxsize=1024)
def plan(grouping: Grouping, dtype: torch.dtype, eps: float, is_given: bool, threads: int) -> Plan:
    """How to cut a call into tasks; with statistics that are given, nothing is divided by the count."""
    outer, group, inner = grouping
    values: dict[int, int | float] = {at.EPS: float(eps), at.GROUP: group, at.INNER: inner}
    values[at.PER_COUNT] = 0.0 if is_given else 1.0 / grouping.values_per_group
    size = dtype.itemsize
    if outer * group * inner < SERIAL_BELOW:
        threads = 1
    fold, coefficients = 1, 0
    if grouping.is_rows:
        if group < FOLD_BELOW:
            fold = max(1, min(FOLDED_COLUMNS // group, outer))
        rows, columns = outer // fold, group * fold
        tasks = max(1, min(-(-rows * columns // ROW_BLOCK), MOST_ROW_BLOCKS, rows))
        block = -(-rows // tasks)
        tasks = -(-rows // block)
        width = -(-columns // 16) * 16
        values |= {at.OUTER: rows, at.EXTRA: outer % fold * group, at.FOLD: fold}
        is_streamable = columns % 16 == 0
        lane = 8 if size == 8 else 4
        coefficients = 5 * width * lane
        scratch = coefficients + tasks * 2 * width * (8 + lane)
    else:
        is_streamable = inner * size >= STREAMED_RUN or inner % 16 == 0
        block = max(1, min(PLANE_BLOCK // (inner * size), group // (TASKS_PER_THREAD * threads)))
        tasks = -(-group // block)
        values[at.OUTER] = outer
        scratch = min(threads, tasks) * block * at.SLOT_BYTES
    values |= {at.BLOCK: block, at.TASKS: tasks}
    return Plan(at.template(values), tasks, min(threads, tasks), scratch, coefficients, fold, is_streamable)
