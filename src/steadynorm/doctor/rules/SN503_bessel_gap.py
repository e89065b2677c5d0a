"""With few values per statistic, evaluation divides by a larger variance than training did.

Why: training divides by the variance of the batch, and stores n / (n - 1) times that, the estimate of the variance of
the data. With 16 values and more the difference is below 4 % of the deviation; with 4 it is 15 %, with 2, 41 %. Other
libraries store the same number or do not, so that converted weights differ by it. Off by default: SN102 tells the
effect.

Bad:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8, bias=False), nn.BatchNorm1d(8))
    batches = [torch.randn(64, 1, 8, 8)]
    train_batches = [torch.randn(4, 1, 8, 8) for _ in range(8)]

Good:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8, bias=False), nn.BatchNorm1d(8))
    batches = [torch.randn(64, 1, 8, 8)]
    train_batches = [torch.randn(64, 1, 8, 8) for _ in range(8)]

Source: https://github.com/pytorch/pytorch/issues/19902
"""

from collections.abc import Iterator
from statistics import mode

from steadynorm.doctor.finding import Finding, Fix
from steadynorm.probe import Facts, Part

needs: tuple[Part, ...] = ("training",)
is_optional = True

FEW_VALUES = 16


def check(facts: Facts) -> Iterator[Finding]:
    """One finding for each norm with so few values in a training batch."""
    if facts.train_batches is None or not facts.train_batches.sizes:
        return
    size = mode(facts.train_batches.sizes)
    for path, values in facts.values.items():
        count = values.per_sample * size
        if not facts.norms[path].learns or not 1 < count < FEW_VALUES:
            continue
        off = (count / (count - 1)) ** 0.5 - 1
        yield Finding(
            code="SN503",
            severity="note",
            confidence="proved",
            where=path,
            message=f"Evaluation divides by a deviation {off:.0%} larger than training: {count:g} values a statistic.",
            evidence={"values per statistic": count, "larger by": off},
            fix=Fix("Train with larger batches."),
        )
