"""What the doctor costs on a ResNet-50 at 224 pixels: forward passes over the samples it looks at, and memory.

    python -m benchmarks.doctor [--samples 256] [--batch 32] [--only recalibrated] [--out FILE]

Speeds of a shared machine change within minutes: a batch is timed, without gradients, before the doctor, after each of
its stages and at its end, and each stage counts in forward passes at the speed of its time.
Peaks are those of the resident memory above what the process had with the model made: of the doctor, and, in a process
of its own, of two training steps (the second has the optimizer's state to hold).
"""

import argparse
import ctypes
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification

from benchmarks.processes import alone, resident
from steadynorm import doctor, machine
from steadynorm.lab.store import Store
from steadynorm.report import Document, Table, terminal
from steadynorm.training import recalibrate_

KINDS = ("as made", "recalibrated")
CLASSES = 1000


class Classifier(nn.Module):
    """A ResNet-50 that gives its class scores."""

    def __init__(self) -> None:
        super().__init__()
        self.net = ResNetForImageClassification(ResNetConfig(num_labels=CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.net(x).logits
        return scores


def batches(samples: int, batch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Random images, made anew each time, as a loader reads them."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(samples // batch):
        yield (
            torch.randn(batch, 3, 224, 224, generator=generator),
            torch.randint(CLASSES, (batch,), generator=generator),
        )


def loss(output: Tensor, batch: Any) -> Tensor:
    """Cross entropy."""
    return nn.functional.cross_entropy(output, batch[1])


def optimizer(parameters: Any) -> torch.optim.Optimizer:
    """That of the training step, too."""
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)


def model_of(kind: str, batch: int) -> nn.Module:
    """As it is made, all of whose running statistics are stale, or with statistics of its data."""
    torch.manual_seed(0)
    model = Classifier()
    if kind == "recalibrated":
        recalibrate_(model, list(batches(4 * batch, batch, 1)), method="layer_by_layer")
    return model.eval()


class Clock:
    """Counts the stages of an examination in forward passes over its samples."""

    def __init__(self, samples: int, batch: int) -> None:
        self.model, self.samples, self.batch = model_of("as made", batch), samples, batch
        self.given = next(batches(batch, batch, 0))[0]
        self.seconds, self.passes, self.speeds = 0.0, 0.0, [self._pass(), self._pass()][1:]
        self.start = time.perf_counter()

    def _pass(self) -> float:
        """Seconds of a forward pass over all samples, from one batch."""
        start = time.perf_counter()
        with torch.no_grad():
            self.model(self.given)
        return (time.perf_counter() - start) * self.samples / self.batch

    def tick(self, done: int, total: int) -> None:
        """A stage has ended."""
        stage = time.perf_counter() - self.start
        self.speeds.append(self._pass())
        self.seconds += stage
        self.passes += stage / statistics.mean(self.speeds[-2:])
        self.start = time.perf_counter()


def diagnose(model: nn.Module, samples: int, batch: int, clock: Clock) -> doctor.Diagnosis:
    """The default doctor, with all that a recipe can give."""
    return doctor.examine(
        model,
        lambda: batches(samples, batch, 0),
        train_batches=lambda: batches(2 * samples, batch, 1),
        loss=loss,
        optimizer=optimizer,
        checkpoint=model.state_dict(),
        on_progress=clock.tick,
    )


def raised(action: Callable[[], Any]) -> int:
    """By how much an action raises the peak of the resident memory, in bytes."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    action()
    return resident("VmHWM") - before


def training(samples: int, batch: int) -> dict[str, float]:
    """The peak of two training steps."""
    model = model_of("as made", batch).train()

    def steps() -> None:
        used = optimizer(model.parameters())
        for given in batches(2 * batch, batch, 0):
            used.zero_grad()
            loss(model(given[0]), given).backward()
            used.step()

    return {"peak": raised(steps)}


def examined(kind: str, samples: int, batch: int) -> dict[str, float]:
    """Seconds of the doctor, of a forward pass over its samples, and of a look without data; its peak."""
    model, clock = model_of(kind, batch), Clock(samples, batch)
    found: list[doctor.Diagnosis] = []
    peak = raised(lambda: found.append(diagnose(model, samples, batch, clock)))
    clock.tick(1, 1)
    if missing := found[0].facts.skipped:
        raise AssertionError(f"parts were not looked at: {missing}")
    start = time.perf_counter()
    doctor.examine(model)
    quick = time.perf_counter() - start
    stale = sum(one.is_beyond_chance for one in found[0].facts.drift.values())
    forward = statistics.median(clock.speeds)
    timed = {"doctor": clock.seconds, "forward": forward, "passes": clock.passes}
    return {**timed, "quick": quick, "stale": stale, "peak": peak}


def main() -> None:
    """Read the command line, measure, write the rows, draw the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=machine.core_count())
    parser.add_argument("--only", choices=KINDS)
    parser.add_argument("--of", choices=(*KINDS, "training"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/latest.jsonl"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sizes = options.samples, options.batch
    if options.of:
        print(json.dumps(training(*sizes) if options.of == "training" else examined(options.of, *sizes)))
        return
    common = ["--samples", str(sizes[0]), "--batch", str(sizes[1]), "--threads", str(options.threads)]
    store, lines = Store(options.out), []
    step = alone("benchmarks.doctor", *common, "--of", "training")["peak"]
    for kind in (options.only,) if options.only else KINDS:
        row = alone("benchmarks.doctor", *common, "--of", kind)
        named = {"benchmark": "doctor", "model": kind, "samples": sizes[0], "batch": sizes[1], "training_peak": step}
        store.append({**named, **row, "machine": machine.describe()})
        seconds = (f"{row['doctor']:.0f}", f"{row['forward']:.1f}", f"{row['passes']:.2f}", f"{row['quick']:.2f}")
        lines.append((kind, str(row["stale"]), *seconds, f"{row['peak'] / 1e6:.0f}", f"{step / 1e6:.0f}"))
    columns = (
        "model",
        "stale layers",
        "doctor, s",
        "forward, s",
        "passes",
        "without data, s",
        "peak, MB",
        "training, MB",
    )
    table = Table("Time and memory", columns, tuple(lines))
    summary = f"{sizes[0]} samples, batches of {sizes[1]}, {options.threads} threads."
    title = "The doctor on a ResNet-50, 224 pixels"
    terminal.show(Document(title, summary, blocks=(table,), facts=machine.describe()), Console(width=110))


if __name__ == "__main__":
    main()
