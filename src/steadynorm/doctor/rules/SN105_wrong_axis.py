"""Batch norm takes axis 1 for channels, and does not know when they lie elsewhere.

Why: sequences as (samples, times, features) and images as (samples, height, width, channels) fit a norm of as many
channels as there are times, or rows, and nothing raises. Each time step is then normalised over all features: what
tells the features apart is kept as noise, what tells the times apart is taken away. Told from the data: the entries of
the last axis differ in mean and in spread far more than those of axis 1, and these resemble their neighbours.

Bad:
    scale, offset = torch.linspace(0.1, 3, 12), torch.linspace(-5, 5, 12)
    model = nn.Sequential(nn.BatchNorm1d(20), nn.Flatten(), nn.Linear(240, 4))
    batches = [torch.randn(32, 20, 12).cumsum(1) * scale + offset for _ in range(4)]

Good:
    scale, offset = torch.linspace(0.1, 3, 12), torch.linspace(-5, 5, 12)
    model = nn.Sequential(nn.BatchNorm1d(12), nn.Flatten(), nn.Linear(240, 4))
    batches = [(torch.randn(32, 20, 12).cumsum(1) * scale + offset).transpose(1, 2) for _ in range(4)]

Source: https://github.com/xieyulai/LSTM-for-Human-Activity-Recognition-using-2D-Pose_Pytorch/issues/2
"""

from collections.abc import Iterator

from steadynorm.doctor.finding import Finding, Fix
from steadynorm.probe import Facts, Part
from steadynorm.probe.training_facts import Axes

needs: tuple[Part, ...] = ("forward",)

# Of 400 inputs of healthy norms the first two together accused none; wrong axes had shares of 0.002 against 0.74.
SHARE_FACTOR = 4.0
# A share that is worth a thought, and a spread: entries of one axis that vary twice as much as others.
LEAST_SHARE, LEAST_SPREAD = 0.1, 0.1


def check(facts: Facts) -> Iterator[Finding]:
    """One finding for each norm in whose input the last axis looks like channels, and axis 1 does not."""
    seen: dict[str, tuple[Axes, tuple[int, ...]]] = {}
    for call in facts.calls:
        if call.axes is not None and call.path in facts.norms:
            seen.setdefault(call.path, (call.axes, call.input_shape))
    for path, (axes, shape) in seen.items():
        differs = axes.last_share >= max(LEAST_SHARE, SHARE_FACTOR * axes.share)
        spreads = axes.last_spread >= max(LEAST_SPREAD, axes.spread)
        if not differs or not spreads or axes.likeness <= axes.last_likeness:
            continue
        yield Finding(
            code="SN105",
            severity="error",
            confidence="heuristic",
            where=path,
            message=(
                f"Of the input {shape} the last axis looks like channels: {axes.last_share:.0%} of the variance lies "
                f"between its entries, {axes.share:.1%} between those of axis 1, which this norm takes for channels."
            ),
            evidence={
                "share of the variance, axis 1": axes.share,
                "share of the variance, last axis": axes.last_share,
                "spread of log variances, axis 1": axes.spread,
                "spread of log variances, last axis": axes.last_spread,
                "correlation of neighbours, axis 1": axes.likeness,
                "correlation of neighbours, last axis": axes.last_likeness,
            },
            fix=Fix("Transpose the input so that the channels come second, and give the norm their number."),
        )
