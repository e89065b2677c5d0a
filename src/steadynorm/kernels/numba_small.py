"""The two fused calls for small CPU tensors, where not memory but Python is what a normalization waits for.

What depends on sizes and settings is made once and kept for each thread: kernels, arguments, scratch memory. A call
then makes its outputs, writes addresses, and runs the kernels on its own thread. Results are the same to the bit as
those of `numba_cpu.Call`.
"""

import ctypes
from functools import lru_cache
from threading import get_ident
from typing import Any

import torch
from torch import Tensor

from steadynorm.grouping import Grouping
from steadynorm.kernels.batch_plans import CPU, compiled, plan
from steadynorm.kernels.cpu import arguments as at

ROWS = {
    "forward": [
        ("rows_statistics", False, 0),
        ("rows_columns", False, at.TO_MOMENTS | at.TO_COEFFICIENTS),
        ("rows_normalize", True, 0),
    ],
    "backward": [
        ("rows_columns", False, at.TO_COEFFICIENTS),
        ("rows_sums", True, 0),
        ("rows_columns", False, at.TO_SUMS | at.TO_COEFFICIENTS | at.TO_BACK),
        ("rows_input", True, 0),
    ],
}
PLANES = {
    "forward": [("planes_forward", True, at.STATISTICS | at.NORMALIZE)],
    "backward": [("planes_backward", True, at.SUMS | at.INPUT)],
}
"""By direction: kernels in their order, whether each is made for a variant, and its stages."""

KEPT_CALLS = 512
"""Calls that are kept. One of rows holds about 60 bytes of scratch memory per column, one of planes a few KiB."""


Variant = tuple[str | bool | None, ...]


class Prepared:
    """Kernels with the stages they are run for, and their arguments, complete but for the addresses of tensors."""

    __slots__ = ("address", "folded_row", "integers", "row_bytes", "scratch", "steps")

    def __init__(self, direction: str, grouping: Grouping, dtype: torch.dtype, variant: Variant, given: Any) -> None:
        made = plan(grouping, dtype, *given, 1)
        self.integers = values = at.Integers.from_buffer_copy(made.template)
        self.address = ctypes.addressof(values)
        self.row_bytes = grouping.group * dtype.itemsize
        room = self.row_bytes * made.fold if made.fold > 1 else 0
        self.scratch = torch.empty(made.scratch_bytes + room, dtype=torch.uint8, device=CPU)
        columns = self.scratch.data_ptr()
        values[at.COLUMNS], values[at.SCRATCH] = columns, columns + made.columns_bytes
        self.folded_row = columns + made.scratch_bytes if room else 0
        self.steps = [
            (compiled(kind, dtype, *(variant if is_variant else ())), stages)
            for kind, is_variant, stages in (ROWS if grouping.is_rows else PLANES)[direction]
        ]

    def point(self, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
        """Write the addresses that both directions need."""
        values = self.integers
        values[at.X] = values[at.PIVOT] = address = x.data_ptr()
        if self.folded_row:
            values[at.PIVOT] = self._fold(address)
        values[at.MEAN], values[at.VAR] = mean.data_ptr(), var.data_ptr()
        values[at.WEIGHT] = values[at.BIAS] = 0
        if weight is not None:
            values[at.WEIGHT], values[at.WEIGHT_BYTES] = weight.data_ptr(), weight.element_size()
        if bias is not None:
            values[at.BIAS], values[at.BIAS_BYTES] = bias.data_ptr(), bias.element_size()

    def _fold(self, first_row: int) -> int:
        """Repeat the first row as often as rows are taken as one; returns where."""
        row, done, size = self.folded_row, self.row_bytes, self.row_bytes * self.integers[at.FOLD]
        ctypes.memmove(row, first_row, done)
        while done < size:
            ctypes.memmove(row + done, row, min(done, size - done))
            done *= 2
        return row

    def run(self) -> None:
        """Run the kernels one after the other on this thread."""
        values, address = self.integers, self.address
        for kernel, stages in self.steps:
            values[at.TICKET] = values[at.WORKERS] = 0
            values[at.STAGES] = stages
            kernel(address)


@lru_cache(maxsize=KEPT_CALLS)
def _prepared(
    direction: str, grouping: Grouping, dtype: torch.dtype, variant: Variant, eps: float, is_given: bool, thread: int
) -> Prepared:
    return Prepared(direction, grouping, dtype, variant, (eps, is_given))


def forward(
    x: Tensor,
    grouping: Grouping,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, mean and var; see the contract in `steadynorm.kernels`."""
    variant = activation, residual is not None
    call = _prepared("forward", grouping, x.dtype, variant, eps, False, get_ident())
    y = torch.empty_like(x)
    mean = torch.empty(grouping[1], dtype=torch.float64, device=CPU)
    var = torch.empty_like(mean)
    call.point(x, mean, var, weight, bias)
    values = call.integers
    values[at.Y] = y.data_ptr()
    if residual is not None:
        values[at.RESIDUAL] = residual.data_ptr()
    call.run()
    return y, mean, var


def backward(
    dy: Tensor,
    x: Tensor,
    grouping: Grouping,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    side: Tensor | None,
    eps: float,
    is_given: bool,
    variant: Variant,
    dresidual: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight and dbias; `variant` and `side` are those of the kernels, g goes to `dresidual` or through dx."""
    call = _prepared("backward", grouping, x.dtype, variant, eps, is_given, get_ident())
    dx, dweight, dbias = torch.empty_like(x), torch.empty_like(mean), torch.empty_like(mean)
    call.point(x, mean, var, weight, bias)
    values = call.integers
    values[at.DY], values[at.DX] = dy.data_ptr(), dx.data_ptr()
    values[at.DWEIGHT], values[at.DBIAS] = dweight.data_ptr(), dbias.data_ptr()
    values[at.SIDE] = 0 if side is None else side.data_ptr()
    values[at.G] = (dx if dresidual is None else dresidual).data_ptr() if variant[2] else 0
    call.run()
    return dx, dweight, dbias
