"""Applies the fixes of a diagnosis, looks again, and takes back what did not help."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path

from torch import nn

from steadynorm import models
from steadynorm.doctor import undo as undoing
from steadynorm.doctor.diagnosis import Diagnosis, Judgement
from steadynorm.doctor.examination import examine
from steadynorm.doctor.finding import Finding
from steadynorm.doctor.fixes import UnhelpfulError
from steadynorm.doctor.undo import Attributes
from steadynorm.probe import Source
from steadynorm.probe.batches import iterate
from steadynorm.probe.effects import Task
from steadynorm.probe.trace import run
from steadynorm.recipe import call

# Recalibration gains little beyond a few thousand samples (Wu & Johnson, arXiv 2105.07576, section 3).
RECALIBRATION_BATCHES = 64
LOSS_BATCHES = 16
# The loss of a healthy model moves by less when its statistics are recalibrated.
LOSS_TOLERANCE = 0.02


@dataclass(frozen=True)
class Repair:
    """What became of one finding that has a fix; its text says it in a sentence.

    Args:
        finding: as it was.
        is_done: whether the fix is in place.
        why_not: what stood against it, where it was taken back.
        loss: before and after, where the diagnosis has a loss.
        in_code: attributes that were changed and that weights do not hold: the code has to say them too.
    """

    finding: Finding
    is_done: bool
    why_not: str = ""
    loss: tuple[float, float] | None = None
    in_code: str = ""

    def __str__(self) -> str:
        where, fix = self.finding.where or "the model", self.finding.fix
        if not self.is_done or fix is None:
            return f"{self.finding.code} {where}: not repaired, {self.why_not}; everything was put back."
        done = f"{self.finding.code} {where}: {fix.text[0].lower()}{fix.text[1:].rstrip('.')}: done"
        if self.loss is not None:
            done += f" (loss {self.loss[0]:.4g} before, {self.loss[1]:.4g} after)"
        return f"{done}. Weights do not hold this; write in the code: {self.in_code}." if self.in_code else f"{done}."


def repair(
    model: nn.Module, diagnosis: Diagnosis, batches: Source, *, unsafe: bool = False, undo: str | Path | None = None
) -> tuple[Repair, ...]:
    """Apply the fixes of a diagnosis in place, and look again after each kind of them.

    A repair that leaves its finding in place, or raises the loss, is taken back, bit for bit. Suppressed findings are
    left alone.

    Args:
        batches: of evaluation data, or a function that gives them. Statistics are recalibrated on the training batches
            of the diagnosis, if it has any, else on these.
        unsafe: also apply fixes that change what the model computes, or how it trains on.
        undo: a file from which `undo_` puts back everything that is changed here.

    Returns: what was done, one for each finding with such a fix.
    """
    wanted = [f for f in diagnosis.findings if f.fix is not None and f.fix.apply and (f.fix.is_safe or unsafe)]
    # What changes how the model trains, then recalibration, judged by the loss, then folds, which do not change that.
    wanted.sort(key=lambda f: (f.code == "SN104", f.fix is not None and f.fix.is_safe, f.code))
    put_back, changed = models.remember(model), undoing.remembered(model)
    repairs: list[Repair] = []
    try:
        for _, group in groupby(wanted, key=lambda f: id(f.fix.apply) if f.fix else 0):
            repairs += _repaired(model, list(group), diagnosis.judgement, batches)
        if undo is not None:
            undoing.write(changed(), Path(undo))
    except BaseException:
        put_back()
        raise
    return tuple(repairs)


def _repaired(model: nn.Module, group: list[Finding], judgement: Judgement, batches: Source) -> list[Repair]:
    """Repair findings of one kind at once; if that does not help, each by itself."""
    put_back, changed = models.remember(model), undoing.remembered(model)
    try:
        losses: list[float] = []
        failed = _attempt(model, group, judgement, batches, losses.append)
    except BaseException:
        put_back()
        raise
    if failed:
        put_back()
        if len(group) > 1:
            return [each for finding in group for each in _repaired(model, [finding], judgement, batches)]
    loss = (losses[0], losses[-1]) if judgement.loss is not None and len(losses) > 1 else None
    attributes = {} if failed else changed().changed
    return [Repair(f, not failed, failed, loss, _in_code(attributes, f)) for f in group]


def _in_code(attributes: Attributes, finding: Finding) -> str:
    """The attributes of the modules that a fix was about, as they have to be written."""
    assert finding.fix is not None
    found = [
        f"{path}.{key} = {value!r}" for path in finding.fix.target for key, value in attributes.get(path, {}).items()
    ]
    return ", ".join(found)


def _attempt(
    model: nn.Module, group: list[Finding], judgement: Judgement, batches: Source, on_loss: Callable[[float], None]
) -> str:
    """Apply the fixes of `group`; why they did not help, or nothing."""
    fixes = [f.fix for f in group if f.fix is not None]
    apply = fixes[0].apply
    assert apply is not None
    data = list(islice(iterate(judgement.train_batches or batches, "batches"), RECALIBRATION_BATCHES))
    before = _loss(model, judgement, batches)
    on_loss(before)
    try:
        apply(model, [fix.target for fix in fixes], data)
    except UnhelpfulError as error:
        return str(error)
    # Statistics that are wrong in another way have another code: that is no repair.
    codes = sorted({"SN2" if f.code.startswith("SN2") else f.code for f in group})
    again = examine(
        model,
        batches,
        train_batches=judgement.train_batches,
        loss=judgement.loss,
        optimizer=judgement.optimizer,
        step=judgement.step,
        checkpoint=judgement.checkpoint,
        select=codes,
    )
    if unseen := [reason for code, reason in again.unchecked.items() if any(f.code == code for f in group)]:
        return f"it could not be looked at again ({unseen[0]})"
    remaining = {f.where for f in again.findings if f.severity != "note" or f.fix in fixes}
    if still := [f.where for f in group if f.where in remaining]:
        return f"the finding is still there ({', '.join(still)})"
    after = _loss(model, judgement, batches)
    on_loss(after)
    if before == before and not after <= before + LOSS_TOLERANCE * abs(before):
        return f"the loss rose from {before:.4g} to {after:.4g}"
    return ""


def _loss(model: nn.Module, judgement: Judgement, batches: Source) -> float:
    """The mean loss over a few evaluation batches; NaN where there is no loss."""
    if judgement.loss is None:
        return math.nan
    task, losses = Task(judgement.loss), []
    with models.undisturbed(model):
        model.eval()
        for batch in islice(iterate(batches, "batches"), LOSS_BATCHES):
            loss, _, _ = task.judge(run(model, batch, call), batch)
            losses.append(math.nan if loss is None else loss)
    return sum(losses) / max(len(losses), 1)
