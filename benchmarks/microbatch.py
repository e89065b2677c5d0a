"""Memory and time of an optimizer step's gradients: the whole batch, plain accumulation, exact micro-batches.

    python -m benchmarks.microbatch [--only unet] [--batch 16] [--size 2] [--out FILE]

Per model and way a fresh process measures how far one step raises the peak of the resident memory above what the
process had before it, gradients included, on a second step, as the first one compiles. Then one process per model
takes turns between the ways and takes the least time of a step. The gradients of the exact ways have to agree with
those of the whole batch in float64 first; how far those of plain accumulation are off is in the table.
"""

import argparse
import ctypes
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from benchmarks.models import UNet, our_norm, resnet18
from benchmarks.processes import M_MMAP_THRESHOLD, alone, resident
from steadynorm import machine
from steadynorm.lab.store import Store
from steadynorm.report import Document, Table, terminal
from steadynorm.training import microbatch

ROUNDS = 2
EXACT = 1e-10
"""How far apart gradients in float64 may be that are the same but for rounding: 4e-12 was seen, on ResNet-18."""
WAYS = ("whole batch", "plain accumulation", "exact", "exact, offload", "exact, recompute")
MODELS: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...]]] = {
    "resnet18": (resnet18, (3, 128, 128)),
    "unet": (UNet, (1, 96, 96)),
}


def loss_of(y: Tensor, target: float = 0.5) -> Tensor:
    """A mean over samples that every output has a part in."""
    return (y - target).square().mean()


def step(model: nn.Module, x: Tensor, way: str, size: int) -> None:
    """Forward and backward of a whole batch."""
    for parameter in model.parameters():
        parameter.grad = None
    kind, _, memory = way.partition(", ")
    if kind == "whole batch":
        loss_of(model(x)).backward()
    elif kind == "plain accumulation":
        for part in x.split(size):
            (loss_of(model(part)) * (len(part) / len(x))).backward()
    else:
        exact: Any = microbatch(model, size, memory=memory or "keep")  # type: ignore[arg-type]
        exact.loss(lambda part: loss_of(model(part)), x).backward()


def input_of(name: str, batch: int) -> Tensor:
    """Random images, each with a brightness and contrast of its own, as photographs have."""
    generator = torch.Generator().manual_seed(1)
    shape = (batch, *MODELS[name][1])
    images = torch.randn(shape, generator=generator)
    return images * torch.rand(batch, 1, 1, 1, generator=generator) + torch.randn(batch, 1, 1, 1, generator=generator)


def memory(name: str, way: str, batch: int, size: int) -> dict[str, float]:
    """By how much a step raises the peak of the resident memory, in bytes."""
    # Blocks of 64 KiB go back to the system as soon as they are freed: what is resident is what is in use.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)
    model, x = MODELS[name][0](our_norm), input_of(name, batch)
    step(model, x[: 2 * size], way, size)  # compiles, and leaves what stays
    for parameter in model.parameters():
        parameter.grad = None
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    step(model, x, way, size)
    gradients = sum(p.nbytes for p in model.parameters())
    return {"peak": resident("VmHWM") - before, "gradients": gradients}


def times(name: str, batch: int, size: int) -> dict[str, dict[str, float]]:
    """Least seconds of a step for each way, taking turns, and how far its gradients are from the whole batch's."""
    apart = differences(name, 2 * size, size)
    model, x = MODELS[name][0](our_norm), input_of(name, batch)
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for measured in range(ROUNDS + 1):
        for way in WAYS:
            start = time.perf_counter()
            step(model, x, way, size)
            if measured:  # the first round compiles
                seconds[way].append(time.perf_counter() - start)
    return {way: {"seconds": min(seconds[way]), "apart": apart[way]} for way in WAYS}


def differences(name: str, batch: int, size: int) -> dict[str, float]:
    """How far the gradients of each way are from those of the whole batch, in float64, relative to their norm."""
    torch.manual_seed(0)
    model, x, gradients = MODELS[name][0](our_norm).double(), input_of(name, batch).double(), {}
    for way in WAYS:
        step(model, x, way, size)
        gradients[way] = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    whole = gradients["whole batch"]
    apart = {way: float((found - whole).norm() / whole.norm()) for way, found in gradients.items()}
    if any(apart[way] > EXACT for way in WAYS if way.startswith("exact")):
        raise AssertionError(f"the gradients differ: {apart}")
    return apart


def main() -> None:
    """Read the command line, measure, write the rows, draw the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("all", *MODELS), default="all")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=2)
    parser.add_argument("--threads", type=int, default=machine.core_count())
    parser.add_argument("--measure", choices=("memory", "times"), help=argparse.SUPPRESS)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/latest.jsonl"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sizes = options.batch, options.size
    if options.measure is not None:
        is_memory = options.measure == "memory"
        print(json.dumps(memory(options.only, options.way, *sizes) if is_memory else times(options.only, *sizes)))
        return
    store, lines = Store(options.out), []
    for name in MODELS if options.only == "all" else (options.only,):
        common = ["--only", name, "--threads", str(options.threads), "--measure"]
        common[2:2] = ["--batch", str(options.batch), "--size", str(options.size)]
        measured = alone("benchmarks.microbatch", *common, "times")
        whole = measured["whole batch"]["seconds"]
        for way in WAYS:
            found = {**alone("benchmarks.microbatch", *common, "memory", "--way", way), **measured[way]}
            row = {"benchmark": "microbatch", "model": name, "batch": options.batch, "size": options.size, "way": way}
            store.append({**row, **found, "machine": machine.describe()})
            peaks = (f"{found['peak'] / 1e6:.0f}", f"{(found['peak'] - found['gradients']) / 1e6:.0f}")
            lines.append((name, way, *peaks, f"{found['seconds'] / whole:.2f}", f"{found['apart']:.1e}"))
    columns = ("model", "way", "peak above before, MB", "less gradients, MB", "time / whole", "gradients off by")
    document = Document(
        title="The gradients of one batch: memory and time",
        summary=f"{options.batch} images in micro-batches of {options.size}, float32.",
        blocks=(Table("Ways", columns, tuple(lines)),),
        facts=machine.describe(),
    )
    terminal.show(document, Console(width=120))


if __name__ == "__main__":
    main()
