"""What a held-out case is: a model with one fault, the same model without it, and what a doctor has to say of both."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steadynorm import doctor, recipe

Pairs = frozenset[tuple[str, str]]
Found = set[tuple[str, str]]


@dataclass
class Subject:
    """What a user hands to the doctor: a model, its data, and how it is trained."""

    model: nn.Module
    batches: Any
    train_batches: Any = None
    loss: Callable[[Any, Any], Tensor] | None = None
    metrics: Callable[[Any, Any], dict[str, float]] | None = None
    optimizer: Any = None
    step: Callable[[nn.Module, Any], Any] | None = None
    select: tuple[str, ...] = ()


@dataclass(frozen=True)
class Held:
    """A case. `expected` are (code, where); `also` is what may be said besides; with `notes` a note will do."""

    name: str
    build: Callable[..., Subject]
    expected: Pairs = frozenset()
    also: Pairs = frozenset()
    notes: bool = False

    @property
    def is_second(self) -> bool:
        """Whether it is of the second set."""
        return ".second" in self.build.__module__

    def examined(self, is_faulty: bool = True) -> doctor.Diagnosis:
        """The diagnosis of the model with its fault, or without."""
        with recipe.seeded(0):
            subject = self.build(is_faulty) if self.expected else self.build()
        given = {key: getattr(subject, key) for key in ("loss", "metrics", "optimizer", "step", "select")}
        return doctor.examine(subject.model, subject.batches, train_batches=subject.train_batches, **given)

    def found(self, diagnosis: doctor.Diagnosis, with_notes: bool = False) -> Found:
        """What the diagnosis says above a note; of the codes that are looked for, notes too where a note will do.

        Args:
            with_notes: let notes of those codes, at the expected places, count in any case.
        """
        above = {(f.code, f.where) for f in diagnosis.findings if f.severity != "note"}
        noted = {(f.code, f.where) for f in diagnosis.findings if f.severity == "note"}
        if self.notes:
            codes = {code for code, _ in self.expected}
            return above | {pair for pair in noted if pair[0] in codes}
        return above | (noted & self.expected if with_notes else set())


FAULTS: list[Held] = []
HEALTHY: list[Held] = []


def planted(name: str, *expected: tuple[str, str], also: Iterable[tuple[str, str]] = (), notes: bool = False):
    """Register the function below, of whether the fault is there, as a faulty model and its healthy twin."""

    def register(build):
        FAULTS.append(Held(name, build, frozenset(expected), frozenset(also), notes))
        return build

    return register


def control(name: str):
    """Register the function below as a healthy model."""

    def register(build):
        HEALTHY.append(Held(name, build))
        return build

    return register


def at(code: str, *places: str) -> list[tuple[str, str]]:
    """One code at several places."""
    return [(code, place) for place in places]


def norms(model: nn.Module, *kinds: type) -> list[str]:
    """The places of all layers of these kinds."""
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


def fit(
    model: nn.Module, batches: Any, loss: Callable[[Any, Any], Tensor], optimizer: torch.optim.Optimizer, steps: int
) -> nn.Module:
    """Train with as many epochs as it takes, while the learning rate falls; the model comes out in training mode."""
    model.train()
    falls = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: max(1 - done / steps, 0.0))
    rates = [group["initial_lr"] for group in optimizer.param_groups]
    done = 0
    while done < steps:
        for batch in batches:
            if done == steps:
                break
            optimizer.zero_grad()
            loss(recipe.call(model, batch), batch).backward()
            optimizer.step()
            falls.step()
            done += 1
    optimizer.zero_grad()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    return model
