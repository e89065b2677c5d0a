"""What is measured on a device: normalizations in the shapes of networks, their rivals, and the tensors they get.

The same cases can be rehearsed: small shapes on CPU tensors, which Triton's interpreter takes. Times then say nothing,
but all of the code that makes, checks and tells them has run before a device is at hand.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import steadynorm
from benchmarks.interleaved import LEAST_ROUNDS

RESNET50 = ((64, 112), (256, 56), (512, 28), (1024, 14), (2048, 7))
BATCH = 256
ROWS = ((65536, 1024), (32768, 2048), (16384, 4096), (8192, 8192), (4096, 16384))
GROUPS = ((64, 256, 56, 56), (64, 512, 28, 28))
REHEARSED_RESNET50, REHEARSED_BATCH = ((8, 8), (4, 7)), 3
REHEARSED_ROWS = ((16, 64), (1, 8200))
REHEARSED_GROUPS = ((1, 64, 4, 4),)
# How near to zero an activation's input may be told to be on either side, and the most that a result may be wrong by,
# as a share of the largest value.
NEAR_ZERO = {torch.float32: 1e-4, torch.bfloat16: 0.06, torch.float16: 0.02}
MOST = {torch.float32: 2e-5, torch.bfloat16: 2**-6, torch.float16: 2**-8}
# More than the second cache of any device so far; the host needs a few tenths of a millisecond for a step.
FLUSHED_BYTES = 512 << 20
BUSY_CYCLES = 2_000_000
COPIED_BYTES = 2 << 30


class Place:
    """Where a benchmark runs: on the CUDA device, or rehearsed on CPU tensors."""

    def __init__(self, *, is_rehearsed: bool) -> None:
        self.is_rehearsed, self.device = is_rehearsed, "cpu" if is_rehearsed else "cuda"
        self.name = "a rehearsal" if is_rehearsed else torch.cuda.get_device_name()
        self.least_rounds = 1 if is_rehearsed else LEAST_ROUNDS
        flushed = 1 if is_rehearsed else FLUSHED_BYTES
        self._flushed = torch.zeros(flushed // 4 or 1, device=self.device)

    def seconds(self, *steps: Callable[[], Any]) -> list[float]:
        """Seconds of each of `steps`, behind work that keeps the device busy until the host is done with them."""
        if self.is_rehearsed:
            at = [time.perf_counter()]
            for step in steps:
                step()
                at.append(time.perf_counter())
            return [after - before for before, after in pairwise(at)]
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(steps) + 1)]
        self._flushed.sum()  # by reading: what is written has to leave the cache in the time of what comes next
        torch.cuda._sleep(BUSY_CYCLES)
        events[0].record()
        for step, event in zip(steps, events[1:], strict=True):
            step()
            event.record()
        torch.cuda.synchronize()
        return [before.elapsed_time(after) / 1e3 for before, after in pairwise(events)]

    def wait(self) -> None:
        """Until the device is done."""
        if not self.is_rehearsed:
            torch.cuda.synchronize()

    def copy_speed(self) -> float:
        """Bytes a second, read and written, of the fastest of several large copies."""
        size = 1 << 20 if self.is_rehearsed else COPIED_BYTES
        x = torch.empty(size, dtype=torch.uint8, device=self.device).random_(256)
        y = torch.empty_like(x)
        return 2 * size / min(self.seconds(lambda: y.copy_(x))[0] for _ in range(10))


@dataclass(frozen=True)
class Case:
    """One normalization: what goes in, how many passes over a tensor it must make, and the rivals by name."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str
    residual: bool
    passes: tuple[int, int]
    rivals: Mapping[str, Callable[..., Any]]
    before_activation: Callable[..., Tensor] | None = None

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.name} {'x'.join(map(str, self.shape))}{' + add' if self.residual else ''} {self.layout} {dtype}"


def _half(*, is_rehearsed: bool) -> torch.dtype:
    """bfloat16; the interpreter truncates it, where a device rounds."""
    return torch.float16 if is_rehearsed else torch.bfloat16


def batch_cases(*, is_rehearsed: bool) -> Iterator[Case]:
    """Passes: forward x twice and y; backward x and dy twice and dx; a residual adds one, its gradient and y two."""
    planes, size = (REHEARSED_RESNET50, REHEARSED_BATCH) if is_rehearsed else (RESNET50, BATCH)
    for dtype, layout in ((_half(is_rehearsed=is_rehearsed), "channels_last"), (torch.float32, "plain")):
        for channels, side in planes:
            for residual in (False, True):
                passes = (3 + residual, 5 + residual)
                shape = (size, channels, side, side)
                rivals = {"ours": our_batch, "eager": batch}
                yield Case("batch_norm", shape, dtype, layout, residual, passes, rivals, _before_activation)


def batch(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
    """What model code does."""
    y = F.batch_norm(x, *_running(x), weight, bias, True)
    return F.relu(y if residual is None else y + residual)


def _before_activation(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
    y = F.batch_norm(x, None, None, weight, bias, True)
    return y if residual is None else y + residual


def our_batch(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
    """The same in one call."""
    running = _running(x)
    return steadynorm.functional.batch_norm(x, *running, weight, bias, True, residual=residual, activation="relu")


def _running(x: Tensor) -> tuple[Tensor, Tensor]:
    """Running statistics of `x`, made once: fresh ones would be timed too."""
    key = x.shape[1], x.dtype
    if key not in RUNNING:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        RUNNING[key] = (x.new_zeros(x.shape[1], dtype=dtype), x.new_ones(x.shape[1], dtype=dtype))
    return RUNNING[key]


RUNNING: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]] = {}


def sample_cases(*, is_rehearsed: bool) -> Iterator[Case]:
    """Passes: forward x and y, and with a sum both terms and the sum; backward x, dy and dx."""
    dtype = _half(is_rehearsed=is_rehearsed)
    for shape in REHEARSED_ROWS if is_rehearsed else ROWS:
        for name in ("layer_norm", "rms_norm"):
            for residual in (False, True):
                passes = (4, 4) if residual else (2, 3)
                rivals = {"ours": _rows(steadynorm.functional, name), "eager": _rows(F, name)}
                yield Case(name, shape, dtype, "plain", residual, passes, rivals)
    for shape in REHEARSED_GROUPS if is_rehearsed else GROUPS:
        for layout in ("plain", "channels_last"):
            rivals = {"ours": _groups(steadynorm.functional), "eager": _groups(F)}
            yield Case("group_norm", shape, dtype, layout, False, (3, 5), rivals)


def _rows(module: Any, name: str) -> Callable[..., Any]:
    is_ours = module is not F

    def run(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> Any:
        width = (x.shape[-1],)
        parameters = (weight, bias) if name == "layer_norm" else (weight,)
        if is_ours and residual is not None:
            return getattr(module, name)(x, width, *parameters, eps=1e-5, addend=residual)
        total = x if residual is None else x + residual
        y = getattr(module, name)(total, width, *parameters, eps=1e-5)
        return y if residual is None else (y, total)

    return run


def _groups(module: Any) -> Callable[..., Any]:
    return lambda x, weight, bias, residual: module.group_norm(x, 32, weight, bias)


class Inputs:
    """The tensors of a case, and how a rival is timed on them."""

    def __init__(self, case: Case, place: Place) -> None:
        torch.manual_seed(0)
        self.place = place
        channels = case.shape[-1] if len(case.shape) == 2 else case.shape[1]
        self.x = self._random(case).requires_grad_()
        self.residual = self._random(case).requires_grad_() if case.residual else None
        self.dy = self._random(case)
        self.weight = (torch.rand(channels, device=place.device) + 0.5).requires_grad_()
        self.bias = torch.randn(channels, device=place.device, requires_grad=True)
        if case.name != "batch_norm":  # torch wants them in the dtype of x
            self.weight, self.bias = (t.detach().to(case.dtype).requires_grad_() for t in (self.weight, self.bias))
        self.leaves = [t for t in (self.x, self.weight, self.bias, self.residual) if t is not None]
        if case.before_activation is not None:
            # On which side of zero a value falls is a matter of rounding there, and a whole gradient hangs on it.
            doubles = (
                None if t is None else t.detach().double() for t in (self.x, self.weight, self.bias, self.residual)
            )
            self.dy[case.before_activation(*doubles).abs() < NEAR_ZERO[case.dtype]] = 0
        self.copied = torch.empty_like(self.dy)

    def step(self, rival: Callable[..., Any]) -> tuple[float, float]:
        """Seconds of a forward pass, and of the backward pass after it."""
        outputs: list[Any] = []
        forward, backward = self.place.seconds(
            lambda: outputs.append(rival(self.x, self.weight, self.bias, self.residual)),
            lambda: self._backward(outputs[0], self.leaves, self.dy),
        )
        return forward, backward

    def copy(self) -> float:
        """Seconds of a copy of one tensor."""
        return self.place.seconds(lambda: self.copied.copy_(self.dy))[0]

    def results(self, rival: Callable[..., Any], dtype: torch.dtype | None = None) -> list[Tensor]:
        """Output and gradients, in another precision if one is named; in float64."""
        leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in self.leaves]
        y = rival(*leaves[:3], leaves[3] if self.residual is not None else None)
        found = self._backward(y, leaves, self.dy if dtype is None else self.dy.to(dtype))
        outputs = y if isinstance(y, tuple) else (y,)
        return [t.detach().double() for t in (*outputs, *found) if t is not None]

    def _backward(self, y: Any, leaves: list[Tensor], dy: Tensor) -> tuple[Tensor | None, ...]:
        outputs = y if isinstance(y, tuple) else (y,)
        return torch.autograd.grad(outputs, leaves, [dy] * len(outputs), allow_unused=True)

    def _random(self, case: Case) -> Tensor:
        x = torch.randn(case.shape, device=self.place.device).to(case.dtype)
        return x.to(memory_format=torch.channels_last) if case.layout == "channels_last" else x
