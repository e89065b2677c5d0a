"""The calls of a layer on small CPU tensors, where not memory but Python is what a normalization waits for.

What depends on sizes and settings is made once and kept for each thread: kernels, arguments, scratch memory. A call
then makes its outputs, writes addresses, and runs the kernels on its own thread. What PyTorch would convert first or
afterwards, running statistics and the gradients of weight and bias, a kernel does. Results are the same to the bit as
those of `numba_cpu.Call`.
"""

import ctypes
from functools import cache, lru_cache
from threading import get_ident
from typing import Any

import torch
from torch import Tensor

from steadynorm.grouping import Grouping
from steadynorm.kernels.batch_plans import CPU, compiled, plan
from steadynorm.kernels.cpu import arguments as at
from steadynorm.kernels.cpu import build, casts

ROWS = {
    "forward": [
        ("rows_statistics", False, 0),
        ("rows_columns", False, at.TO_MOMENTS | at.TO_COEFFICIENTS),
        ("rows_normalize", True, 0),
    ],
    "normalize": [
        ("rows_columns", False, at.TO_COEFFICIENTS),
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
    "normalize": [("planes_forward", True, at.NORMALIZE)],
    "backward": [("planes_backward", True, at.SUMS | at.INPUT)],
}
"""By kind of call: kernels in their order, whether each is made for a variant, and its stages."""

KEPT_CALLS = 512
"""Calls that are kept. One of rows holds about 60 bytes of scratch memory per column, one of planes a few KiB."""


Variant = tuple[str | bool | None, ...]


class Prepared:
    """Kernels with the stages they are run for, and their arguments, complete but for the addresses of tensors."""

    __slots__ = ("address", "folded_row", "group", "integers", "pair", "row_bytes", "scratch", "steps")

    def __init__(self, kind: str, grouping: Grouping, dtype: torch.dtype, variant: Variant, given: Any) -> None:
        made = plan(grouping, dtype, *given, 1)
        self.integers = values = at.Integers.from_buffer_copy(made.template)
        self.address = ctypes.addressof(values)
        self.group = group = grouping.group
        self.row_bytes = group * dtype.itemsize
        room = self.row_bytes * made.fold if made.fold > 1 and kind == "forward" else 0
        self.scratch = torch.empty(made.scratch_bytes + 16 * group + room, dtype=torch.uint8, device=CPU)
        columns = self.scratch.data_ptr()
        values[at.COLUMNS], values[at.SCRATCH] = columns, columns + made.columns_bytes
        self.pair = columns + made.scratch_bytes
        """Where two vectors in float64 are kept: statistics that were widened, or sums that are yet to be rounded."""
        self.folded_row = self.pair + 16 * group if room else 0
        self.steps = [
            (compiled(kernel, dtype, *(variant if is_variant else ())), stages)
            for kernel, is_variant, stages in (ROWS if grouping.is_rows else PLANES)[kind]
        ]

    def point(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
        """Write the addresses that all calls need."""
        values = self.integers
        values[at.X] = values[at.PIVOT] = address = x.data_ptr()
        if self.folded_row:
            values[at.PIVOT] = self._fold(address)
        values[at.WEIGHT] = values[at.BIAS] = 0
        if weight is not None:
            values[at.WEIGHT], values[at.WEIGHT_BYTES] = weight.data_ptr(), weight.element_size()
        if bias is not None:
            values[at.BIAS], values[at.BIAS_BYTES] = bias.data_ptr(), bias.element_size()

    def point_wide(self, mean: Tensor, var: Tensor) -> None:
        """Write the addresses of statistics in float32 or float64, which the kernels read in float64."""
        values, pair, group = self.integers, self.pair, self.group
        for place, given, room in ((at.MEAN, mean, pair), (at.VAR, var, pair + 8 * group)):
            size = given.element_size()
            if size == 8:
                values[place] = given.data_ptr()
            else:
                _cast()(given.data_ptr(), size, room, 8, group)
                values[place] = room

    def rounded(self, address: int, parameter: Tensor | None) -> Tensor:
        """The sums at an address as the gradient of weight or bias, in its dtype; in float64 where there is none."""
        if parameter is None:
            found, size = torch.empty(self.group, dtype=torch.float64, device=CPU), 8
        else:
            found, size = torch.empty_like(parameter), parameter.element_size()
        _cast()(address, 8, found.data_ptr(), size, self.group)
        return found

    def _fold(self, first_row: int) -> int:
        """Repeat the first row as often as rows are taken as one; returns where."""
        row, done, size = self.folded_row, self.row_bytes, self.row_bytes * self.integers[at.FOLD]
        ctypes.memmove(row, first_row, done)
        while done < size:
            ctypes.memmove(row + done, row, min(done, size - done))
            done *= 2
        return row

    def normalized(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        """y, of statistics whose addresses are written."""
        y = torch.empty_like(x)
        self.point(x, weight, bias)
        self.integers[at.Y] = y.data_ptr()
        if residual is not None:
            self.integers[at.RESIDUAL] = residual.data_ptr()
        self.run()
        return y

    def run(self) -> None:
        """Run the kernels one after the other on this thread."""
        values, address = self.integers, self.address
        for kernel, stages in self.steps:
            values[at.TICKET] = values[at.WORKERS] = 0
            values[at.STAGES] = stages
            kernel(address)


@cache
def _cast() -> Any:
    return build.load("cast", casts.make_cast, build.quick_entry(5))


@lru_cache(maxsize=KEPT_CALLS)
def _prepared(
    kind: str, grouping: Grouping, dtype: torch.dtype, variant: Variant, eps: float, is_given: bool, thread: int
) -> Prepared:
    return Prepared(kind, grouping, dtype, variant, (eps, is_given))


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
    mean = torch.empty(grouping[1], dtype=torch.float64, device=CPU)
    var = torch.empty_like(mean)
    call.point_wide(mean, var)
    return call.normalized(x, weight, bias, residual), mean, var


def normalize(
    x: Tensor,
    grouping: Grouping,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str | None,
) -> Tensor:
    """y; mean and var in float32 or float64."""
    variant = activation, residual is not None
    call = _prepared("normalize", grouping, x.dtype, variant, eps, False, get_ident())
    call.point_wide(mean, var)
    return call.normalized(x, weight, bias, residual)


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
    dx = torch.empty_like(x)
    call.point(x, weight, bias)
    call.point_wide(mean, var)
    values = call.integers
    values[at.DY], values[at.DX] = dy.data_ptr(), dx.data_ptr()
    values[at.DWEIGHT], values[at.DBIAS] = products, sums = call.pair, call.pair + 8 * call.group
    values[at.SIDE] = 0 if side is None else side.data_ptr()
    values[at.G] = (dx if dresidual is None else dresidual).data_ptr() if variant[2] else 0
    call.run()
    return dx, call.rounded(products, weight), call.rounded(sums, bias)
