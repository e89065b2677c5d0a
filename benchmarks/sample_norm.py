"""Normalization within a sample: ours, torch eager, torch.compile if asked for, and the floor, interleaved.

    python -m benchmarks.sample_norm [--only rms] [--memory kept] [--compile] [--addend] [--out FILE]

LayerNorm, RMSNorm, GroupNorm, InstanceNorm, and LayerNorm over the channels of an image, each with weight and bias as
torch has them. Rows, rivals and the floor are as in `benchmarks.batch_norm`: the floor is a copy of the bytes that
must move, forward x and y, backward x, dy and dx; with an addend (`--addend`, the pre-norm block of transformers: the
sum is returned too and takes a gradient) forward the addend and the sum, backward the gradient of the sum.
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
from steadynorm.functional.layer import normalize_positions
from steadynorm.lab.store import Store
from steadynorm.report import Document, Paragraph, Table, terminal

ROWS = ((32, 256), (1024, 768), (8192, 768), (2048, 4096), (65536, 128), (512, 16384))
GROUPED = ((8, 256, 56, 56), (2, 512, 32, 32), (16, 128, 64, 64))
INSTANCES = ((8, 64, 112, 112), (2, 32, 256, 256))
CHANNELS = ((8, 192, 56, 56),)
GROUPS = 32
EPS = 1e-5

Norm = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Case:
    """One shape in one layout; `residual` says whether an addend enters before the statistics."""

    family: str
    shape: tuple[int, ...]
    layout: str
    residual: bool = False

    def tensor(self) -> Tensor:
        x = torch.randn(self.shape)
        return x.movedim(1, -1).contiguous().movedim(-1, 1) if self.layout == "nhwc" else x

    @property
    def forward_passes(self) -> int:
        return 4 if self.residual else 2

    @property
    def backward_passes(self) -> int:
        return 4 if self.residual else 3


def cases(only: str, addend: bool) -> Iterator[Case]:
    for family in ("layer", "rms"):
        yield from (Case(family, shape, "rows", addend) for shape in ROWS if only in ("all", family))
    for family, shapes in (("group", GROUPED), ("instance", INSTANCES), ("channels", CHANNELS)):
        for shape in shapes if only in ("all", family) and not addend else ():
            for layout in ("nchw",) if family == "instance" else ("nchw", "nhwc"):
                yield Case(family, shape, layout)


def _positions_eager(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.layer_norm(x.movedim(1, -1), x.shape[1:2], weight, bias, EPS).movedim(-1, 1)


OURS: dict[str, Norm] = {
    "layer": lambda x, w, b: functional.layer_norm(x, x.shape[1:], w, b, EPS),
    "rms": lambda x, w, b: functional.rms_norm(x, x.shape[1:], w, EPS),
    "group": lambda x, w, b: functional.group_norm(x, GROUPS, w, b, EPS),
    "instance": lambda x, w, b: functional.instance_norm(x, weight=w, bias=b, eps=EPS),
    "channels": lambda x, w, b: normalize_positions(x, w, b, eps=EPS),
}
EAGER: dict[str, Norm] = {
    "layer": lambda x, w, b: F.layer_norm(x, x.shape[1:], w, b, EPS),
    "rms": lambda x, w, b: F.rms_norm(x, x.shape[1:], w, EPS),
    "group": lambda x, w, b: F.group_norm(x, GROUPS, w, b, EPS),
    "instance": lambda x, w, b: F.instance_norm(x, weight=w, bias=b, eps=EPS),
    "channels": _positions_eager,
}

Rival = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], tuple[Tensor, ...]]


def ours(case: Case) -> Rival:
    """One call; with an addend it gives the sum as well."""
    norm = OURS[case.family]
    added = {"layer": functional.layer_norm, "rms": functional.rms_norm}.get(case.family)

    def run(x: Tensor, weight: Tensor, bias: Tensor | None, addend: Tensor | None) -> tuple[Tensor, ...]:
        if addend is None:
            return (norm(x, weight, bias),)
        own = (weight, bias) if case.family == "layer" else (weight,)
        return added(x, x.shape[1:], *own, eps=EPS, addend=addend)

    return run


def eager(case: Case) -> Rival:
    """What model code does: add, then normalise."""
    norm = EAGER[case.family]

    def run(x: Tensor, weight: Tensor, bias: Tensor | None, addend: Tensor | None) -> tuple[Tensor, ...]:
        if addend is None:
            return (norm(x, weight, bias),)
        total = x + addend
        return norm(total, weight, bias), total

    return run


class Inputs:
    """The tensors of a case, and how a rival is timed on them."""

    def __init__(self, case: Case) -> None:
        width = case.shape[1]
        self.x = case.tensor().requires_grad_()
        self.addend = case.tensor().requires_grad_() if case.residual else None
        self.weight = torch.rand(width).add_(0.5).requires_grad_()
        self.bias = None if case.family == "rms" else torch.randn(width, requires_grad=True)
        self.cotangents = [case.tensor() for _ in range(1 + case.residual)]
        self.leaves = [t for t in (self.x, self.weight, self.bias, self.addend) if t is not None]
        self.copied = torch.empty_like(self.x)

    def step(self, rival: Rival) -> tuple[float, float]:
        """Seconds of a forward pass, and of the backward pass after it."""
        start = time.perf_counter()
        found = rival(self.x, self.weight, self.bias, self.addend)
        middle = time.perf_counter()
        torch.autograd.grad(found, self.leaves, self.cotangents)
        return middle - start, time.perf_counter() - middle

    def copy(self) -> float:
        """Seconds of a copy of one tensor: two passes."""
        start = time.perf_counter()
        self.copied.copy_(self.cotangents[0])
        return time.perf_counter() - start

    def results(self, rival: Rival, dtype: torch.dtype) -> list[Tensor]:
        """Outputs and gradients, in another precision."""
        leaves = {id(t): t.detach().to(dtype).requires_grad_() for t in self.leaves}
        own = [None if t is None else leaves[id(t)] for t in (self.x, self.weight, self.bias, self.addend)]
        found = rival(*own)
        gradients = torch.autograd.grad(found, list(leaves.values()), [t.to(dtype) for t in self.cotangents])
        return [*(t.detach() for t in found), *gradients]


def measure(case: Case, with_compile: bool) -> dict[str, float]:
    """Median seconds of every rival, and the errors."""
    torch.manual_seed(0)
    inputs = Inputs(case)
    found = [inputs.results(rival, torch.float32) for rival in (ours(case), eager(case))]
    error, torch_error = check(*found, inputs.results(eager(case), torch.float64))
    rivals: dict[str, Rival] = {"ours": ours(case), "eager": eager(case)}
    if with_compile:
        torch._dynamo.reset()
        rivals["compile"] = torch.compile(eager(case), dynamic=False)
    return take_turns(rivals, inputs.step, inputs.copy) | {"error": error, "torch_error": torch_error}


def run(options: argparse.Namespace) -> None:
    """Measure in this process, write the rows, draw the table."""
    if options.memory == "kept":
        keep_freed_memory()
    torch.set_num_threads(options.threads)
    store = Store(options.out)
    results = []
    for case in cases(options.only, options.addend):
        found = measure(case, options.compile)
        results.append((case, found))
        named = {"family": case.family, "shape": list(case.shape), "layout": case.layout, "addend": case.residual}
        store.append(
            {"benchmark": "sample_norm", "memory": options.memory, **named, **found, "machine": machine.describe()}
        )
        print(case.family, *row_of(case, found), sep="  ", file=sys.stderr, flush=True)
    columns = ("norm", "shape", "layout", "MB", "ours/floor", "eager/ours", "compile/ours")
    lines = [line for name in ("eager", "compile")[: 1 + options.compile] for line in summary(results, name)]
    rows = tuple((case.family, *row_of(case, found)) for case, found in results)
    document = Document(
        title=f"Normalization within a sample, training, float32, memory: {options.memory}",
        summary="Ratios: forward, backward, both. Above 1 in the last two columns, ours is faster.",
        blocks=(Table("Ratios", columns, rows), *map(Paragraph, lines)),
        facts=machine.describe(),
    )
    terminal.show(document, Console(width=110))


def main() -> None:
    """Read the command line; with `--memory both`, run one process for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("all", *OURS), default="all")
    parser.add_argument("--addend", action="store_true", help="LayerNorm and RMSNorm of a sum, which is returned")
    parser.add_argument("--memory", choices=("both", "default", "kept"), default="both")
    parser.add_argument("--threads", type=int, default=machine.core_count())
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/latest.jsonl"))
    options = parser.parse_args()
    if options.memory != "both":
        run(options)
        return
    for memory in ("kept", "default"):
        subprocess.run([sys.executable, "-m", "benchmarks.sample_norm", *sys.argv[1:], "--memory", memory], check=True)


if __name__ == "__main__":
    main()
