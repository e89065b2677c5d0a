"""Memory and time of a training step: torch, our layers, and our layers under `recompute_outputs`.

    python -m benchmarks.saving [--only resnet50] [--batch 4] [--out FILE]

Per model and way a fresh process counts two things. `saved`: the bytes of all storages in autograd's graph when the
forward pass is over, each once, less parameters. `resident`: how far the step raised the peak of the resident memory
above what the process had before it, gradients included. Then one process per model takes turns between the three
ways and takes the median time of a step. Loss and gradients of the three have to agree first.
"""

import argparse
import ctypes
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from benchmarks.models import Norm, TorchNorm, UNet, our_norm, resnet50
from benchmarks.processes import M_MMAP_THRESHOLD, alone, resident
from steadynorm import machine, recompute_outputs
from steadynorm.lab.store import Store
from steadynorm.layers import saving
from steadynorm.report import Document, Table, terminal

ROUNDS = 5
WAYS = ("torch", "ours", "recomputed")


MODELS: dict[str, tuple[Callable[[Norm], nn.Module], tuple[int, ...]]] = {
    "resnet50": (resnet50, (3, 224, 224)),
    "unet": (UNet, (1, 256, 256)),
}


def made(name: str, way: str) -> nn.Module:
    """The model in one of the three ways, with the same weights."""
    torch.manual_seed(0)
    model = MODELS[name][0](TorchNorm if way == "torch" else our_norm)
    return model


def context(way: str) -> AbstractContextManager[Any]:
    """What the forward pass runs in."""
    return recompute_outputs() if way == "recomputed" else nullcontext()


def step(model: nn.Module, x: Tensor, way: str) -> float:
    """Forward and backward; the loss."""
    for parameter in model.parameters():
        parameter.grad = None
    with context(way):
        loss = model(x).square().mean()
    loss.backward()
    return float(loss.detach())


def input_of(name: str, batch: int) -> Tensor:
    """Random images."""
    return torch.randn(batch, *MODELS[name][1], generator=torch.Generator().manual_seed(1))


def saved_bytes(model: nn.Module, x: Tensor, way: str) -> int:
    """Bytes that autograd holds at the end of the forward pass, each storage once, less parameters."""
    packed: list[Any] = []

    def pack(tensor: Tensor) -> Any:
        packed.append(saving._pack(tensor) if way == "recomputed" else tensor.detach())
        return packed[-1]

    def unpack(saved: Any) -> Tensor:
        return saving._unpack(saved) if way == "recomputed" else saved

    with saved_tensors_hooks(pack, unpack):
        loss = model(x).square().mean()
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    storages = {s._cdata: s.nbytes() for part in packed for s in storages_of(part)}
    del loss
    return sum(size for address, size in storages.items() if address not in own)


def storages_of(part: Any) -> Iterator[torch.UntypedStorage]:
    """The storages that something saved holds."""
    if isinstance(part, Tensor):
        yield part.untyped_storage()
    elif isinstance(part, saving._Saved):
        yield from storages_of(part.source if part.tensor is None else part.tensor)
    elif isinstance(part, saving._Source):
        for inner in part.parts:
            yield from storages_of(inner)


def memory(name: str, way: str, batch: int) -> dict[str, float]:
    """What one way saves, and by how much a step raises the peak of the resident memory."""
    # Blocks of 64 KiB go back to the system as soon as they are freed: what is resident is what is in use.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)
    model, x = made(name, way), input_of(name, batch)
    step(model, x[:1], way)  # compiles, and leaves what stays
    for parameter in model.parameters():
        parameter.grad = None
    saved = saved_bytes(model, x, way)
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    step(model, x, way)
    return {"saved": saved, "resident": resident("VmHWM") - before}


def times(name: str, batch: int) -> dict[str, float]:
    """Median seconds of a step for each way, taking turns, after seeing that they compute the same."""
    models, x = {way: made(name, way) for way in WAYS}, input_of(name, batch)
    models["recomputed"].load_state_dict(models["ours"].state_dict())
    losses = {way: step(model, x, way) for way, model in models.items()}
    gradients = {way: [p.grad for p in model.parameters()] for way, model in models.items()}
    if losses["ours"] != losses["recomputed"] or abs(losses["ours"] - losses["torch"]) > 1e-4 * losses["torch"]:
        raise AssertionError(f"the losses differ: {losses}")
    if not all(torch.equal(a, b) for a, b in zip(gradients["ours"], gradients["recomputed"], strict=True)):
        raise AssertionError("the gradients are not the same bits")
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(ROUNDS):
        for way, model in models.items():
            start = time.perf_counter()
            step(model, x, way)
            seconds[way].append(time.perf_counter() - start)
    return {way: statistics.median(values) for way, values in seconds.items()}


def main() -> None:
    """Read the command line, measure, write the rows, draw the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("all", *MODELS), default="all")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--threads", type=int, default=machine.core_count())
    parser.add_argument("--measure", choices=("memory", "times"), help=argparse.SUPPRESS)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/latest.jsonl"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.measure is not None:
        is_memory = options.measure == "memory"
        found = memory(options.only, options.way, options.batch) if is_memory else times(options.only, options.batch)
        print(json.dumps(found))
        return
    store, lines = Store(options.out), []
    for name in MODELS if options.only == "all" else (options.only,):
        common = ("--only", name, "--batch", str(options.batch), "--threads", str(options.threads), "--measure")
        seconds = alone("benchmarks.saving", *common, "times")
        for way in WAYS:
            found = {**alone("benchmarks.saving", *common, "memory", "--way", way), "seconds": seconds[way]}
            row = {"benchmark": "saving", "model": name, "batch": options.batch, "way": way, **found}
            store.append({**row, "machine": machine.describe()})
            megabytes = (f"{found[key] / 1e6:.0f}" for key in ("saved", "resident"))
            lines.append((f"{name}, batch {options.batch}", way, *megabytes, f"{seconds[way] / seconds['torch']:.2f}"))
    columns = ("model", "way", "saved, MB", "peak above before, MB", "time / torch")
    document = Document(
        title="A training step: memory and time",
        summary="Float32, plain memory order.",
        blocks=(Table("Ways", columns, tuple(lines)),),
        facts=machine.describe(),
    )
    terminal.show(document, Console(width=110))


if __name__ == "__main__":
    main()
