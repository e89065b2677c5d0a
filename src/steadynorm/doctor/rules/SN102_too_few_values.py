"""Batch statistics of few values are noise: the model that is trained is not the one that is evaluated.

Why: in training every output depends on the mean and variance of its batch, in evaluation on the running ones. The two
differ by the noise of the batch's statistics, and the difference of the outputs falls like 1 / batch size: on digits
0.56, 0.29, 0.15, 0.05, 0.04 of the output's variance at 2, 4, 8, 16, 32 samples. Values of one image resemble each
other: a feature map counts as var(all) / var(means of images) independent values, in late layers often one or two. And
where rare values decide the variance (prices, counts, incomes as they come), many are worth no more than a few: there
the finding names the tails.

Bad:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))
    batches = [torch.randn(64, 1, 8, 8) for _ in range(4)]
    train_batches = [torch.randn(2, 1, 8, 8) for _ in range(64)]

Good:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))
    batches = [torch.randn(64, 1, 8, 8) for _ in range(4)]
    train_batches = [torch.randn(64, 1, 8, 8) for _ in range(8)]

Source: Wu & Johnson, Rethinking "Batch" in BatchNorm, arXiv 2105.07576; Ioffe, Batch Renormalization, arXiv 1702.03275.
"""

from collections.abc import Iterator
from statistics import mode

from steadynorm.doctor.finding import Finding, Fix, Severity
from steadynorm.probe import Facts, Part

needs: tuple[Part, ...] = ("training",)

# Share of the output's variance. On digits the first is met at 8 samples (4 % of predictions change), the second at 4.
WARNING_GAP = 0.10
ERROR_GAP = 0.25
# Independent values per statistic below which the mean alone is off by a quarter of a deviation.
FEW_VALUES = 16
# With more, the gap is what many layers add up to, and evaluation is no worse for it: small residual networks with 83
# to 128 values in their last layer had gaps of 0.1 to 0.28, and a lower loss in evaluation than in training mode.
MANY_VALUES = 64
# How much more the variance varies from batch to batch than that of a normal distribution. In 70 healthy models the
# layer with the most reads up to 3.0; measurements that were exponentiated read 89, projected digits 47.
HEAVY_TAILS = 10.0


def check(facts: Facts) -> Iterator[Finding]:
    """One finding, at the layer with the fewest independent values."""
    if facts.train_batches is None or facts.train_batches.used == 0:
        return
    size = mode(facts.train_batches.sizes)
    independent = {
        path: size * (values.independent_per_sample or values.per_sample)
        for path, values in facts.values.items()
        if facts.norms[path].learns
    }
    if not independent:
        return
    tails = {path: facts.values[path].tails or 0.0 for path in independent}
    # What they are worth as values of a normal distribution.
    worth = {path: independent[path] / (tails[path] if tails[path] >= HEAVY_TAILS else 1) for path in independent}
    where = min(worth, key=lambda path: worth[path])
    gap = facts.training_gap
    share = 0.0 if gap is None else gap.relative_square
    severity: Severity = "error" if share >= ERROR_GAP else "warning" if share >= WARNING_GAP else "note"
    if facts.is_fresh:
        severity = "note"  # the outputs of a model that was never trained say nothing yet
    # Batches that are not alike, or calls: SN401 and SN106 say why training and evaluation part.
    is_explained = facts.likeness is not None and facts.likeness.is_beyond_chance
    is_explained |= any(shared.divergence >= shared.threshold for shared in facts.shared.values())
    if independent[where] >= FEW_VALUES and (severity == "note" or is_explained):
        return
    if worth[where] >= MANY_VALUES:
        severity = "note"
    evidence: dict[str, float | int | str] = {
        "batch size": size,
        "values per statistic": size * facts.values[where].per_sample,
        "independent values": independent[where],
    }
    effect = "the statistics of a batch are mostly noise"
    if gap is not None:
        evidence |= {"gap, share of output variance": share, "warning from": WARNING_GAP}
        effect = f"training and evaluation mode differ by {share:.0%} of the output's variance"
        if gap.changed is not None:
            evidence["predictions that differ"] = gap.changed
            effect += f" and in {gap.changed:.0%} of the predictions"
    yield _finding(where, size, severity, effect, evidence, tails[where])


def _finding(
    where: str, size: int, severity: Severity, effect: str, evidence: dict[str, float | int | str], tails: float
) -> Finding:
    is_measured = "warning from" in evidence
    reason = f"this layer has the fewest independent values per statistic, {evidence['independent values']:.3g}"
    fix = (
        "Train with larger batches; where memory forbids it, take group norm, synchronise over devices, or freeze the "
        "statistics."
    )
    if tails >= HEAVY_TAILS:
        evidence = {**evidence, "variance of the variance, in that of a normal distribution": tails}
        reason = (
            f"what this layer is given has heavy tails: its variance varies from batch to batch {tails:.0f} times as "
            "much as that of as many values of a normal distribution"
        )
        fix = "Compress what the layer is given (a logarithm, ranks) or clip it; larger batches help slowly."
    return Finding(
        code="SN102",
        severity=severity,
        confidence="measured" if is_measured else "heuristic",
        where=where,
        message=f"At batch size {size}, {effect}; {reason}.",
        evidence=evidence,
        fix=Fix(fix),
    )
