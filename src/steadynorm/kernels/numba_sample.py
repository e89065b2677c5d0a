"""Statistics within a sample on CPU tensors: points the compiled kernels at memory and runs them.

Four layouts, four sets of kernels (kernels/cpu/samples.py); `reference_sample` says what they compute, `sample_plans`
how a call is cut into tasks.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor

from steadynorm.grouping import SampleGrouping
from steadynorm.kernels import numba_cpu
from steadynorm.kernels.batch_plans import CPU, readable
from steadynorm.kernels.cpu import build
from steadynorm.kernels.cpu import samples as at
from steadynorm.kernels.cpu.memory import empty_like
from steadynorm.kernels.numba_cpu import kept_gradient
from steadynorm.kernels.sample_plans import LANES, Plan, affine, plan


def why_not(x: Tensor | None = None, grouping: SampleGrouping | None = None, *, masked: bool = False) -> str:
    """Why this backend cannot run here, or cannot take `x`; empty where it can."""
    return numba_cpu.why_not(x)


def _share(planned: Plan, values: Any) -> tuple[Tensor, Tensor]:
    """Memory that all threads use; it must live as long as they run."""
    flags = torch.zeros(planned.flags, dtype=torch.int64, device=CPU)
    shared = torch.empty(planned.shared_bytes, dtype=torch.uint8, device=CPU)
    values[at.FLAGS], values[at.SHARED] = flags.data_ptr(), shared.data_ptr()
    return flags, shared


def _streams(planned: Plan, output: Tensor) -> bool:
    return planned.streams == 2 or output.data_ptr() % (LANES * output.element_size()) == 0


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
    weight, bias = readable(weight), readable(bias)
    planned = plan(
        False,
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
    values = at.Integers.from_buffer_copy(planned.template)
    empty = empty_like if planned.is_large else torch.empty_like
    y, mean = empty(x), torch.empty(planned.statistics, dtype=torch.float64, device=CPU)
    var = torch.empty_like(mean)
    values[at.X], values[at.Y] = x.data_ptr(), y.data_ptr()
    values[at.MEAN], values[at.VAR] = mean.data_ptr(), var.data_ptr()
    total = x
    if addend is not None:
        total = empty(x)
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
    if planned.scratch_bytes:
        scratch = torch.empty(planned.scratch_bytes, dtype=torch.uint8, device=CPU)
        values[at.SCRATCH] = scratch.data_ptr()
    alive = _share(planned, values) if planned.flags else None
    if planned.streams:
        values[at.STREAMS] = _streams(planned, y)
    build.run(planned.kernel, ctypes.addressof(values), planned.threads)
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
    weight, bias = readable(weight), readable(bias)
    planned = plan(
        True,
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
    values = at.Integers.from_buffer_copy(planned.template)
    empty = empty_like if planned.is_large else torch.empty_like
    dx = empty(total)
    dresidual = empty(total) if needs_dresidual else None
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
    elif kept_gradient(activation, residual, y):
        values[at.G] = dx.data_ptr()
    # What was just read is written over: streaming stores would only push it out of the cache first.
    if planned.streams and values[at.G] != values[at.DX]:
        values[at.STREAMS] = _streams(planned, dx)
    dweight = torch.empty(grouping.groups * grouping.channels if needs_affine else 0, dtype=torch.float64, device=CPU)
    dbias = torch.empty_like(dweight)
    values[at.PRODUCTS], values[at.TOTALS] = dweight.data_ptr(), dbias.data_ptr()
    if planned.products:
        sums = torch.empty(2 * planned.products, dtype=torch.float64, device=CPU)
        values[at.DWEIGHT], values[at.DBIAS] = values[at.PRODUCTS], values[at.TOTALS]
        values[at.PRODUCTS], values[at.TOTALS] = sums.data_ptr(), sums.data_ptr() + 8 * planned.products
    if planned.scratch_bytes:
        scratch = torch.empty(planned.scratch_bytes, dtype=torch.uint8, device=CPU)
        values[at.SCRATCH] = scratch.data_ptr()
    alive = _share(planned, values) if planned.flags else None
    address = ctypes.addressof(values)
    build.run(planned.kernel, address, planned.threads)
    if planned.affine_tasks and needs_affine:
        values[at.TICKET] = values[at.WORKERS] = 0
        values[at.TASKS], values[at.BLOCK] = planned.affine_tasks, planned.affine_block
        build.run(affine(), address, min(planned.threads, planned.affine_tasks))
    del alive
    return dx, dweight, dbias, dresidual
