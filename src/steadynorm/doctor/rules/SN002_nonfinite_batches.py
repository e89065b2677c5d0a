"""A NaN in a batch spoils every statistic that it enters.

Why: one NaN in one pixel makes the mean and the variance of its channel NaN, and with them, in training, the whole
batch. A running statistic that takes it in stays NaN for good, and every evaluation from then on. Minus infinity in a
tensor of zeros is an attention mask and is left alone.

Bad:
    model = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4))
    batches = [torch.randn(8, 1, 8, 8), torch.full((8, 1, 8, 8), torch.nan)]

Good:
    model = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4))
    batches = [torch.randn(8, 1, 8, 8), torch.zeros(8, 1, 8, 8)]

Source: https://github.com/pytorch/pytorch/issues/88474
"""

from collections.abc import Iterator

from steadynorm.doctor.finding import Finding, Fix
from steadynorm.probe import Facts, Part

needs: tuple[Part, ...] = ("forward",)


def check(facts: Facts) -> Iterator[Finding]:
    """One finding for each split with such batches."""
    for split, batches in (("evaluation", facts.batches), ("training", facts.train_batches)):
        if batches is None or not batches.nonfinite:
            continue
        count = len(batches.nonfinite)
        first = batches.nonfinite[0]
        yield Finding(
            code="SN002",
            severity="error",
            confidence="proved",
            where="",
            message=(
                f"{count} of the {len(batches.sizes)} {split} batches looked at {'hold' if count > 1 else 'holds'} NaN "
                f"or infinite inputs, first the one with index {first}; they were left out of everything else."
            ),
            evidence={"split": split, "batches": count, "first index": first},
            fix=Fix(
                "Find the samples and repair or drop them; BatchNorm of steadynorm keeps NaN out of its statistics."
            ),
        )
