"""The kernels for CUDA devices, in Triton (kernels/gpu/): a first pass over a tensor for sums, a second for the result.

What one program can do for a channel by itself is one launch. With `TRITON_INTERPRET=1` the same kernels run on CPU
tensors, slowly, where the backend is asked for by name.
"""

import os
import shutil
import struct
import sys
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from steadynorm import moments as moments_
from steadynorm.grouping import Grouping
from steadynorm.kernels.gpu.start import start
from steadynorm.moments import Moments

if TYPE_CHECKING:
    from steadynorm.kernels.gpu.launch import Launch

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Triton compiles for Volta and newer; bfloat16 is in Ampere and newer.
CAPABILITY = (7, 0)
BRAIN_CAPABILITY = (8, 0)
COMPILERS = ("gcc", "clang")
# Multiprocessors that the interpreter counts as: few, and yet small tensors are split.
INTERPRETED = 4
# Channels of a program of `merge_moments` and `ema`, whose work is small; float64 numbers that a warp holds of it.
MERGED_CHANNELS = 2
MERGED_PER_WARP = 512
MOVED_CHANNELS = 1024


def why_not(x: Tensor | None = None, *, masked: bool = False) -> str:
    """Why this backend cannot run here, or cannot take `x`; empty where it can."""
    missing = _missing()
    if missing or x is None:
        return missing
    if not x.is_cuda and not (is_interpreted() and x.is_cpu):
        return f"the tensor is on {x.device}"
    if x.dtype not in DTYPES:
        return f"the tensor is {x.dtype}"
    if x.numel() == 0:
        return "the tensor is empty"
    return _lacks(x.dtype, x.device.index) if x.is_cuda else ""


def takes() -> str:
    """The tensors that it takes here, in words."""
    where = "CPU tensors, in Triton's interpreter (TRITON_INTERPRET=1)" if is_interpreted() else "CUDA tensors"
    return f"{where}: float32, float64, bfloat16, float16"


def is_interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _missing() -> str:
    if find_spec("triton") is None:
        return "triton is not installed"
    if is_interpreted():
        return ""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if sys.platform == "linux" and not (os.environ.get("CC") or any(map(shutil.which, COMPILERS))):
        return "Triton needs a C compiler, and there is none: install gcc or clang, or name one with CC"
    return ""


@cache
def _lacks(dtype: torch.dtype, index: int) -> str:
    capability = torch.cuda.get_device_capability(index)
    words = f"CUDA device {index} has compute capability {capability[0]}.{capability[1]}"
    if capability < CAPABILITY:
        return f"{words}, Triton needs 7.0"
    if dtype == torch.bfloat16 and capability < BRAIN_CAPABILITY:
        return f"{words}, bfloat16 needs 8.0"
    return ""


@cache
def _multiprocessors(index: int | None) -> int:
    return INTERPRETED if index is None else torch.cuda.get_device_properties(index).multi_processor_count


@cache
def _kernels() -> Any:
    from steadynorm.kernels.gpu import batch

    return batch


@cache
def _plan() -> "Callable[..., Launch]":
    from steadynorm.kernels.gpu.launch import plan

    return plan


class Call:
    """One call on one tensor: its launch, the arguments that all kernels take, and the device they run on."""

    __slots__ = ("launch", "sizes", "x")

    def __init__(self, x: Tensor, grouping: Grouping) -> None:
        index = x.device.index if x.is_cuda else None
        self.x, self.sizes = x, grouping
        self.launch: Launch = _plan()(grouping, x.dtype == torch.float64, _multiprocessors(index))

    def run(self, kernel: Any, splits: int, *arguments: Any, **constants: Any) -> None:
        """Launch a kernel over `splits` parts of every unit."""
        made = self.launch
        rest = (*self.sizes, made.chunks, splits, made.units)
        options = {**constants, "TILE": made.tile, "num_warps": made.warps}
        if made.registers is not None:
            options["maxnreg"] = made.registers
        start(kernel, self.x, made.units * splits, *arguments, *rest, **options)

    def merge(self, kernel: Any, *parts_and_results: Tensor | None) -> None:
        """Launch one of the two kernels that put parts together."""
        from steadynorm.kernels.gpu.launch import above

        group, splits = self.sizes[1], self.launch.splits
        parts = above(splits)
        start(
            kernel,
            self.x,
            -(-group // MERGED_CHANNELS),
            *(*parts_and_results, group, splits),
            PARTS=parts,
            CHANNELS=MERGED_CHANNELS,
            num_warps=max(1, parts * MERGED_CHANNELS // MERGED_PER_WARP),
        )

    def doubles(self, *shape: int) -> Tensor:
        """Memory for numbers of channels."""
        return torch.empty(shape, dtype=torch.float64, device=self.x.device)


def dense(*numbers: Tensor | None) -> tuple[Tensor | None, ...]:
    """Parameters and statistics as kernels read them, one number of a channel behind the other."""
    return tuple(t if t is None else t.contiguous() for t in numbers)


def _bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.uint8)


def moments(x: Tensor, grouping: Grouping, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See `steadynorm.kernels`."""
    call = Call(x, grouping)
    group, splits = grouping.group, call.launch.splits
    mean, var = call.doubles(group), call.doubles(group)
    if splits == 1:
        call.run(_kernels().moments, 1, x, _bytes(mask), mean, var, None, IS_WHOLE=True)
        return mean, var
    parts = call.doubles(3, splits, group)
    call.run(_kernels().moments, splits, x, _bytes(mask), *parts, IS_WHOLE=False)
    call.merge(_kernels().merge_moments, *parts, mean, var)
    return mean, var


def normalize(
    x: Tensor,
    grouping: Grouping,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    eps: float = 1e-5,
    activation: str | None = None,
) -> Tensor:
    """See `steadynorm.kernels`; mean and var may be float32 as well: a cast is a launch more."""
    call, y = Call(x, grouping), torch.empty_like(x)
    tensors = (x, residual, _bytes(mask), y, *dense(mean, var, weight, bias))
    call.run(_kernels().normalize, call.launch.sweeps, *tensors, EPS=eps, ACTIVATION=activation)
    return y


def forward(
    x: Tensor,
    grouping: Grouping,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    eps: float = 1e-5,
    activation: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """moments, then normalize: y, mean, var."""
    call = Call(x, grouping)
    if not call.launch.is_whole:
        mean, var = moments(x, grouping, mask)
        return normalize(x, grouping, mean, var, weight, bias, residual, mask, eps, activation), mean, var
    y, mean, var = torch.empty_like(x), call.doubles(grouping.group), call.doubles(grouping.group)
    tensors = (x, residual, _bytes(mask), y, mean, var, *dense(weight, bias))
    call.run(_kernels().forward, 1, *tensors, EPS=eps, ACTIVATION=activation)
    return y, mean, var


def backward_sums(
    dy: Tensor,
    x: Tensor,
    grouping: Grouping,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    y: Tensor | None = None,
    mask: Tensor | None = None,
    eps: float = 1e-5,
    activation: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `steadynorm.kernels`."""
    call, g = Call(x, grouping), torch.empty_like(x)
    side = (residual, y, _bytes(mask), g)
    return g, *_sums(call, dy, *side, *dense(mean, var, weight, bias), eps=eps, activation=activation)


def _sums(
    call: Call,
    dy: Tensor,
    *tensors: Tensor | None,
    eps: float,
    activation: str | None,
    gradients: tuple[Tensor | None, Tensor | None] = (None, None),
) -> tuple[Tensor, Tensor]:
    """Σ g·x̂ and Σ g (group,), and g where there is a place for it among the tensors.

    `gradients`: where the sums of several parts go as well, in the dtypes of weight and bias.
    """
    group, splits = call.sizes[1], call.launch.splits
    dweight, dbias = call.doubles(group), call.doubles(group)
    parts = call.doubles(2, splits, group) if splits > 1 else (dweight, dbias)
    call.run(_kernels().sums, splits, dy, call.x, *tensors, *parts, EPS=eps, ACTIVATION=activation)
    if splits > 1:
        call.merge(_kernels().merge_sums, *parts, dweight, dbias, *gradients)
    return dweight, dbias


def backward_input(
    g: Tensor,
    x: Tensor,
    grouping: Grouping,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    dweight: Tensor,
    dbias: Tensor,
    count: Tensor | None,
    mask: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """See `steadynorm.kernels`."""
    tensors = (None, None, _bytes(mask))
    statistics = (*dense(mean, var, weight, None, dweight, dbias), count, 0)
    return _input(Call(x, grouping), g, tensors, statistics, eps=eps, activation=None, is_given=count is None)


def _input(
    call: Call,
    dy: Tensor,
    tensors: tuple[Tensor | None, ...],
    statistics: tuple[Tensor | int | None, ...],
    *,
    eps: float,
    activation: str | None,
    is_given: bool,
) -> Tensor:
    dx = torch.empty_like(call.x)
    constants = {"EPS": eps, "ACTIVATION": activation, "IS_GIVEN": is_given}
    call.run(_kernels().input_gradient, call.launch.sweeps, dy, call.x, *tensors, dx, *statistics, **constants)
    return dx


def backward(
    dy: Tensor,
    x: Tensor,
    grouping: Grouping,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    y: Tensor | None = None,
    mask: Tensor | None = None,
    eps: float = 1e-5,
    activation: str | None = None,
    is_given: bool = False,
    needs_dresidual: bool = False,
    needs_affine: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """backward_sums, then backward_input: dx, dweight, dbias, and g (the gradient of the residual) if asked for.

    dweight and dbias come in the dtypes of weight and bias.
    """
    call = Call(x, grouping)
    flat = _bytes(mask)
    count = mask.sum() if mask is not None and not is_given else None
    numbers = (count, grouping.values_per_group)
    g = torch.empty_like(x) if needs_dresidual else None
    affine = dense(mean, var, weight, bias)
    # Rounded where they are written: two casts afterwards would be two launches more.
    gradients = gradient_of(weight, x, grouping.group), gradient_of(bias, x, grouping.group)
    if call.launch.is_whole:
        dx = torch.empty_like(x)
        tensors = (dy, x, residual, y, flat, g, dx, *affine, *gradients, *numbers)
        call.run(_kernels().backward, 1, *tensors, EPS=eps, ACTIVATION=activation, IS_GIVEN=is_given)
        return dx, *gradients, g
    if is_given and not (needs_affine or needs_dresidual):
        statistics = (*affine, None, None, *numbers)
        dx = _input(call, dy, (residual, y, flat), statistics, eps=eps, activation=activation, is_given=True)
        return dx, *gradients, None
    side = (residual, y, flat, g)
    dweight, dbias = _sums(call, dy, *side, *affine, eps=eps, activation=activation, gradients=gradients)
    statistics = (*affine, dweight, dbias, *numbers)
    if g is None:
        sides = (residual, y, flat)
        dx = _input(call, dy, sides, statistics, eps=eps, activation=activation, is_given=is_given)
    else:
        # Read instead of computed again: one tensor in place of two or three.
        dx = _input(call, g, (None, None, flat), statistics, eps=eps, activation=None, is_given=is_given)
    return dx, *gradients, g


def gradient_of(parameter: Tensor | None, x: Tensor, count: int) -> Tensor:
    """Memory for the sums that are the gradient of weight or bias, in its dtype; float64 where there is none."""
    return torch.empty(count, dtype=torch.float64 if parameter is None else parameter.dtype, device=x.device)


def ema_(
    running_mean: Tensor,
    running_var: Tensor,
    batch: Moments,
    momentum: float | None,
    *,
    num_batches_tracked: Tensor | None = None,
    guard: bool = True,
) -> None:
    """`moments.ema_` in one launch."""
    count, tracked, group = batch.count, num_batches_tracked, running_mean.numel()
    tensors = [t for t in (running_mean, running_var, tracked, batch.mean, batch.var, count) if isinstance(t, Tensor)]
    is_plain = all(t.is_contiguous() and t.device == batch.mean.device for t in tensors)
    has_own_counts = isinstance(count, Tensor) and count.dim() > 0
    if not is_plain or has_own_counts or (momentum is None and tracked is None):
        moments_.ema_(running_mean, running_var, batch, momentum, num_batches_tracked=tracked, guard=guard)
        return
    from steadynorm.kernels.gpu.running import ema

    weight = 0.0 if momentum is None else float(momentum)
    # Triton takes a number as float32: what that leaves of it comes beside it.
    rest = weight - struct.unpack("f", struct.pack("f", weight))[0]
    counts = (count, 0) if isinstance(count, Tensor) else (None, count)
    start(
        ema,
        batch.mean,
        1,
        *(running_mean, running_var, tracked, batch.mean, batch.var, *counts, weight, rest, group),
        GUARD=guard,
        IS_CUMULATIVE=momentum is None,
        CHANNELS=MOVED_CHANNELS,
    )
