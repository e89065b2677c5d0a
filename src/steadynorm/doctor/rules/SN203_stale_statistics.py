"""Running statistics that are far from the data make evaluation another model than the one that was trained.

Why: training uses the statistics of the batch, evaluation the stored ones. They part when the average is too slow for
the length of the training, when weights are averaged and statistics are not, when a checkpoint was loaded without its
buffers, or when the data changed. The layer is located by its own inputs, with all batch norms in training mode; what
it costs is measured by exchanging the statistics of this one layer.

Bad:
    batches = [torch.randn(64, 1, 8, 8) for _ in range(4)]
    model = nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8, momentum=0.001), nn.ReLU())
    nn.init.uniform_(model[1].weight)
    for x in batches * 10:
        model(x)

Good:
    batches = [torch.randn(64, 1, 8, 8) for _ in range(4)]
    model = nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8, momentum=0.1), nn.ReLU())
    nn.init.uniform_(model[1].weight)
    for x in batches * 20:
        model(x)

Source: Wu & Johnson, Rethinking "Batch" in BatchNorm, arXiv 2105.07576, section 3.
"""

from collections.abc import Iterator

from steadynorm.doctor import fixes
from steadynorm.doctor.evidence import as_evidence, in_words
from steadynorm.doctor.finding import Finding, Fix, Severity
from steadynorm.probe import Facts, Part
from steadynorm.probe.facts import CHANCE_FACTOR, MATERIAL_DIVERGENCE, Drift, Effect

needs: tuple[Part, ...] = ("drift",)

# Change of the output, in what chance alone does. Over 48 conditions of two networks, 2.5 found 34 of the 35 in which
# recalibration gained 2 points of accuracy or more, with 1 alarm in the other 13; 5 had none.
WARNING_RATIO = 2.5
ERROR_RATIO = 5.0
# Beyond chance is not yet worth a warning: so much has to change, or to be gained.
WARNING_CHANGED, ERROR_CHANGED = 0.01, 0.05
WARNING_GAIN, ERROR_GAIN = 0.05, 0.25
# Where nothing is known of the task: change of the output in its own deviation.
WARNING_DISTANCE, ERROR_DISTANCE = 0.05, 0.25


def check(facts: Facts) -> Iterator[Finding]:
    """One finding for each layer whose statistics are farther from the data than chance."""
    stale = [drift for drift in facts.drift.values() if drift.is_beyond_chance]
    stale = [drift for drift in stale if not (facts.norms[drift.path].nonfinite or facts.norms[drift.path].negative)]
    if stale and facts.is_fresh:
        yield Finding(
            code="SN203",
            severity="note",
            confidence="measured",
            where="",
            message="The model has never been trained: its running statistics are those that it was made with.",
            evidence={"layers": len(stale)},
        )
        return
    for drift in stale:
        if drift.effect is not None:
            yield _finding(drift, drift.effect)


def _finding(drift: Drift, effect: Effect) -> Finding:
    severity = _severity(effect)
    gain = _gain(effect)
    fix = Fix("Recalibrate the statistics from the data.", True, fixes.recalibrate_, (drift.path,))
    if gain is not None and gain < 0:
        fix = Fix("None by recalibration: the loss would rise. Look for what changed between training and this data.")
    elif severity == "note":
        fix = Fix("None needed: it changes next to nothing.")
    return Finding(
        code="SN203",
        severity=severity,
        confidence="measured",
        where=drift.path,
        message=f"The stored statistics of this layer are not those of the data; {in_words(effect)}.",
        evidence={
            "divergence": drift.divergence,
            "threshold": max(MATERIAL_DIVERGENCE, CHANCE_FACTOR * drift.null),
            "largest shift of a mean, in deviations": drift.mean_shift,
            "stored over measured variance, worst channel": drift.variance_ratio,
            **as_evidence(effect),
        },
        fix=fix,
    )


def _gain(effect: Effect) -> float | None:
    """Share of the loss that recalibration takes away; None where no loss is known."""
    if effect.loss is None:
        return None
    before, after = effect.loss
    return (before - after) / max(abs(before), 1e-12) if before == before else 1.0


def _severity(effect: Effect) -> Severity:
    """From what exchanging the statistics does to the task, beyond what chance does."""
    ratio = effect.distance / max(effect.null or 0.0, 1e-12)
    gain, changed = _gain(effect), effect.changed or 0.0
    if ratio < WARNING_RATIO or (gain is not None and gain < 0):
        return "note"
    if gain is None and effect.changed is None:
        changed, gain = 0.0, 0.0
        if ratio >= ERROR_RATIO and effect.distance >= ERROR_DISTANCE:
            return "error"
        return "warning" if effect.distance >= WARNING_DISTANCE else "note"
    if ratio >= ERROR_RATIO and (changed >= ERROR_CHANGED or (gain or 0.0) >= ERROR_GAIN):
        return "error"
    return "warning" if changed >= WARNING_CHANGED or (gain or 0.0) >= WARNING_GAIN else "note"
