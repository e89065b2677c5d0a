"""A norm at the very end decides how far the output varies, and numbers that vary more cannot be met.

Why: what leaves a norm has the deviation of its weight, 1 at first, whatever the layers before it do. Targets in the
hundreds are then out of reach until the weight has grown there step by step, while all else is trained on residuals
that it cannot change. An output of deviation s misses at least (1 - s / t)^2 of the variance of targets of deviation t.
Measured on the targets of a batch. Off by default: where the weight has time to grow, or a later part scales the
output, it is no more than slow.

Bad:
    x = torch.randn(64, 8)
    batches = [(x, 100 * x[:, :1])]
    model = nn.Sequential(nn.Linear(8, 1), nn.BatchNorm1d(1))

Good:
    x = torch.randn(64, 8)
    batches = [(x, x[:, :1])]
    model = nn.Sequential(nn.Linear(8, 1), nn.BatchNorm1d(1))

Source: Ioffe & Szegedy, Batch Normalization, arXiv 1502.03167, section 3 (the weight restores what the norm takes).
"""

from collections.abc import Iterator

from steadynorm.doctor.finding import Finding, Fix
from steadynorm.probe import Facts, Part

needs: tuple[Part, ...] = ("forward",)
is_optional = True

# An output that is right but for its deviation then still misses a quarter of the variance: its R2 is at most 0.75.
OUT_OF_REACH = 0.25


def check(facts: Facts) -> Iterator[Finding]:
    """One finding, at the norm that makes the output."""
    found = facts.regression
    if found is None or found.out_of_reach < OUT_OF_REACH:
        return
    yield Finding(
        code="SN117",
        severity="note",
        confidence="proved",
        where=found.norm,
        message=(
            f"The model ends in this norm, whose output has a deviation of {found.reach:.3g}; the targets have "
            f"{found.target:.3g}: at least {found.out_of_reach:.0%} of their variance is out of reach as it stands."
        ),
        evidence={
            "deviation of the output": found.reach,
            "deviation of the targets": found.target,
            "share of variance out of reach": found.out_of_reach,
            "threshold": OUT_OF_REACH,
        },
        fix=Fix("Leave the last norm out, or train on standardised targets and scale the output back."),
    )
