"""Latency and throughput of models before and after folding, where they are run: eager, onnxruntime, torch.compile.

    python -m benchmarks.latency [--compile] [--models resnet18 unet] [--batches 1 4 16 64] [--out FILE]

All rivals of a model and a batch size take turns in one process, each checked against the model before it is timed;
how much faster is the median of the ratios within a round.
torch.compile builds kernels for every batch size, which takes minutes on a CPU: it is an option.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

from benchmarks.interleaved import geometric_mean
from benchmarks.models import TorchNorm, UNet, resnet18
from steadynorm import deploy, machine
from steadynorm.lab.store import Store
from steadynorm.report import Document, Table, terminal

# Small enough for two cores at batch size 64, and built of what folds: 20 norms and 18.
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int]]] = {
    "resnet18": (lambda: resnet18(TorchNorm, width=32), (3, 64, 64)),
    "unet": (lambda: UNet(TorchNorm, width=8), (1, 64, 64)),
}
BATCHES = (1, 4, 16, 64)
SECONDS_PER_RIVAL, LEAST_ROUNDS, MOST_ROUNDS = 1.0, 7, 100
ALIKE = 1e-4
"""Largest relative difference from the model that is timed; folding moves these by some 1e-6."""

Forward = Callable[[Tensor], Tensor]


def rivals(model: nn.Module, folded: nn.Module, images: Tensor, is_compiled: bool) -> dict[str, Forward]:
    """What is timed, by engine and state: "eager before", "eager after", ..."""
    found: dict[str, Forward] = {}
    states = {"before": model, "after": folded}
    for state, one in states.items():
        found[f"eager {state}"] = one
    for state, one in states.items():
        with tempfile.TemporaryDirectory() as folder:
            made = deploy.export(one, [images], Path(folder) / "model.onnx", batch_sizes=(1, 2), reference=model)
            found[f"onnxruntime {state}"] = _first(deploy.load(made.path))
    for state, one in states.items() if is_compiled else ():
        found[f"torch.compile {state}"] = torch.compile(one, dynamic=False)
    return found


def _first(artefact: nn.Module) -> Forward:
    return lambda x: next(iter(artefact(x).values()))


def measure(found: dict[str, Forward], x: Tensor) -> dict[str, list[float]]:
    """Seconds of a forward pass in every round, by rival."""
    with torch.inference_mode():
        expected = found["eager before"](x)
        for name, forward in found.items():
            error = ((forward(x) - expected).abs().max() / expected.abs().max()).item()
            if not error <= ALIKE:
                raise AssertionError(f"{name} is wrong by {error:.1e}: not timed")
        once = sum(_timed(forward, x) for forward in found.values()) / len(found)
        rounds = max(LEAST_ROUNDS, min(MOST_ROUNDS, round(SECONDS_PER_RIVAL / once)))
        timed: dict[str, list[float]] = {name: [] for name in found}
        for _ in range(rounds):
            for name, forward in found.items():
                timed[name].append(_timed(forward, x))
    return timed


def _timed(forward: Forward, x: Tensor) -> float:
    forward(x)  # its weights and buffers are in the caches then, whoever ran before
    start = time.perf_counter()
    forward(x)
    return time.perf_counter() - start


def with_statistics(model: nn.Module) -> nn.Module:
    """`model` in evaluation, with statistics and weights that are neither 0 nor 1."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    return model.eval()


def main() -> None:
    """Measure, write the rows, draw the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", action="store_true", help="torch.compile too")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS])
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--threads", type=int, default=machine.core_count())
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/latency.jsonl"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    store, lines, gains = Store(options.out), [], dict[str, list[float]]()
    for name in options.models:
        torch.manual_seed(0)
        build, shape = MODELS[name]
        model = with_statistics(build())
        images = torch.randn(8, *shape)
        change = deploy.fold(model, [images])
        found = rivals(model, change.model, images, options.compile)
        for batch in options.batches:
            seconds = measure(found, torch.randn(batch, *shape))
            for engine in dict.fromkeys(rival.rpartition(" ")[0] for rival in found):
                rounds = [*zip(seconds[f"{engine} before"], seconds[f"{engine} after"], strict=True)]
                before, after = (statistics.median(values) for values in zip(*rounds, strict=True))
                # Of the two that stood side by side: what else the machine did, it did to both.
                gain = statistics.median(one / other for one, other in rounds)
                gains.setdefault(engine, []).append(gain)
                named = {"benchmark": "latency", "model": name, "folded": len(change.log)}
                found_here = {"before": before, "after": after, "gain": gain, "rounds": len(rounds)}
                row = {**named, "engine": engine, "batch": batch, **found_here}
                store.append({**row, "machine": machine.describe()})
                cells = (f"{before * 1e3:.2f}", f"{after * 1e3:.2f}", f"{batch / after:.0f}", f"{gain:.2f}")
                lines.append((f"{name} ({len(change.log)})", engine, batch, *cells))
    columns = ("model (norms folded)", "engine", "batch", "ms before", "ms after", "images/s after", "times as fast")
    means = ", ".join(f"{engine} {geometric_mean(ratios):.2f}" for engine, ratios in gains.items())
    table = Table("A forward pass, before and after folding", columns, tuple(lines))
    summary = f"Times as fast after folding, geometric mean: {means}."
    document = Document(title="Latency", summary=summary, blocks=(table,), facts=machine.describe())
    terminal.show(document, Console(width=110))


if __name__ == "__main__":
    main()
