"""What a monitor costs a training step of ResNet-18: a step that is looked at and one that is not, taking turns.

    python -m benchmarks.monitor [--batch 16] [--size 64] [--out FILE]

Between looks there is one call at the end of a step, timed by itself: it is far below the noise of a step.
"""

import argparse
import time
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

import steadynorm
from benchmarks.models import TorchNorm, resnet18
from steadynorm import machine
from steadynorm.doctor.monitor import EVERY, Monitor
from steadynorm.lab.store import Store
from steadynorm.report import Document, Table, terminal

ROUNDS = 15
CALLS = 10_000


def measure(batch: int, size: int, rounds: int) -> dict[str, float]:
    """Least seconds of a step that is not watched and of one that is looked at, and seconds of a step between looks."""
    torch.manual_seed(0)
    model = resnet18(TorchNorm).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    x, target = torch.randn(batch, 3, size, size), torch.randint(1000, (batch,))
    monitor = steadynorm.watch(model, optimizer, every=2, on_finding=lambda finding: None)

    def step() -> float:
        start = time.perf_counter()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), target).backward()
        optimizer.step()
        return time.perf_counter() - start

    step()
    seconds: dict[str, list[float]] = {"looked at": [], "unwatched": []}
    with monitor:
        for _ in range(rounds):
            seconds["looked at"].append(step())
            seconds["unwatched"].append(step())
    if monitor.looks != rounds:
        raise AssertionError(f"{monitor.looks} looks in {rounds} rounds: not timed")
    return {**{kind: min(values) for kind, values in seconds.items()}, "between": _between(model, optimizer)}


def _between(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    """Seconds that the end of a step takes between two looks."""
    with Monitor(model, [optimizer], CALLS + 2, lambda finding: None) as monitor:
        monitor.skip()
        hook = monitor._stepped()
        start = time.perf_counter()
        for _ in range(CALLS):
            hook(optimizer, (), {})
        return (time.perf_counter() - start) / CALLS


def main() -> None:
    """Measure, write the row, draw the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=machine.core_count())
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/latest.jsonl"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = measure(options.batch, options.size, options.rounds)
    extra = found["looked at"] - found["unwatched"]
    share = (extra / EVERY + found["between"]) / found["unwatched"]
    named = {"benchmark": "monitor", "batch": options.batch, "size": options.size, "every": EVERY}
    Store(options.out).append({**named, **found, "share": share, "machine": machine.describe()})
    rows = tuple((kind, f"{found[kind] * 1e3:.4g}") for kind in ("unwatched", "looked at", "between"))
    table = Table("Milliseconds of a step", ("kind", "ms"), rows, "Between: what one step between looks takes longer.")
    summary = (
        f"A look takes {extra / found['unwatched']:.1%} of a step; at one in {EVERY} that is {share:.2%} of the time."
    )
    terminal.show(Document("Monitor, ResNet-18", summary, blocks=(table,), facts=machine.describe()), Console(width=90))


if __name__ == "__main__":
    main()
