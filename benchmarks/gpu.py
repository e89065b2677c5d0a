"""The layers on a CUDA device: against torch eager, torch.compile and a copy of the bytes, interleaved in one process.

    python -m benchmarks.gpu [batch sample launch step] [--no-compile] [--seconds 480] [--out FILE]

    batch     BatchNorm + ReLU, with and without a residual, ResNet-50 at batch 256, forward and backward
    sample    LayerNorm and RMSNorm over rows of 1,024 to 16,384, with and without a sum before; GroupNorm
    launch    one step of a tensor so small that the host is all there is
    step      a whole training step of ResNet-50, and what share of it is normalization

Every time is between two events on the device, behind work that keeps it busy until the host is done and clears its
cache. `bandwidth` is that of the passes that must be made over one tensor, as a share of a large copy's. Numbers are
checked first: a wrong kernel is not timed. After `--seconds` no new case is begun.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import steadynorm
from benchmarks.interleaved import check, take_turns
from benchmarks.models import TorchNorm, our_norm, resnet50
from steadynorm import machine
from steadynorm.lab.store import Store

RESNET50 = ((64, 112), (256, 56), (512, 28), (1024, 14), (2048, 7))
BATCH = 256
ROWS = ((65536, 1024), (32768, 2048), (16384, 4096), (8192, 8192), (4096, 16384))
GROUPS = ((64, 256, 56, 56), (64, 512, 28, 28))
SMALL = (32, 64, 8, 8)
# More than the second cache of any device so far; the host needs a few tenths of a millisecond for a step.
FLUSHED_BYTES = 512 << 20
BUSY_CYCLES = 2_000_000
COPIED_BYTES = 2 << 30
LAUNCHES = 300
IMAGES, STEPS = 128, 10
OUR_KERNELS = frozenset(
    ("moments", "merge_moments", "normalize", "forward", "sums", "merge_sums", "input_gradient", "backward", "ema")
)
NORM_KERNELS = ("norm", "bn_fw", "bn_bw")
POINTWISE = ("elementwise", "relu", "add")


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


def batch_cases() -> Iterator[Case]:
    """Passes: forward x twice and y; backward x and dy twice and dx; a residual adds one, its gradient and y two."""
    for dtype, layout in ((torch.bfloat16, "channels_last"), (torch.float32, "plain")):
        for channels, size in RESNET50:
            for residual in (False, True):
                passes = (3 + residual, 5 + residual)
                shape = (BATCH, channels, size, size)
                yield Case("batch_norm", shape, dtype, layout, residual, passes, {"ours": our_batch, "eager": batch})


def batch(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
    """What model code does."""
    y = F.batch_norm(x, *_running(x), weight, bias, True)
    return F.relu(y if residual is None else y + residual)


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


def sample_cases() -> Iterator[Case]:
    """Passes: forward x and y, and with a sum both terms and the sum; backward x, dy and dx."""
    for shape in ROWS:
        for name in ("layer_norm", "rms_norm"):
            for residual in (False, True):
                passes = (4, 4) if residual else (2, 3)
                rivals = {"ours": _rows(steadynorm.functional, name), "eager": _rows(F, name)}
                yield Case(name, shape, torch.bfloat16, "plain", residual, passes, rivals)
    for shape in GROUPS:
        for layout in ("plain", "channels_last"):
            rivals = {"ours": _groups(steadynorm.functional), "eager": _groups(F)}
            yield Case("group_norm", shape, torch.bfloat16, layout, False, (3, 5), rivals)


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
    """The tensors of a case on the device, and how a rival is timed on them."""

    def __init__(self, case: Case, flushed: Tensor) -> None:
        channels = case.shape[-1] if len(case.shape) == 2 else case.shape[1]
        self.flushed = flushed
        self.x = _random(case).requires_grad_()
        self.residual = _random(case).requires_grad_() if case.residual else None
        self.dy = _random(case)
        self.weight = (torch.rand(channels, device="cuda") + 0.5).requires_grad_()
        self.bias = torch.randn(channels, device="cuda", requires_grad=True)
        if len(case.shape) == 2:  # torch wants them in the dtype of x
            self.weight, self.bias = (t.detach().to(case.dtype).requires_grad_() for t in (self.weight, self.bias))
        self.leaves = [t for t in (self.x, self.weight, self.bias, self.residual) if t is not None]
        self.copied = torch.empty_like(self.dy)

    def step(self, rival: Callable[..., Any]) -> tuple[float, float]:
        """Seconds of a forward pass, and of the backward pass after it."""
        at = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        self._keep_busy()
        at[0].record()
        y = rival(self.x, self.weight, self.bias, self.residual)
        at[1].record()
        self._backward(y, self.leaves, self.dy)
        at[2].record()
        torch.cuda.synchronize()
        return at[0].elapsed_time(at[1]) / 1e3, at[1].elapsed_time(at[2]) / 1e3

    def copy(self) -> float:
        """Seconds of a copy of one tensor."""
        at = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        self._keep_busy()
        at[0].record()
        self.copied.copy_(self.dy)
        at[1].record()
        torch.cuda.synchronize()
        return at[0].elapsed_time(at[1]) / 1e3

    def results(self, rival: Callable[..., Any], dtype: torch.dtype | None = None) -> list[Tensor]:
        """Output and gradients, in another precision if one is named; in float64 on the device."""
        leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in self.leaves]
        y = rival(*leaves[:3], leaves[3] if self.residual is not None else None)
        found = self._backward(y, leaves, self.dy if dtype is None else self.dy.to(dtype))
        outputs = y if isinstance(y, tuple) else (y,)
        return [t.detach().double() for t in (*outputs, *found) if t is not None]

    def _backward(self, y: Any, leaves: list[Tensor], dy: Tensor) -> tuple[Tensor | None, ...]:
        outputs = y if isinstance(y, tuple) else (y,)
        return torch.autograd.grad(outputs, leaves, [dy] * len(outputs), allow_unused=True)

    def _keep_busy(self) -> None:
        self.flushed.zero_()
        torch.cuda._sleep(BUSY_CYCLES)


def _random(case: Case) -> Tensor:
    x = torch.randn(case.shape, device="cuda").to(case.dtype)
    return x.to(memory_format=torch.channels_last) if case.layout == "channels_last" else x


def copy_speed() -> float:
    """Bytes a second, read and written, of the fastest of several large copies."""
    x = torch.empty(COPIED_BYTES, dtype=torch.uint8, device="cuda").random_(256)
    y, best = torch.empty_like(x), 0.0
    for _ in range(10):
        at = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        at[0].record()
        y.copy_(x)
        at[1].record()
        torch.cuda.synchronize()
        best = max(best, 2 * COPIED_BYTES / (at[0].elapsed_time(at[1]) / 1e3))
    return best


def measure(case: Case, with_compile: bool, flushed: Tensor, speed: float) -> dict[str, float]:
    """Median seconds of every rival, the errors, and the bandwidth of ours as a share of a copy's."""
    torch.manual_seed(0)
    inputs = Inputs(case, flushed)
    rivals = dict(case.rivals)
    error, torch_error = check(
        *(inputs.results(rivals[name]) for name in ("ours", "eager")), inputs.results(rivals["eager"], torch.float64)
    )
    if with_compile:
        torch._dynamo.reset()
        rivals["compile"] = torch.compile(rivals["eager"], dynamic=False)
    found = take_turns(rivals, inputs.step, inputs.copy)
    size = inputs.x.numel() * inputs.x.element_size()
    for way, passes in zip(("forward", "backward"), case.passes, strict=True):
        found[f"bandwidth_{way}"] = passes * size / found[f"ours_{way}"] / speed
    return found | {"error": error, "torch_error": torch_error, "megabytes": size / 1e6}


def told(found: Mapping[str, float]) -> str:
    """One row in words."""
    words = [f"{found['megabytes']:7.1f} MB"]
    for way in ("forward", "backward"):
        words.append(f"{way} {found[f'ours_{way}'] * 1e6:7.1f} us, {found[f'bandwidth_{way}']:4.0%} of a copy")
        words += [
            f"{found[f'{name}_{way}'] / found[f'ours_{way}']:.2f} {name}"
            for name in ("eager", "compile")
            if f"{name}_{way}" in found
        ]
    return ", ".join(words)


def launch() -> dict[str, float]:
    """Seconds of a training step through a small layer, host included, of ours and torch's, in turns."""
    layers = {"ours": steadynorm.BatchNorm2d(SMALL[1]).cuda(), "eager": nn.BatchNorm2d(SMALL[1]).cuda()}
    x, dy = torch.randn(SMALL, device="cuda", requires_grad=True), torch.randn(SMALL, device="cuda")
    best: dict[str, float] = {}
    for _ in range(7):
        for name, layer in layers.items():
            for way in ("forward", "both"):
                torch.cuda.synchronize()
                start = time.perf_counter()
                for _ in range(LAUNCHES):
                    y = layer(x)
                    if way == "both":
                        y.backward(dy)
                torch.cuda.synchronize()
                seconds = (time.perf_counter() - start) / LAUNCHES
                best[f"{name}_{way}"] = min(best.get(f"{name}_{way}", seconds), seconds)
    return best


def training_step() -> dict[str, float]:
    """Seconds of a step of ResNet-50 (autocast, channels-last), of both, and the share of normalization in it."""
    x = torch.randn(IMAGES, 3, 224, 224, device="cuda").to(memory_format=torch.channels_last)
    target = torch.randint(1000, (IMAGES,), device="cuda")
    found: dict[str, float] = {}
    steps: dict[str, Callable[[], None]] = {}
    for name, norm in (("ours", our_norm), ("eager", TorchNorm)):
        model = resnet50(norm).cuda().to(memory_format=torch.channels_last)
        steps[name] = _stepper(model, torch.optim.SGD(model.parameters(), lr=0.01), x, target)
    for step in steps.values():
        for _ in range(3):
            step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(STEPS):
        for name, step in steps.items():
            at = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            at[0].record()
            step()
            at[1].record()
            torch.cuda.synchronize()
            seconds[name].append(at[0].elapsed_time(at[1]) / 1e3)
    for name, step in steps.items():
        found[f"{name}_step"] = sorted(seconds[name])[STEPS // 2]
        found |= {f"{name}_{what}": share for what, share in _shares(step).items()}
    return found


def _stepper(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, target: Tensor) -> Callable[[], None]:
    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16):
            loss = F.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()

    return step


def _shares(step: Callable[[], None]) -> dict[str, float]:
    """Shares of the time on the device: kernels of normalization, and pointwise ones, which ours fuse into them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    times = {event.key: float(event.self_device_time_total) for event in profile.key_averages()}
    whole = sum(times.values())
    norm = {key for key in times if key in OUR_KERNELS or any(part in key for part in NORM_KERNELS)}
    pointwise = {key for key in times if any(part in key for part in POINTWISE)} - norm
    return {
        "normalization": sum(times[key] for key in norm) / whole,
        "pointwise": sum(times[key] for key in pointwise) / whole,
    }


def main() -> None:
    """Measure what is named, or all of it, and append the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["launch", "step", "batch", "sample"])
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--seconds", type=float, default=480)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu.jsonl"))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("there is no CUDA device here")
    start, store, speed = time.perf_counter(), Store(options.out), copy_speed()
    flushed = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device="cuda")
    print(f"{torch.cuda.get_device_name()}: a copy moves {speed / 1e12:.2f} TB/s", flush=True)

    def keep(**row: Any) -> None:
        store.append({"benchmark": "gpu", "copy": speed, **row, "machine": machine.describe()})

    for what in options.what:
        if what in ("launch", "step"):
            found = launch() if what == "launch" else training_step()
            print(what, ", ".join(f"{name} {value:.4g}" for name, value in found.items()), flush=True)
            keep(what=what, **found)
            continue
        for case in {"batch": batch_cases, "sample": sample_cases}[what]():
            if time.perf_counter() - start > options.seconds:
                print("time is up", flush=True)
                return
            named = f"{case.name} {'x'.join(map(str, case.shape))}{' + add' if case.residual else ''} {case.layout}"
            try:
                found = measure(case, options.compile, flushed, speed)
            except AssertionError as error:
                print(f"{named}: {error}", flush=True)
                keep(what=what, name=named, error=str(error))
                continue
            print(f"{named}: {told(found)}", flush=True)
            keep(what=what, name=named, dtype=str(case.dtype), **found)


if __name__ == "__main__":
    main()
