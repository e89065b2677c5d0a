"""Calls of the kernels within a sample, of sizes and settings that were seen before.

Of a few megabytes a normalization waits for Python as long as for memory, since the tensors themselves have pushed
Python out of the caches. So what can be found once is kept, and a call is left with its outputs, one piece of scratch
memory and the addresses. Results are the same to the bit as those of `numba_sample`.
"""

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from steadynorm.grouping import SampleGrouping
from steadynorm.kernels.batch_plans import CPU
from steadynorm.kernels.cpu import build
from steadynorm.kernels.cpu import samples as at
from steadynorm.kernels.cpu.memory import empty_like
from steadynorm.kernels.numba_cpu import kept_gradient
from steadynorm.kernels.sample_plans import LANES, Plan, affine, plan

LINE = 64
"""Bytes: what is written by several threads begins with a line of its own."""


class Known(NamedTuple):
    """What two calls of the same sizes and settings have in common."""

    forward: Plan
    backward: Plan
    parameters: int  # whose gradients are needed
    products: int  # backward: how many sums of parameters there are
    gradients: torch.dtype  # of the parameters
    keeps_gradient: bool


def known(
    grouping: SampleGrouping,
    dtype: torch.dtype,
    settings: tuple[float, str | None, bool, float],
    weight_bytes: int,
    bias_bytes: int,
    needs_affine: bool,
) -> Known:
    """The plans of calls without an addend, a residual or a mask.

    Args:
        settings: eps, activation, is_centred and weight_offset.
    """
    given = (grouping, dtype, *settings, weight_bytes, bias_bytes)
    threads = torch.get_num_threads()
    forward = plan(False, *given, False, False, threads)
    backward = plan(True, *given, needs_affine, False, threads)
    parameters = grouping.groups * grouping.channels
    products = backward.products or parameters
    if not backward.products:
        # Of one part: the kernel would write what is asked for, in float64.
        values = at.Integers.from_buffer_copy(backward.template)
        values[at.PARTS] = 1
        backward = backward._replace(template=bytes(values))
    wanted = parameters if needs_affine else 0
    narrow = {weight_bytes, bias_bytes} <= {0, 4}
    gradients = torch.float32 if narrow else torch.float64
    return Known(forward, backward, wanted, products, gradients, kept_gradient(settings[1], None, None))


def _lines(size: int) -> int:
    return -(-size // LINE) * LINE


def _memory(planned: Plan, products: int, values: ctypes.Array[ctypes.c_int64]) -> tuple[Tensor, int]:
    """All memory that a call needs besides its results, and the address of the sums of its parts."""
    scratch, shared, flags = _lines(planned.scratch_bytes), _lines(planned.shared_bytes), _lines(8 * planned.flags)
    memory = torch.empty(scratch + shared + flags + 16 * products + LINE, dtype=torch.uint8, device=CPU)
    start = _lines(memory.data_ptr())
    values[at.SCRATCH], values[at.SHARED], values[at.FLAGS] = start, start + scratch, start + scratch + shared
    if flags:
        ctypes.memset(start + scratch + shared, 0, flags)
    return memory, start + scratch + shared + flags


def _streams(planned: Plan, output: int, size: int) -> bool:
    return planned.streams == 2 or (planned.streams == 1 and output % (LANES * size) == 0)


def forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, call: Known) -> tuple[Tensor, Tensor, Tensor]:
    """y, mean and var."""
    planned = call.forward
    values = at.Integers.from_buffer_copy(planned.template)
    y = empty_like(x) if planned.is_large else torch.empty_like(x)
    mean = torch.empty(planned.statistics, dtype=torch.float64, device=CPU)
    var = torch.empty_like(mean)
    memory, _ = _memory(planned, 0, values)
    values[at.X], values[at.Y] = x.data_ptr(), y.data_ptr()
    values[at.MEAN], values[at.VAR] = mean.data_ptr(), var.data_ptr()
    if weight is not None:
        values[at.WEIGHT] = weight.data_ptr()
    if bias is not None:
        values[at.BIAS] = bias.data_ptr()
    if planned.streams:
        values[at.STREAMS] = _streams(planned, values[at.Y], x.element_size())
    build.run(planned.kernel, ctypes.addressof(values), planned.threads)
    del memory
    return y, mean, var


def backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, call: Known
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight and dbias, the two in `gradients`, which they are rounded to once."""
    planned = call.backward
    values = at.Integers.from_buffer_copy(planned.template)
    dx = empty_like(x) if planned.is_large else torch.empty_like(x)
    dweight = torch.empty(call.parameters, dtype=call.gradients, device=CPU)
    dbias = torch.empty_like(dweight)
    memory, sums = _memory(planned, call.products, values)
    values[at.X], values[at.DY], values[at.DX] = x.data_ptr(), dy.data_ptr(), dx.data_ptr()
    values[at.MEAN], values[at.VAR] = mean.data_ptr(), var.data_ptr()
    if weight is not None:
        values[at.WEIGHT] = weight.data_ptr()
    if bias is not None:
        values[at.BIAS] = bias.data_ptr()
    if call.keeps_gradient:
        values[at.G] = values[at.DX]
    elif planned.streams:
        values[at.STREAMS] = _streams(planned, values[at.DX], x.element_size())
    values[at.DWEIGHT], values[at.DBIAS] = dweight.data_ptr(), dbias.data_ptr()
    values[at.PRODUCTS], values[at.TOTALS] = sums, sums + 8 * call.products
    address = ctypes.addressof(values)
    build.run(planned.kernel, address, planned.threads)
    if call.parameters:
        values[at.TICKET] = values[at.WORKERS] = 0
        values[at.IS_NARROW] = call.gradients is torch.float32
        values[at.TASKS], values[at.BLOCK] = 1, call.parameters
        if planned.affine_tasks:
            values[at.TASKS], values[at.BLOCK] = planned.affine_tasks, planned.affine_block
        build.run(affine(), address, min(planned.threads, values[at.TASKS]))
    del memory
    return dx, dweight, dbias
