"""Inputs far from zero, or of another order than one, train badly where no norm takes the scale out.

Why: initial weights are made for inputs of about zero mean and unit deviation. Pixels from 0 to 255 in a first layer
that no norm follows make its outputs a hundred times too large, and its gradient too: the learning rate of the rest
does not suit it. A batch norm right behind the first layer takes the scale out, and indices of an embedding have none.

Bad:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 8), nn.BatchNorm1d(8))
    batches = [255 * torch.rand(16, 1, 8, 8)]
    train_batches = [255 * torch.rand(16, 1, 8, 8)]

Good:
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 8))
    batches = [255 * torch.rand(16, 1, 8, 8)]
    train_batches = [255 * torch.rand(16, 1, 8, 8)]

Source: LeCun et al., Efficient BackProp, section 4.3; Schoop et al., UMLAUT, CHI 2021.
"""

from collections.abc import Iterator

from steadynorm.doctor.finding import Finding, Fix
from steadynorm.probe import Facts, Part

needs: tuple[Part, ...] = ("data", "forward")

MOST_OFFSET = 3.0
LEAST_DEVIATION, MOST_DEVIATION = 0.1, 10.0


def check(facts: Facts) -> Iterator[Finding]:
    """One finding, at the first layer with weights, where no norm is before it or right behind it."""
    inputs = facts.inputs
    if inputs is None or inputs.deviation == 0 or not facts.bare_layer:
        return
    offset = abs(inputs.mean) / inputs.deviation
    if offset <= MOST_OFFSET and LEAST_DEVIATION <= inputs.deviation <= MOST_DEVIATION:
        return
    yield Finding(
        code="SN406",
        severity="warning",
        confidence="heuristic",
        where=facts.bare_layer,
        message=(
            f"The inputs of this layer have mean {inputs.mean:.3g} and deviation {inputs.deviation:.3g}, and no norm "
            "is near to take that out."
        ),
        evidence={
            "mean": inputs.mean,
            "deviation": inputs.deviation,
            "lowest": inputs.low,
            "highest": inputs.high,
            "deviations from zero": offset,
        },
        fix=Fix("Standardise the inputs; steadynorm.InputNorm holds their statistics with the model."),
    )
