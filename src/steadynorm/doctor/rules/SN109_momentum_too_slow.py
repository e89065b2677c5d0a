"""An average that is too slow for the length of the training still holds what it began with.

Why: after T updates the mean of 0 and the variance of 1 that a layer is made with keep the weight (1 - momentum)^T.
With a momentum of 0.003 and 120 steps that is 0.70: evaluation uses next to nothing of the data (0.63 instead of 0.98
on digits). Networks for phones ship with momenta of 0.01 to 0.0003, made for a million steps. Where the data varies
much less than 1 a small rest is enough: after 80 steps at 0.1 it is 0.0002, a hundred times a variance of 2e-6. Then it
is told by taking the rest out: what is left is what the data has.

Bad:
    batches = [5 + torch.randn(64, 1, 8, 8) for _ in range(4)]
    model = nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8, momentum=0.003), nn.ReLU())
    nn.init.uniform_(model[1].bias)
    for x in batches * 30:
        model(x)

Good:
    batches = [5 + torch.randn(64, 1, 8, 8) for _ in range(4)]
    model = nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8, momentum=0.1), nn.ReLU())
    nn.init.uniform_(model[1].bias)
    for x in batches * 30:
        model(x)

Source: Wu & Johnson, Rethinking "Batch" in BatchNorm, arXiv 2105.07576, section 3.
"""

from collections.abc import Iterator

from steadynorm.doctor import fixes
from steadynorm.doctor.evidence import as_evidence, judged
from steadynorm.doctor.finding import Finding, Fix
from steadynorm.doctor.rules.SN203_stale_statistics import is_slow
from steadynorm.probe import Facts, Part
from steadynorm.probe.facts import MOST_RESIDUE

needs: tuple[Part, ...] = ("drift",)


def check(facts: Facts) -> Iterator[Finding]:
    """One finding for each norm whose stale statistics are for the most part what it was made with."""
    slow = [path for path, drift in facts.drift.items() if is_slow(drift, facts)]
    for path, drift in facts.drift.items():
        if drift.effect is None or facts.is_fresh or path not in slow:
            continue
        norm = facts.norms[path]
        severity, words = judged(drift.effect, facts, slow)
        fix = Fix("Recalibrate the statistics from the data.", True, fixes.recalibrate_, (path,))
        yield Finding(
            code="SN109",
            severity=severity,
            confidence="proved",
            where=path,
            message=(
                f"With momentum {norm.momentum:g} and {norm.batches_tracked} updates, {_share(norm.residue)} of the "
                f"running statistics are still the 0 and 1 that they began with; {words}."
            ),
            evidence={
                "momentum": norm.momentum or 0.0,
                "updates": norm.batches_tracked or 0,
                "weight of the beginning": norm.residue,
                "threshold": MOST_RESIDUE,
                "divergence": drift.divergence,
                "divergence without the beginning": drift.without_beginning or 0.0,
                **as_evidence(drift.effect),
            },
            fix=fix if severity != "note" else Fix("None needed yet: it changes next to nothing."),
        )


def _share(residue: float) -> str:
    return f"{residue:.0%}" if residue >= 0.01 else f"{residue:.1g}"
