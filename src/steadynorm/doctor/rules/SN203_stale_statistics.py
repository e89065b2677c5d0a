"""Running statistics that are far from the data make evaluation another model than the one that was trained.

Why: training uses the statistics of the batch, evaluation the stored ones. They part when the average is too slow for
the length of the training, when weights are averaged and statistics are not, when a checkpoint was loaded without its
buffers, or when the data changed. The layer is located by its own inputs, with all batch norms in training mode; what
it costs is measured by exchanging the statistics of this one layer.

Bad:
    batches = [torch.randn(64, 1, 8, 8) for _ in range(4)]
    model = nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8, momentum=0.1), nn.ReLU())
    nn.init.uniform_(model[1].bias)
    for x in batches * 20:
        model(3 * x)

Good:
    batches = [torch.randn(64, 1, 8, 8) for _ in range(4)]
    model = nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8, momentum=0.1), nn.ReLU())
    nn.init.uniform_(model[1].bias)
    for x in batches * 20:
        model(x)

Source: Wu & Johnson, Rethinking "Batch" in BatchNorm, arXiv 2105.07576, section 3.
"""

from collections.abc import Iterator

from steadynorm.doctor import fixes
from steadynorm.doctor.evidence import as_evidence, gain_of, in_words, severity_of
from steadynorm.doctor.finding import Finding, Fix
from steadynorm.probe import Facts, Part
from steadynorm.probe.facts import CHANCE_FACTOR, MATERIAL_DIVERGENCE, MOST_RESIDUE, Drift, Effect

needs: tuple[Part, ...] = ("drift",)


def check(facts: Facts) -> Iterator[Finding]:
    """One finding for each layer whose statistics are farther from the data than chance."""
    stale = [drift for drift in facts.drift.values() if drift.is_beyond_chance]
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
        # Where it is known why, the rule for that says it.
        is_explained = (
            facts.norms[drift.path].state_fault
            or drift.path in facts.averaged
            or drift.path in facts.lost
            or drift.is_from_dropout
            or is_slow(drift, facts)
            or (facts.correction is not None and facts.correction.norm == drift.path)
        )
        if drift.effect is not None and not is_explained:
            yield _finding(drift, drift.effect)


def is_slow(drift: Drift, facts: Facts) -> bool:
    """Whether stale statistics are for a good part those that the layer was made with (SN109)."""
    norm = facts.norms[drift.path]
    known = norm.state_fault or drift.path in {*facts.averaged, *facts.lost} or drift.is_from_dropout
    is_begun = norm.residue > MOST_RESIDUE or drift.is_from_beginning
    return not known and drift.is_beyond_chance and is_begun


def _finding(drift: Drift, effect: Effect) -> Finding:
    severity = severity_of(effect)
    gain = gain_of(effect)
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
