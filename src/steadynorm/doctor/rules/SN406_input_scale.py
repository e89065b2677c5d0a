"""Inputs far from zero, or of another order than one, train badly where no norm takes the scale out.

Why: initial weights are made for inputs of about zero mean and unit deviation. Pixels from 0 to 255 in a first layer
that no norm follows make its outputs a hundred times too large, and its gradient too: the learning rate of the rest
does not suit it. A batch norm right behind the first layer takes the scale out, and indices of an embedding have none.
Features of a table in units of their own are another matter: where one varies a hundred times as much as most, the
first layer sees that one, and a norm behind it does not bring the others back (wines told apart with a loss of 0.97
instead of 0.04). Only a norm before it does.

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
from steadynorm.probe.training_facts import Inputs

needs: tuple[Part, ...] = ("data", "forward")

MOST_OFFSET = 3.0
LEAST_DEVIATION, MOST_DEVIATION = 0.1, 10.0
# Share of the features of a table that one of them drowns.
MOST_DROWNED = 0.5
# Calls from the first layer on, in the order of their ends, within which a norm takes out the scale of the input.
NEAR = 3


def check(facts: Facts) -> Iterator[Finding]:
    """One finding, at the first layer with weights, where no norm before or right behind it takes out the scale."""
    inputs = facts.inputs
    if inputs is None or inputs.deviation == 0 or not facts.bare_layer:
        return
    if inputs.drowned >= MOST_DROWNED:
        yield _drowned(facts.bare_layer, inputs)
        return
    place = [call.path for call in facts.calls].index(facts.bare_layer)
    if any(call.path in facts.norms for call in facts.calls[place : place + NEAR]):
        return
    offset = abs(inputs.mean) / inputs.deviation
    # Mostly zeros, as in one column for each category, vary little and are of the order of one all the same.
    is_small = inputs.deviation < LEAST_DEVIATION and max(abs(inputs.low), abs(inputs.high)) < 1
    if offset <= MOST_OFFSET and not is_small and inputs.deviation <= MOST_DEVIATION:
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


def _drowned(where: str, inputs: Inputs) -> Finding:
    return Finding(
        code="SN406",
        severity="warning",
        confidence="heuristic",
        where=where,
        message=(
            f"{inputs.drowned:.0%} of the features that this layer is given vary less than a hundredth of the one that "
            "varies most: it sees next to nothing of them, and no norm is before it."
        ),
        evidence={
            "features drowned, share": inputs.drowned,
            "warning from": MOST_DROWNED,
            "lowest": inputs.low,
            "highest": inputs.high,
        },
        fix=Fix("Standardise each feature; steadynorm.InputNorm holds their statistics with the model."),
    )
