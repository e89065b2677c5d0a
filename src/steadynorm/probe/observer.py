"""Looks at one part of a model after the other: what each needs, in which order, and what rests on what."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from steadynorm import models
from steadynorm.blame import in_a_line
from steadynorm.probe import (
    audit,
    bias,
    drift,
    instances,
    isolation,
    optimizer,
    overflow,
    padding,
    preprocessing,
    programs,
    ranks,
    regression,
    spectral,
    state,
)
from steadynorm.probe.audit import Step
from steadynorm.probe.batches import Source, gather
from steadynorm.probe.checkpoint import compare
from steadynorm.probe.data import Sketch
from steadynorm.probe.effects import Task
from steadynorm.probe.facts import AT_REST, PARTS, Drift, Failure, Part
from steadynorm.probe.samples import sample_count, take
from steadynorm.probe.trace import Forward, ForwardRaised, NotPossible, Watcher, inputs_of, trace, watching

# The gap between training and evaluation mode is an average over outputs: it is known well from few batches.
GAP_SAMPLES = 128
# A training step is looked at on half a batch, but of a small one, whose halves would have few values per statistic.
HALVED_FROM = 16

Progress = Callable[[int, int], None]
"""Called with how much is done, and of how much."""

# What each stage costs, in the order of `_Observer.look`. The unit is one training step of the digits at batch size 32
# (10 ms on one core). Measured on digits and digits_faulty; where these differ (isolation 2 and 12, drift 0 and 18:
# both are short where there is nothing to find) it is between the two.
COSTS = {
    "state": 1,
    "data": 2,
    "forward": 2,
    "dead_biases": 2,
    "recalibrate": 14,
    "training": 5,
    "drift": 8,
    "isolation": 6,
    "audit": 2,
}
COST_BATCH_SIZE = 32
# What needs the model to run; a forward that raises leaves nothing of it.
RUNNING = tuple(part for part in PARTS if part not in AT_REST and part != "data")
OF_TRAINING_BATCHES: tuple[Part, ...] = ("training", "data")


def stages(parts: Collection[Part], has_train_batches: bool) -> tuple[str, ...]:
    """The stages of an examination of `parts`, in their order; `COSTS` has what each costs."""
    if set(parts) <= AT_REST:
        return ("state",)
    wanted = {part for part in parts if part not in OF_TRAINING_BATCHES or has_train_batches}
    found = ["state"]
    found += ["data"] if "data" in wanted else []
    found += ["forward"] if set(parts) & set(RUNNING) else []
    found += ["dead_biases"] if "forward" in wanted else []
    found += ["recalibrate"] if wanted & {"training", "drift", "isolation"} else []
    return (*found, *(stage for stage in ("training", "drift", "isolation", "audit") if stage in wanted))


@dataclass(frozen=True)
class Training:
    """How the model is trained, as far as that is known.

    Args:
        is_known: an optimizer was given, if only for nothing.
        across_ranks: every process of the training is here.
        checkpoint: what the model was loaded from.
    """

    optimizer: Optimizer | None = None
    step: Step | None = None
    is_known: bool = False
    across_ranks: bool = False
    checkpoint: Mapping[str, Tensor] | None = None


class Observer:
    """Looks at one part after the other; what one part finds, the next ones use."""

    def __init__(
        self,
        model: nn.Module,
        forward: Forward,
        task: Task,
        training: Training,
        parts: frozenset[Part],
        on_progress: Progress | None,
    ) -> None:
        self.model, self.forward, self.task, self.wanted = model, forward, task, parts
        self.training = training
        self.on_progress, self.stages = on_progress, tuple(COSTS)
        self.found: dict[str, Any] = {}
        self.failures: list[Failure] = []
        self.skipped: dict[Part, str] = {}
        self.here: Sequence[Any] = ()
        self.there: Sequence[Any] = ()
        self.recalibration = drift.Recalibration()
        self.sketch: Sketch | None = None
        self.drifts: dict[str, Drift] = {}
        self.stale: list[str] = []
        # Every part starts from the same model, in evaluation mode: a norm that is left in training mode, or counts
        # something, would carry one part over into the next.
        self.put_back: Callable[[], None] = lambda: None

    def look(self, batches: Source, train_batches: Source | None, samples: int) -> None:
        """All parts that were asked for, in an order in which each has what it needs."""
        self.stages = stages(self.wanted, train_batches is not None)
        try:
            self._look(batches, train_batches, samples)
        finally:
            self._report(len(self.stages))

    def _look(self, batches: Source, train_batches: Source | None, samples: int) -> None:
        if self.training.optimizer is None:
            known = self.training.is_known
            self._skip(("optimizer",), "no parameter takes a gradient" if known else "no optimizer was given")
        if train_batches is None:
            self._skip(OF_TRAINING_BATCHES, "no training batches were given")
        if self._is_program():
            return
        if self.training.checkpoint is None:
            self._skip(("checkpoint",), "no checkpoint was given")
        if not self._try(("state",), self._state) or self.wanted <= AT_REST:
            return
        self._gather(batches, train_batches, samples)
        if not self.here or not self.there:
            self._skip((*RUNNING, "data"), "every batch holds NaN")
        if "data" in self.wanted:
            self._try(("data",), self._data)
        if not self.wanted & set(RUNNING) or not self._try(("forward",), self._forward):
            return
        if "forward" in self.wanted:
            self._try(("forward",), self._dead_biases)
        if self._wants("training", "drift", "isolation") and self._try(("training", "drift"), self._recalibrate):
            if self._wants("training"):
                self._try(("training",), self._training)
            if self._wants("drift"):
                self._try(("drift",), self._drift)
        if "isolation" in self.wanted:
            self._try(("isolation",), self._isolation)
        if "audit" in self.wanted:
            self._try(("audit",), self._audit)

    def _is_program(self) -> bool:
        """Whether the model is a compiled program, or holds one: its modes and tensors could not be put back."""
        found = self.found["programs"] = programs.programs(self.model)
        if found:
            place = found[0].path or "the model"
            reason = f"{place} is a compiled program ({found[0].kind}): examine the model that it was made from"
            self._skip([part for part in PARTS if part != "program"], reason)
        return bool(found)

    def _wants(self, *parts: Part) -> bool:
        return any(part in self.wanted and part not in self.skipped for part in parts)

    def _skip(self, parts: Iterable[Part], reason: str) -> None:
        for part in parts:
            self.skipped.setdefault(part, reason)

    def _try(self, parts: tuple[Part, ...], action: Callable[[], None]) -> bool:
        """Do one thing; if it cannot be done, the parts that rest on it are skipped, with the reason."""
        if all(part in self.skipped for part in parts):
            return False
        self._report(self.stages.index(action.__name__.removeprefix("_")))
        watcher = Watcher()
        affected = self._resting_on(action, parts)
        try:
            with watching(self.model, watcher):
                action()
        except NotPossible as reason:
            self._skip(affected, str(reason))
        except ForwardRaised as raised:
            path, cause = watcher.active[-1] if watcher.active else "", raised.__cause__
            assert cause is not None
            self.failures.append(Failure(parts[0], path, type(cause).__name__, in_a_line(cause)))
            self._skip(affected, f"{in_a_line(cause)}, raised in {path or 'the model'}")
        else:
            return True
        finally:
            self.put_back()
        return False

    def _report(self, stage: int) -> None:
        """Say that the stages before the one with this index are done; those that were not possible count as done."""
        if self.on_progress is not None:
            costs = [COSTS[name] for name in self.stages]
            self.on_progress(sum(costs[:stage]), sum(costs))

    def _resting_on(self, action: Callable[[], None], parts: tuple[Part, ...]) -> tuple[Part, ...]:
        """What cannot be looked at when `action` fails."""
        return PARTS[1:] if action == self._state else RUNNING if action == self._forward else parts

    def _gather(self, batches: Source, train_batches: Source | None, samples: int) -> None:
        self.here, self.found["batches"] = gather(batches, self.forward, self.model, samples, "batches")
        self.there = self.here
        if train_batches is not None:
            # Twice as many: the noise of the recalibration is what everything else is measured against.
            sketch = self.sketch = Sketch() if "data" in self.wanted else None
            self.there, self.found["train_batches"] = gather(
                train_batches, self.forward, self.model, 2 * samples, "train_batches", sketch
            )

    def _state(self) -> None:
        self.found["norms"] = state.look(self.model)
        self.found["rescaled"] = spectral.rescaled(self.model)
        self.found["averaged"] = state.averaged(self.model)
        self.found["ranks"] = ranks.ranks(self.model, self.training.across_ranks)
        self.found["dropping"] = state.dropping(self.model)
        self.found["frozen_layers"] = state.frozen_layers(self.model)
        self.found["spectral"] = spectral.vectors(self.model)
        if self.training.checkpoint is not None:
            self.found["checkpoint"] = compare(self.model, self.training.checkpoint)
        if self.training.optimizer is not None:
            self.found["held"] = optimizer.held(self.training.optimizer, self.model)
        self.put_back = models.remember(self.model)

    def _data(self) -> None:
        assert self.sketch is not None
        self.found["inputs"], self.found["likeness"] = self.sketch.inputs(), self.sketch.likeness()

    def _forward(self) -> None:
        before = state.statistics(self.model)
        self.found["calls"], output, self.found["hard_coded"] = trace(self.model, self.here[0], self.forward)
        self.found["moved"] = state.moved(before, state.statistics(self.model))
        self.task.judge(output, self.here[0])  # a loss that does not fit is found at once
        count = sample_count(inputs_of(self.here[0], self.forward)) or 1
        self.found["values"] = bias.values(self.found["calls"], self.found["norms"], count)
        self.found["bare_layer"] = bias.bare_layer(self.model, self.found["calls"], self.found["norms"])
        self.found["padding"] = padding.padding(self.model, self.here[0], self.forward, self.found["norms"])
        self.found["overflows"] = overflow.overflows(self.model, self.here[0], self.forward, self.found["calls"])
        self.found["regression"] = regression.regression(self.model, self.here[0], output, self.found["calls"])
        if paths := instances.tracking(self.found["norms"]):
            few = self.here[: max(1, GAP_SAMPLES // count)]
            self.found["instance_gap"] = instances.gap(self.model, few, self.forward, self.task, paths)

    def _dead_biases(self) -> None:
        self.found["dead_biases"] = bias.dead(
            self.model, self.here[0], self.forward, self.found["norms"], self.found["calls"]
        )

    def _recalibrate(self) -> None:
        paths = [path for path, norm in self.found["norms"].items() if norm.learns]
        self.stored = drift.Stored(self.model, paths)
        fewest = min((self.found["values"][p].per_sample for p in paths if p in self.found["values"]), default=None)
        self.there = [b for b in self.there if fewest is None or fewest * self._size(b) > 1]
        if not self.there:
            raise NotPossible("every training batch holds one value per statistic")
        try:
            self.recalibration = drift.recalibrate(self.model, self.there, self.forward, paths)
        finally:
            self.stored.put()
        self.drifts = drift.drifts(self.recalibration, self.stored, self.found["norms"])
        self.found["shared"] = self.recalibration.shared
        self.stale = [path for path, one in self.drifts.items() if one.is_beyond_chance]

    def _isolation(self) -> None:
        # With stale statistics in place a leak may be drowned: what it does is looked at as if it were the only fault.
        refreshed = self.recalibration.refreshed(self.stale)
        if refreshed:
            self.stored.put(refreshed)
        self.found["leaks"] = isolation.leaks(
            self.model, self.here, self.forward, self.task, recalibrated=len(refreshed)
        )

    def _size(self, batch: Any) -> int:
        return sample_count(inputs_of(batch, self.forward)) or 1

    def _training(self) -> None:
        paths = list(self.recalibration.halves)
        self.found["values"] |= {path: self.recalibration.values(path) for path in paths}
        if paths:
            few = self.there[: max(2, GAP_SAMPLES // self._size(self.there[0]))]
            self.found["training_gap"] = drift.training_gap(
                self.model, few, self.forward, self.task, self.stored, self.recalibration
            )

    def _drift(self) -> None:
        found, stale = self.drifts, self.stale
        self.found["correction"] = preprocessing.correction(
            self.model,
            self.here,
            self.forward,
            self.task,
            self.found["norms"],
            self.found["calls"],
            trained=() if self.there is self.here else self.there,
        )
        dropped = drift.with_dropout(self.model, self.there, self.forward, stale, self.stored, self.found["norms"])
        found |= {path: replace(found[path], with_dropout=value) for path, value in dropped.items()}
        try:
            if stale:
                alone, self.found["drift_together"] = drift.effects_of(
                    self.model, self.here, self.forward, self.task, stale, self.stored, self.recalibration
                )
                found |= {path: replace(found[path], effect=effect) for path, effect in alone.items()}
        finally:
            self.stored.put()
        self.found["drift"] = found

    def _audit(self) -> None:
        if not self.there:
            raise NotPossible("every training batch holds one value per statistic")
        # Half a batch shows the same, and leaves memory for what is held here beside a step. What stops on it is taken
        # whole.
        batch, size = self.there[0], self._size(self.there[0])
        if self.training.step is None and size >= HALVED_FROM:
            with suppress(NotPossible, ForwardRaised):
                self._step(take(batch, list(range(size // 2))))
                return
            self.put_back()
        self._step(batch)

    def _step(self, batch: Any) -> None:
        # As a training loop does it; what was set by hand before stays, as it would within an epoch.
        self.model.train()
        for path, norm in self.found["norms"].items():
            if norm.is_undone:
                self.model.get_submodule(path).eval()
        given, loss = self.training, self.task.loss
        self.found["audit"] = audit.audit(
            self.model, batch, self.forward, loss=loss, optimizer=given.optimizer, step=given.step
        )
