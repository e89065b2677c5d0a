"""Applies the safe fixes of a diagnosis, looks again, and takes back what did not help."""

import math
from itertools import groupby, islice

from torch import nn

from steadynorm import models
from steadynorm.doctor.diagnosis import Diagnosis, Judgement
from steadynorm.doctor.examination import examine
from steadynorm.doctor.finding import Finding
from steadynorm.doctor.fixes import UnhelpfulError
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


def repair(model: nn.Module, diagnosis: Diagnosis, batches: Source) -> tuple[str, ...]:
    """Apply the safe fixes of a diagnosis in place, and look again after each kind of them.

    A repair that leaves its finding in place, or raises the loss, is taken back, bit for bit.

    Args:
        batches: of evaluation data, or a function that gives them. Statistics are recalibrated on the training batches
            of the diagnosis, if it has any, else on these.

    Returns: what was done, one sentence for each finding with a safe fix.
    """
    safe = [f for f in diagnosis.findings if f.fix is not None and f.fix.is_safe and f.fix.apply is not None]
    # Recalibration first: it is judged by the loss, which a fold does not change.
    safe.sort(key=lambda f: (f.code == "SN104", f.code))
    sentences: list[str] = []
    for _, group in groupby(safe, key=lambda f: id(f.fix.apply) if f.fix else 0):
        sentences += _repaired(model, list(group), diagnosis.judgement, batches)
    return tuple(sentences)


def _repaired(model: nn.Module, group: list[Finding], judgement: Judgement, batches: Source) -> list[str]:
    """Repair findings of one kind at once; if that does not help, each by itself."""
    put_back = models.remember(model)
    try:
        failed = _attempt(model, group, judgement, batches)
    except BaseException:
        put_back()
        raise
    if failed:
        put_back()
        if len(group) > 1:
            return [sentence for finding in group for sentence in _repaired(model, [finding], judgement, batches)]
    return [_sentence(finding, failed) for finding in group]


def _sentence(finding: Finding, failed: str) -> str:
    assert finding.fix is not None
    where = finding.where or "the model"
    if failed:
        return f"{finding.code} {where}: not repaired, {failed}; everything was put back."
    return f"{finding.code} {where}: {finding.fix.text[0].lower()}{finding.fix.text[1:].rstrip('.')}: done."


def _attempt(model: nn.Module, group: list[Finding], judgement: Judgement, batches: Source) -> str:
    """Apply the fixes of `group`; why they did not help, or nothing."""
    fix = group[0].fix
    assert fix is not None
    assert fix.apply is not None
    data = list(islice(iterate(judgement.train_batches or batches, "batches"), RECALIBRATION_BATCHES))
    before = _loss(model, judgement, batches)
    try:
        fix.apply(model, [f.fix.target for f in group if f.fix is not None], data)
    except UnhelpfulError as error:
        return str(error)
    # Statistics that are wrong in another way have another code: that is no repair.
    codes = sorted({"SN2" if f.code.startswith("SN2") else f.code for f in group})
    again = examine(model, batches, train_batches=judgement.train_batches, loss=judgement.loss, select=codes)
    remaining = {f.where for f in again.findings if f.severity != "note" or f.fix == fix}
    if still := [f.where for f in group if f.where in remaining]:
        return f"the finding is still there ({', '.join(still)})"
    after = _loss(model, judgement, batches)
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
