"""Ghost batch normalization against batch normalization of the whole batch, both with ReLU, interleaved.

    python -m benchmarks.ghost [--out FILE]

What slices cost: each is a batch of its own, with statistics and coefficients of its own for every channel.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

import steadynorm
from benchmarks.interleaved import ratio, take_turns
from steadynorm import keep_freed_memory, machine
from steadynorm.lab.store import Store
from steadynorm.report import Document, Table, terminal

SHAPES = (
    ((32, 64, 112, 112), 8),
    ((32, 256, 56, 56), 8),
    ((32, 512, 28, 28), 8),
    ((32, 1024, 14, 14), 8),
    ((64, 256, 14, 14), 16),
    ((8192, 256), 128),
    ((1024, 1024), 32),
)


@dataclass(frozen=True)
class Case:
    """A batch, how it lies in memory, and the samples of a slice."""

    shape: tuple[int, ...]
    layout: str
    ghost_size: int

    def tensor(self) -> Tensor:
        x = torch.randn(self.shape)
        return x.movedim(1, -1).contiguous().movedim(-1, 1) if self.layout == "nhwc" else x


def measure(case: Case) -> dict[str, float]:
    """Median seconds of the ghost ("ours"), of batch norm ("batch"), and of a copy of one tensor."""
    torch.manual_seed(0)
    x, dy = case.tensor().requires_grad_(), case.tensor()
    copied, channels = torch.empty_like(dy), case.shape[1]
    is_image = len(case.shape) == 4
    ghost = steadynorm.GhostBatchNorm2d if is_image else steadynorm.GhostBatchNorm1d
    batch = steadynorm.BatchNorm2d if is_image else steadynorm.BatchNorm1d
    rivals: dict[str, nn.Module] = {
        "ours": ghost(channels, ghost_size=case.ghost_size, activation="relu"),
        "batch": batch(channels, activation="relu"),
    }
    check(rivals["ours"], x, case.ghost_size)

    def step(layer: nn.Module) -> tuple[float, float]:
        start = time.perf_counter()
        y = layer(x)
        middle = time.perf_counter()
        torch.autograd.grad(y, [x, *layer.parameters()], dy)
        return middle - start, time.perf_counter() - middle

    def copy() -> float:
        start = time.perf_counter()
        copied.copy_(dy)
        return time.perf_counter() - start

    return take_turns(rivals, step, copy)


def check(layer: nn.Module, x: Tensor, ghost_size: int) -> None:
    """A layer that does not normalise slice by slice is not timed."""
    with torch.no_grad():
        parts = [nn.functional.batch_norm(part.double(), None, None, training=True) for part in x.split(ghost_size)]
        error = (layer(x) - torch.cat(parts).relu()).abs().max().item()
    if error > 1e-5:
        raise AssertionError(f"wrong by {error:.1e}: not timed")


def main() -> None:
    """Measure, write the rows, draw the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=machine.core_count())
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/latest.jsonl"))
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    store, rows = Store(options.out), []
    for shape, ghost_size in SHAPES:
        for layout in ("nchw", "nhwc") if len(shape) == 4 else ("rows",):
            found = measure(Case(shape, layout, ghost_size))
            named = {"shape": list(shape), "layout": layout, "ghost_size": ghost_size}
            store.append({"benchmark": "ghost", "memory": "kept", **named, **found, "machine": machine.describe()})
            ways = [f"{found[f'ours_{way}'] / found[f'batch_{way}']:.2f}" for way in ("forward", "backward")]
            rows.append(("x".join(map(str, shape)), layout, ghost_size, *ways, f"{1 / ratio(found, 'batch'):.2f}"))
    table = Table(
        "Time over that of batch norm", ("shape", "layout", "slice", "forward", "backward", "both"), tuple(rows)
    )
    title = "Ghost batch norm + ReLU, training, float32, memory: kept"
    summary = "1 is as fast as batch normalization of the whole batch."
    terminal.show(Document(title=title, summary=summary, blocks=(table,), facts=machine.describe()), Console(width=110))


if __name__ == "__main__":
    main()
