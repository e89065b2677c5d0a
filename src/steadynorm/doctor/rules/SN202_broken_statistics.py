"""Running statistics that are NaN, infinite or negative make every evaluation meaningless.

Why: evaluation divides by the root of the running variance. One batch with a NaN is enough to make the statistics NaN
for good, since a running average never forgets it, while training goes on as if nothing had happened: it uses the
statistics of the batch. Negative variances come from averaging or extrapolating checkpoints, and from casts.

Bad:
    model = nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8))
    model(torch.full((4, 1, 8, 8), torch.nan))
    batches = [torch.randn(16, 1, 8, 8)]

Good:
    model = nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), steadynorm.BatchNorm2d(8))
    model(torch.full((4, 1, 8, 8), torch.nan))
    batches = [torch.randn(16, 1, 8, 8)]

Source: https://github.com/pytorch/pytorch/issues/88474, https://github.com/pytorch/pytorch/issues/115500
"""

from collections.abc import Iterator

from steadynorm.doctor import fixes
from steadynorm.doctor.evidence import as_evidence
from steadynorm.doctor.finding import Finding, Fix
from steadynorm.probe import Facts, Part

needs: tuple[Part, ...] = ("state",)


def check(facts: Facts) -> Iterator[Finding]:
    """One finding for each layer with such statistics."""
    for path, norm in facts.norms.items():
        if not norm.nonfinite and not norm.negative:
            continue
        parts = [(norm.nonfinite, "NaN or infinite statistics"), (norm.negative, "a negative variance")]
        what = " and ".join(f"{count} of {norm.channels} channels have {name}" for count, name in parts if count)
        fix = Fix("Load the weights of a checkpoint from before, or recalibrate the statistics from data.")
        if norm.learns:
            fix = Fix("Recalibrate the statistics from the data.", True, fixes.recalibrate_, (path,))
        evidence: dict[str, float | int | str] = {"not finite": norm.nonfinite, "negative variance": norm.negative}
        drift = facts.drift.get(path)
        if drift is not None and drift.effect is not None:
            evidence |= as_evidence(drift.effect)
        yield Finding(
            code="SN202",
            severity="error",
            confidence="proved",
            where=path,
            message=f"{what}: in evaluation mode they spoil every output.",
            evidence=evidence,
            fix=fix,
        )
