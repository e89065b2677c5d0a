"""Batches must be random samples of the data, or batch norm learns which batch it is in.

Why: each batch is normalised by itself. In data sorted by class, source or time the batch says what the sample is; the
network uses it, and the running statistics describe no batch that training ever saw: digits sorted by class gave
0.53 instead of 0.99, and recalibration does not help. Measured is the variance between batches over that within them,
on random projections of the inputs, against the same samples dealt out anew.

Bad:
    images = torch.randn(512, 1, 8, 8) + torch.arange(512).div(128, rounding_mode="floor")[:, None, None, None]
    model = nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    batches = [torch.randn(64, 1, 8, 8) for _ in range(4)]
    train_batches = DataLoader(images, batch_size=32)

Good:
    images = torch.randn(512, 1, 8, 8) + torch.arange(512).div(128, rounding_mode="floor")[:, None, None, None]
    model = nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    batches = [torch.randn(64, 1, 8, 8) for _ in range(4)]
    train_batches = DataLoader(images, batch_size=32, shuffle=True)

Source: Wu & Johnson, Rethinking "Batch" in BatchNorm, arXiv 2105.07576, section 5.
"""

from collections.abc import Iterator

from steadynorm.doctor.finding import Finding, Fix, Severity
from steadynorm.probe import Facts, Part

needs: tuple[Part, ...] = ("data", "state")

# Sorted digits gave 12.6 and more, a shuffle buffer that is too small 1.9 to 5.8, two classes a batch 4.2 and more.
WARNING, ERROR = 2.0, 4.0


def check(facts: Facts) -> Iterator[Finding]:
    """One finding for the training batches."""
    likeness = facts.likeness
    if likeness is None or not likeness.is_beyond_chance:
        return
    if not any(norm.learns for norm in facts.norms.values()):
        return
    ratio = likeness.ratio
    severity: Severity = "error" if ratio >= ERROR else "warning" if ratio >= WARNING else "note"
    yield Finding(
        code="SN401",
        severity=severity,
        confidence="measured",
        where="",
        message=(
            f"The means of training batches vary {ratio:.3g} times as much as those of random samples would: each "
            "batch norm is trained on batches that are not like the data."
        ),
        evidence={
            "variance between batches over chance": ratio,
            "the same by chance, 99 of 100": likeness.chance,
            "p": likeness.p,
            "batches": likeness.batches,
            "samples": likeness.samples,
            "warning from": WARNING,
        },
        fix=Fix("Shuffle the samples (DataLoader(..., shuffle=True)), or enlarge the buffer that shuffles them."),
    )
