"""A batch norm that gets one value per channel in training stops it.

Why: the variance of one value is zero, so the output would be the bias whatever comes in; PyTorch raises. It happens
where a 1 by 1 feature map meets a batch of one sample, most often the ragged last batch of an epoch.

Bad:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8, bias=False), nn.BatchNorm1d(8))
    batches = [torch.randn(8, 1, 8, 8)]
    train_batches = DataLoader(torch.randn(33, 1, 8, 8), batch_size=8)

Good:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8, bias=False), nn.BatchNorm1d(8))
    batches = [torch.randn(8, 1, 8, 8)]
    train_batches = DataLoader(torch.randn(33, 1, 8, 8), batch_size=8, drop_last=True)

Source: https://github.com/pytorch/pytorch/issues/7716
"""

from collections.abc import Iterator

from steadynorm.doctor.finding import Finding, Fix
from steadynorm.probe import Facts, Part

needs: tuple[Part, ...] = ("training",)


def check(facts: Facts) -> Iterator[Finding]:
    """One finding for each batch norm that some training batch leaves with a single value."""
    if facts.train_batches is None:
        return
    sizes = {*facts.train_batches.sizes, *([] if facts.train_batches.last is None else [facts.train_batches.last])}
    for path, values in facts.values.items():
        norm = facts.norms[path]
        smallest = min(sizes)
        if norm.is_frozen or norm.takes_single_values or values.per_sample * smallest > 1:
            continue
        is_last = smallest == facts.train_batches.last and smallest < max(sizes)
        which = "The last training batch" if is_last else "A training batch"
        yield Finding(
            code="SN101",
            severity="error",
            confidence="proved",
            where=path,
            message=(
                f"{which} holds {smallest} sample{'s' if smallest > 1 else ''}, which leaves this layer one value per "
                "channel: training stops there (Expected more than 1 value per channel when training)."
            ),
            evidence={"samples": smallest, "values per statistic": values.per_sample * smallest},
            fix=Fix(
                "Leave the ragged batch out (DataLoader(..., drop_last=True)), or use steadynorm's BatchNorm with "
                'single_value="running".'
            ),
        )
