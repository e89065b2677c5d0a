"""Small tensors on the CPU, where Python is what a normalization waits for: our layers and torch's, interleaved.

    python -m benchmarks.small [--out FILE]

A layer with its ReLU (ours: in the layer; torch's: `F.relu`) in a training step, in evaluation, and frozen in a
training step; and the training step and the evaluation of a small network over a table, whose norms are what differs.
The ratio is the median of those within a round. One thread: more do not help tensors of this size.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.interleaved import check
from steadynorm import BatchNorm1d, BatchNorm2d, convert_, machine
from steadynorm.lab.store import Store
from steadynorm.report import Document, Table, terminal

SHAPES = ((32, 64), (256, 128), (1024, 64), (8, 32, 8, 8), (32, 64, 8, 8))
TABLES = ((32, 64), (256, 64))
"""Rows of a batch and width of the network."""
ROUNDS, CALLS = 60, 20

Pass = Callable[[], list[Tensor]]


class Torch(nn.Module):
    """What model code does."""

    def __init__(self, channels: int, rank: int) -> None:
        super().__init__()
        self.norm = {2: nn.BatchNorm1d, 4: nn.BatchNorm2d}[rank](channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(x))


def pair(shape: tuple[int, ...]) -> tuple[nn.Module, nn.Module]:
    """Ours and torch's, with the same weights and statistics."""
    theirs = Torch(shape[1], len(shape))
    nn.init.uniform_(theirs.norm.weight, 0.5, 1.5)
    nn.init.normal_(theirs.norm.bias)
    theirs(torch.randn(shape))
    ours = {2: BatchNorm1d, 4: BatchNorm2d}[len(shape)](shape[1], activation="relu")
    ours.load_state_dict(theirs.norm.state_dict())
    return ours, theirs


def networks(width: int) -> tuple[nn.Module, nn.Module]:
    """Three hidden layers over a table."""
    layers: list[nn.Module] = []
    for inputs in (16, width, width):
        layers += [nn.Linear(inputs, width, bias=False), nn.BatchNorm1d(width), nn.ReLU()]
    theirs = nn.Sequential(*layers, nn.Linear(width, 1))
    ours = copy.deepcopy(theirs)
    convert_(ours, "steadynorm")
    return ours, theirs


def training(model: nn.Module, x: Tensor, dy: Tensor) -> Pass:
    """A forward and a backward pass; what they give is y and every gradient."""
    model.train()
    leaves = [t for t in (x, *model.parameters()) if t.requires_grad]

    def run() -> list[Tensor]:
        y = model(x)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    return run


def evaluation(model: nn.Module, x: Tensor) -> Pass:
    """A forward pass in evaluation, without gradients."""
    model.eval()

    def run() -> list[Tensor]:
        with torch.no_grad():
            return [model(x)]

    return run


def cases() -> Iterator[tuple[str, tuple[int, ...], str, Callable[[torch.dtype], tuple[Pass, Pass]]]]:
    """What is timed, its shape, how it runs; and in a precision, ours and torch's."""
    for shape in SHAPES:
        for mode in ("training", "evaluation", "frozen"):
            yield "layer", shape, mode, lambda dtype, shape=shape, mode=mode: _layers(shape, mode, dtype)
    for rows, width in TABLES:
        for mode in ("training", "evaluation"):
            shape = (rows, width)
            yield "network", shape, mode, lambda dtype, shape=shape, mode=mode: _networks(shape, mode, dtype)


def _layers(shape: tuple[int, ...], mode: str, dtype: torch.dtype) -> tuple[Pass, Pass]:
    torch.manual_seed(0)
    models, x, dy = pair(shape), torch.randn(shape), torch.randn(shape)
    found = []
    for model in models:
        model.to(dtype)
        if mode == "evaluation":
            found.append(evaluation(model, x.to(dtype)))
            continue
        run = training(model, x.to(dtype).requires_grad_(), dy.to(dtype))
        if mode == "frozen":
            model.freeze_(affine=False) if isinstance(model, BatchNorm1d | BatchNorm2d) else model.eval()
        found.append(run)
    return found[0], found[1]


def _networks(shape: tuple[int, int], mode: str, dtype: torch.dtype) -> tuple[Pass, Pass]:
    torch.manual_seed(0)
    rows, width = shape
    x, dy = torch.randn(rows, 16).to(dtype), torch.randn(rows, 1).to(dtype)
    found = [
        training(model.to(dtype), x, dy) if mode == "training" else evaluation(model.to(dtype), x)
        for model in networks(width)
    ]
    return found[0], found[1]


def measure(ours: Pass, theirs: Pass) -> tuple[float, float, float]:
    """Median seconds of ours and torch's, and the median of how many times as fast ours is."""
    rounds = [(_timed(ours), _timed(theirs)) for _ in range(ROUNDS)]
    own, other = (statistics.median(values) for values in zip(*rounds, strict=True))
    return own, other, statistics.median(b / a for a, b in rounds)


def _timed(run: Pass) -> float:
    run()
    start = time.perf_counter()
    for _ in range(CALLS):
        run()
    return (time.perf_counter() - start) / CALLS


def main() -> None:
    """Measure, write the rows, draw the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/small.jsonl"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    store, lines = Store(options.out), []
    for what, shape, mode, made in cases():
        (_, exact), rivals = made(torch.float64), made(torch.float32)
        errors = check(rivals[0](), rivals[1](), exact())
        own, other, ratio = measure(*rivals)
        found = {"ours": own, "torch": other, "ratio": ratio, "error": errors[0], "torch_error": errors[1]}
        row = {"benchmark": "small", "what": what, "shape": "x".join(map(str, shape)), "mode": mode, **found}
        store.append({**row, "machine": machine.describe()})
        times = (f"{own * 1e6:.0f}", f"{other * 1e6:.0f}", f"{ratio:.2f}")
        lines.append((what, row["shape"], mode, *times, f"{errors[0]:.0e} {errors[1]:.0e}"))
    columns = ("what", "shape", "mode", "µs ours", "torch", "times as fast", "errors")
    table = Table("Small tensors, ours and torch's", columns, tuple(lines))
    document = Document(title="Small tensors", summary="", blocks=(table,), facts=machine.describe())
    terminal.show(document, Console(width=110))


if __name__ == "__main__":
    main()
