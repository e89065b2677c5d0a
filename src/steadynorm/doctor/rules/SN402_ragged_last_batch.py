"""A small last batch is the last thing that the running statistics learn before they are used.

Why: every batch has the same weight in the running average, `momentum`, whatever its size. The ragged last batch of an
epoch comes right before the evaluation: with two independent values it moves each mean by a tenth of a deviation or so,
which is what a layer of which nothing else is wrong must not be off by. It differs from epoch to epoch.

Bad:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8, bias=False), nn.BatchNorm1d(8))
    batches = [torch.randn(64, 1, 8, 8) for _ in range(4)]
    train_batches = DataLoader(torch.randn(130, 1, 8, 8), batch_size=32, shuffle=True)

Good:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8, bias=False), nn.BatchNorm1d(8))
    batches = [torch.randn(64, 1, 8, 8) for _ in range(4)]
    train_batches = DataLoader(torch.randn(130, 1, 8, 8), batch_size=32, shuffle=True, drop_last=True)

Source: https://github.com/pykeen/pykeen/pull/113
"""

from collections.abc import Iterator
from statistics import mode

from steadynorm.doctor.finding import Finding, Fix
from steadynorm.probe import Facts, Part
from steadynorm.probe.facts import MATERIAL_DIVERGENCE

needs: tuple[Part, ...] = ("training",)

# Independent values below which a batch's statistics are mostly noise, and a batch so much smaller than the others.
FEW_VALUES = 16
SMALL_SHARE = 0.5


def check(facts: Facts) -> Iterator[Finding]:
    """One finding, at the layer with the fewest independent values in the last batch."""
    batches = facts.train_batches
    if batches is None or batches.last is None or not batches.sizes:
        return
    size, last = mode(batches.sizes), batches.last
    values = {
        path: (found.independent_per_sample or found.per_sample, found.per_sample)
        for path, found in facts.values.items()
        if facts.norms[path].learns and facts.norms[path].momentum
    }
    # One value is SN101's: PyTorch stops there.
    values = {path: pair for path, pair in values.items() if pair[1] * last > 1}
    if not values or last > SMALL_SHARE * size:
        return
    where = min(values, key=lambda path: values[path])
    independent = values[where][0] * last
    if independent >= FEW_VALUES:
        return
    momentum = facts.norms[where].momentum or 0.0
    # A mean of n values is off by 1 / sqrt(n) deviations, a variance by sqrt(2 / n) of itself; momentum of both stays.
    expected = 2 * momentum**2 / independent
    yield Finding(
        code="SN402",
        severity="warning" if expected >= MATERIAL_DIVERGENCE and not facts.is_fresh else "note",
        confidence="heuristic",
        where=where,
        message=(
            f"The last training batch holds {last} of {size} samples, for this layer {independent:.3g} independent "
            f"values, and counts {momentum:g} in the running statistics right before they are used."
        ),
        evidence={
            "samples of the last batch": last,
            "independent values": independent,
            "expected divergence": expected,
            "warning from": MATERIAL_DIVERGENCE,
        },
        fix=Fix("Leave the ragged batch out of training: DataLoader(..., drop_last=True)."),
    )
