"""Batch normalization, activation and residual: ours, torch eager, torch.compile, and the floor, interleaved.

    python -m benchmarks.batch_norm [--only resnet] [--layout nchw] [--memory kept] [--no-compile] [--out FILE]

Every time is a ratio within one process: the rivals take turns, round after round, and a row holds the medians. The
floor is a copy of the bytes that must move. Forward that is x and y (x twice where channels are last, since the whole
tensor must be seen before any of it can be written), and the residual; backward x, dy, dx, and with a residual the
output and the residual's gradient.

`--memory kept` calls `steadynorm.keep_freed_memory()` first; `default` is the process as it comes; `both` runs one
process for each.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

from benchmarks.interleaved import check, row_of, summary, take_turns
from steadynorm import functional, keep_freed_memory, machine
from steadynorm.lab.store import Store
from steadynorm.report import Document, Paragraph, Table, terminal

RESNET50 = ((64, 112), (256, 56), (512, 28), (1024, 14), (2048, 7))


@dataclass(frozen=True)
class Case:
    """One shape in one layout, with or without a residual; the activation is ReLU."""

    family: str
    shape: tuple[int, ...]
    layout: str
    residual: bool

    def tensor(self) -> Tensor:
        x = torch.randn(self.shape)
        return x.movedim(1, -1).contiguous().movedim(-1, 1) if self.layout == "nhwc" else x

    @property
    def forward_passes(self) -> int:
        return (3 if self.layout == "nhwc" else 2) + self.residual

    @property
    def backward_passes(self) -> int:
        return (5 if self.layout == "nhwc" else 3) + 2 * self.residual


def cases(only: str, layout: str) -> Iterator[Case]:
    shapes = [("resnet", (n, c, s, s)) for n in (8, 32) for c, s in RESNET50]
    shapes += [("unet", (2, 64, 256, 256)), ("unet", (2, 512, 32, 32)), ("unet", (16, 128, 64, 64))]
    shapes += [("mlp", (32, 256)), ("mlp", (1024, 1024)), ("mlp", (8192, 256)), ("mlp", (65536, 128))]
    for family, shape in shapes:
        for name in ("nchw", "nhwc"):
            for residual in (False, True):
                is_wanted = only in ("all", family) and layout in ("all", name)
                if is_wanted and not (family == "mlp" and name == "nhwc"):
                    yield Case(family, shape, name if family != "mlp" else "rows", residual)


Rival = Callable[..., Tensor]


def ours(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
    """One fused call."""
    return functional.batch_norm(x, mean, var, weight, bias, True, residual=residual, activation="relu")


def eager(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
    """What model code does: normalise, add, an activation in place."""
    y = F.batch_norm(x, mean, var, weight, bias, True)
    return F.relu(y if residual is None else y + residual, inplace=True)


class Inputs:
    """The tensors of a case, and how a rival is timed on them."""

    def __init__(self, case: Case) -> None:
        channels = case.shape[1]
        self.x = case.tensor().requires_grad_()
        self.residual = case.tensor().requires_grad_() if case.residual else None
        self.dy = case.tensor()
        self.weight = torch.rand(channels).add_(0.5).requires_grad_()
        self.bias = torch.randn(channels, requires_grad=True)
        self.running = (torch.zeros(channels), torch.ones(channels))
        self.leaves = [t for t in (self.x, self.weight, self.bias, self.residual) if t is not None]
        self.copied = torch.empty_like(self.dy)

    def step(self, rival: Rival) -> tuple[float, float]:
        """Seconds of a forward pass, and of the backward pass after it."""
        start = time.perf_counter()
        y = rival(self.x, *self.running, self.weight, self.bias, self.residual)
        middle = time.perf_counter()
        torch.autograd.grad(y, self.leaves, self.dy)
        return middle - start, time.perf_counter() - middle

    def copy(self) -> float:
        """Seconds of a copy of one tensor: two passes."""
        start = time.perf_counter()
        self.copied.copy_(self.dy)
        return time.perf_counter() - start

    def results(self, rival: Rival, dtype: torch.dtype) -> list[Tensor]:
        """Output and gradients, in another precision."""
        leaves = {id(t): t.detach().to(dtype).requires_grad_() for t in self.leaves}
        x, weight, bias = (leaves[id(t)] for t in (self.x, self.weight, self.bias))
        residual = None if self.residual is None else leaves[id(self.residual)]
        running = [t.to(dtype, copy=True) for t in self.running]
        y = rival(x, *running, weight, bias, residual)
        return [y.detach(), *torch.autograd.grad(y, list(leaves.values()), self.dy.to(dtype))]


def measure(case: Case, with_compile: bool) -> dict[str, float]:
    """Median seconds of every rival, and the errors."""
    torch.manual_seed(0)
    inputs = Inputs(case)
    found = [inputs.results(rival, torch.float32) for rival in (ours, eager)]
    error, torch_error = check(*found, inputs.results(eager, torch.float64))
    rivals: dict[str, Rival] = {"ours": ours, "eager": eager}
    if with_compile:
        torch._dynamo.reset()
        rivals["compile"] = torch.compile(eager, dynamic=False)
    return take_turns(rivals, inputs.step, inputs.copy) | {"error": error, "torch_error": torch_error}


def run(options: argparse.Namespace) -> None:
    """Measure in this process, write the rows, draw the table."""
    if options.memory == "kept":
        keep_freed_memory()
    torch.set_num_threads(options.threads)
    store = Store(options.out)
    results = []
    for case in cases(options.only, options.layout):
        found = measure(case, options.compile)
        results.append((case, found))
        named = {"family": case.family, "shape": list(case.shape), "layout": case.layout, "residual": case.residual}
        store.append(
            {"benchmark": "batch_norm", "memory": options.memory, **named, **found, "machine": machine.describe()}
        )
        print(*row_of(case, found), sep="  ", file=sys.stderr, flush=True)
    columns = ("shape", "layout", "MB", "ours/floor", "eager/ours", "compile/ours")
    lines = [line for name in ("eager", "compile")[: 1 + options.compile] for line in summary(results, name)]
    document = Document(
        title=f"Batch norm + ReLU, training, float32, memory: {options.memory}",
        summary="Ratios: forward, backward, both. Above 1 in the last two columns, ours is faster.",
        blocks=(
            Table("Ratios", columns, tuple(tuple(row_of(*result)) for result in results)),
            *map(Paragraph, lines),
        ),
        facts=machine.describe(),
    )
    terminal.show(document, Console(width=110))


def main() -> None:
    """Read the command line; with `--memory both`, run one process for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("all", "resnet", "unet", "mlp"), default="all")
    parser.add_argument("--layout", choices=("all", "nchw", "nhwc"), default="all")
    parser.add_argument("--memory", choices=("both", "default", "kept"), default="both")
    parser.add_argument("--threads", type=int, default=machine.core_count())
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/latest.jsonl"))
    options = parser.parse_args()
    if options.memory != "both":
        run(options)
        return
    for memory in ("kept", "default"):
        subprocess.run([sys.executable, "-m", "benchmarks.batch_norm", *sys.argv[1:], "--memory", memory], check=True)


if __name__ == "__main__":
    main()
