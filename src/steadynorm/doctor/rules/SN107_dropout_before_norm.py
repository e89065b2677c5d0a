"""Dropout before a batch norm makes the variance that it learns larger than what evaluation brings.

Why: dropout scales up what it keeps, so that the mean stays and the variance grows. A batch norm behind it stores that
variance, and evaluation, without dropout, divides by too much. Narrow layers suffer (0.925 to 0.923 on digits at 32
channels), wide ones hardly. Told from statistics that are merely stale by switching the dropout on: if it explains
them, they fit at once.

Bad:
    batches = [torch.randn(64, 16) for _ in range(8)]
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Dropout(0.5), nn.BatchNorm1d(16), nn.Linear(16, 4))
    nn.init.uniform_(model[3].bias)
    for x in batches * 10:
        model(x)

Good:
    batches = [torch.randn(64, 16) for _ in range(8)]
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 4))
    nn.init.uniform_(model[2].bias)
    for x in batches * 10:
        model(x)

Source: Li et al., Understanding the Disharmony between Dropout and Batch Normalization, arXiv 1801.05134.
"""

from collections.abc import Iterator

from steadynorm.doctor import fixes
from steadynorm.doctor.evidence import as_evidence, in_words, severity_of
from steadynorm.doctor.finding import Finding, Fix
from steadynorm.probe import Facts, Part
from steadynorm.probe.facts import DROPOUT_FACTOR

needs: tuple[Part, ...] = ("drift",)


def check(facts: Facts) -> Iterator[Finding]:
    """One finding for each norm whose statistics are those of the data with dropout."""
    for path, drift in facts.drift.items():
        if facts.is_fresh or not drift.is_beyond_chance or not drift.is_from_dropout or drift.effect is None:
            continue
        severity = severity_of(drift.effect)
        yield Finding(
            code="SN107",
            severity=severity,
            confidence="proved",
            where=path,
            message=(
                "The running statistics of this layer were learned behind dropout, which evaluation does not have; "
                f"{in_words(drift.effect)}."
            ),
            evidence={
                "divergence without dropout": drift.divergence,
                "divergence with dropout": drift.with_dropout or 0.0,
                "factor that tells": DROPOUT_FACTOR,
                **as_evidence(drift.effect),
            },
            fix=Fix(
                "Recalibrate the statistics with dropout switched off; in the code, move dropout behind the last norm.",
                True,
                fixes.recalibrate_,
                (path,),
            )
            if severity != "note"
            else Fix("Move dropout behind the last norm: so far it changes next to nothing."),
        )
