"""The layers on a CUDA device: against torch eager, torch.compile and a copy of the bytes, interleaved in one process.

    python -m benchmarks.gpu [launch step batch sample tune] [--no-compile] [--seconds 480] [--out FILE]
    TRITON_INTERPRET=1 python -m benchmarks.gpu --rehearse

    launch    one step of a tensor so small that the host is all there is
    step      a whole training step of ResNet-50, and what share of it is normalization
    batch     BatchNorm + ReLU, with and without a residual, ResNet-50 at batch 256, forward and backward
    sample    LayerNorm and RMSNorm over rows of 1,024 to 16,384, with and without a sum before; GroupNorm
    tune      other launch configurations than the one that is picked (benchmarks/gpu_tune.py)

Every time is between two events on the device, behind work that keeps it busy until the host is done and clears its
cache. `bandwidth` is that of the passes that must be made over one tensor, as a share of a large copy's. Numbers are
checked first: a wrong kernel is not timed. After `--seconds` no new case is begun. `--rehearse` runs all of it on small
CPU tensors, in Triton's interpreter, and writes nothing.
"""

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import steadynorm
from benchmarks import gpu_tune
from benchmarks.gpu_cases import MOST, Case, Inputs, Place, batch_cases, sample_cases
from benchmarks.interleaved import check_each, take_turns
from benchmarks.models import TorchNorm, our_norm, resnet18, resnet50
from steadynorm import machine
from steadynorm.kernels import triton_gpu
from steadynorm.lab.store import Store

WHAT = ("launch", "step", "batch", "sample", "tune")
SMALL, REHEARSED_SMALL = (32, 64, 8, 8), (2, 4, 3, 3)
LAUNCHES, ROUNDS = 300, 7
IMAGES, STEPS = 128, 10
OUR_KERNELS = frozenset(
    ("moments", "merge_moments", "normalize", "forward", "sums", "merge_sums", "input_gradient", "backward", "ema")
)
NORM_KERNELS = ("norm", "bn_fw", "bn_bw")
POINTWISE = ("elementwise", "relu", "add")


def measure(case: Case, place: Place, with_compile: bool, speed: float) -> dict[str, float]:
    """Median seconds of every rival, the errors, and the bandwidth of ours as a share of a copy's."""
    inputs, rivals = Inputs(case, place), dict(case.rivals)
    exact = inputs.results(rivals["eager"], torch.float64)
    ours, eager = (inputs.results(rivals[name]) for name in ("ours", "eager"))
    error, torch_error = check_each(ours, eager, exact, MOST[case.dtype])
    del ours, eager, exact
    if with_compile:
        torch._dynamo.reset()
        rivals["compile"] = torch.compile(rivals["eager"], dynamic=False)
    found = take_turns(rivals, inputs.step, inputs.copy, place.least_rounds)
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


def launch(place: Place) -> dict[str, float]:
    """Seconds of a training step through a small layer, host included, of ours and torch's, in turns."""
    shape = REHEARSED_SMALL if place.is_rehearsed else SMALL
    layers: dict[str, nn.Module] = {"ours": steadynorm.BatchNorm2d(shape[1]), "eager": nn.BatchNorm2d(shape[1])}
    x, dy = torch.randn(shape, device=place.device, requires_grad=True), torch.randn(shape, device=place.device)
    best: dict[str, float] = {}
    launches, rounds = (1, 1) if place.is_rehearsed else (LAUNCHES, ROUNDS)
    for _ in range(rounds):
        for name, layer in layers.items():
            layer.to(place.device)
            for way in ("forward", "both"):
                place.wait()
                start = time.perf_counter()
                for _ in range(launches):
                    y = layer(x)
                    if way == "both":
                        y.backward(dy)
                place.wait()
                seconds = (time.perf_counter() - start) / launches
                best[f"{name}_{way}"] = min(best.get(f"{name}_{way}", seconds), seconds)
    return best


def training_step(place: Place) -> dict[str, float]:
    """Seconds of a step of ResNet-50 (autocast, channels-last), of both, and the share of normalization in it."""
    images, size, count = (2, 32, 3) if place.is_rehearsed else (IMAGES, 224, STEPS)
    x = torch.randn(images, 3, size, size, device=place.device).to(memory_format=torch.channels_last)
    target = torch.randint(1000, (images,), device=place.device)
    steps: dict[str, Callable[[], None]] = {}
    for name, norm in (("ours", our_norm), ("eager", TorchNorm)):
        model = resnet18(norm, width=2) if place.is_rehearsed else resnet50(norm)
        model.to(place.device, memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        steps[name] = _stepper(model, optimizer, x, target)
    for step in steps.values():
        for _ in range(3):
            step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(count):
        for name, step in steps.items():
            seconds[name] += place.seconds(step)
    found = {f"{name}_step": sorted(times)[count // 2] for name, times in seconds.items()}
    for name, step in steps.items():
        found |= {f"{name}_{what}": share for what, share in _shares(step, place).items()}
    return found


def _stepper(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, target: Tensor) -> Callable[[], None]:
    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(x.device.type, torch.bfloat16):
            loss = F.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()

    return step


def _shares(step: Callable[[], None], place: Place) -> dict[str, float]:
    """Shares of the time on the device: kernels of normalization, and pointwise ones, which ours fuse into them."""
    activities = torch.profiler.ProfilerActivity
    kind = activities.CPU if place.is_rehearsed else activities.CUDA
    with torch.profiler.profile(activities=[kind]) as profile:
        step()
        place.wait()
    what = "self_cpu_time_total" if place.is_rehearsed else "self_device_time_total"
    times = {event.key: float(getattr(event, what)) for event in profile.key_averages()}
    whole = sum(times.values())
    norm = {key for key in times if key in OUR_KERNELS or any(part in key for part in NORM_KERNELS)}
    pointwise = {key for key in times if any(part in key for part in POINTWISE)} - norm
    return {
        "normalization": sum(times[key] for key in norm) / whole,
        "pointwise": sum(times[key] for key in pointwise) / whole,
    }


def main() -> None:
    """Measure what is named, or all but other configurations, and append the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=WHAT[:-1])
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--seconds", type=float, default=480)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu.jsonl"))
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    if unknown := set(options.what) - set(WHAT):
        parser.error(f"got {', '.join(sorted(unknown))}, expected some of {', '.join(WHAT)}")
    if options.rehearse:
        if not triton_gpu.is_interpreted():
            sys.exit("--rehearse needs Triton's interpreter: set TRITON_INTERPRET=1")
    elif not torch.cuda.is_available():
        sys.exit("there is no CUDA device here: --rehearse runs without one")
    with steadynorm.backend("triton") if options.rehearse else nullcontext():
        _run(options)


def _run(options: argparse.Namespace) -> None:
    start, place = time.perf_counter(), Place(is_rehearsed=options.rehearse)
    store, speed = None if options.rehearse else Store(options.out), place.copy_speed()
    print(f"{place.name}: a copy moves {speed / 1e12:.2f} TB/s", flush=True)

    def keep(**row: Any) -> None:
        if store is not None:
            store.append({"benchmark": "gpu", "copy": speed, **row, "machine": machine.describe()})

    def is_late() -> bool:
        return time.perf_counter() - start > options.seconds

    for what in options.what:
        if what in ("launch", "step"):
            try:
                found = launch(place) if what == "launch" else training_step(place)
            except Exception as error:
                print(f"{what}: {type(error).__name__}: {error}", flush=True)
                keep(what=what, error=str(error))
                continue
            print(what, ", ".join(f"{name} {value:.4g}" for name, value in found.items()), flush=True)
            keep(what=what, **found)
        elif what == "tune":
            for name, row in gpu_tune.rows(place, is_late):
                print(f"{name}: {gpu_tune.told(row)}", flush=True)
                keep(what=what, name=name, **row)
        else:
            cases = batch_cases if what == "batch" else sample_cases
            for case in cases(is_rehearsed=options.rehearse):
                if is_late():
                    break
                try:
                    found = measure(case, place, options.compile, speed)
                except Exception as error:  # what Triton raises has no base of its own, and the other cases go on
                    print(f"{case}: {type(error).__name__}: {error}", flush=True)
                    keep(what=what, name=str(case), error=str(error))
                    continue
                print(f"{case}: {told(found)}", flush=True)
                keep(what=what, name=str(case), **found)
    if is_late():
        print("time is up", flush=True)


if __name__ == "__main__":
    main()
