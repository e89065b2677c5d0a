"""A feature that never varies is turned into noise, or into nothing, by a batch norm.

Why: the deviation of a constant is zero, and the norm divides by the root of eps: what rounding left is blown up by
300, and where one rare sample differs it enters as a number of hundreds. Rare one-hot columns look constant in a few
batches and are meant; therefore off by default.

Bad:
    model = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 4))
    batches = [torch.randn(64, 8) * torch.tensor([0.0] + [1.0] * 7) for _ in range(4)]
    train_batches = batches

Good:
    model = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 4))
    batches = [torch.randn(64, 8) for _ in range(4)]
    train_batches = batches

Source: Ben Braiek & Khomh, Testing Feedforward Neural Networks Training Programs, arXiv 2204.00694 (TheDeepChecker).
"""

from collections.abc import Iterator

from steadynorm.doctor.finding import Finding, Fix
from steadynorm.probe import Facts, Part

needs: tuple[Part, ...] = ("data", "forward")
is_optional = True


def check(facts: Facts) -> Iterator[Finding]:
    """One finding for the norm that is the first layer of a network on a table."""
    if facts.inputs is None or not facts.inputs.constant:
        return
    first = next((call for call in facts.calls if call.path), None)
    if first is None or first.path not in facts.norms or len(first.input_shape) != 2:
        return
    yield Finding(
        code="SN407",
        severity="note",
        confidence="measured",
        where=first.path,
        message=f"{facts.inputs.constant} of {first.input_shape[1]} features do not vary in the training batches.",
        evidence={"constant features": facts.inputs.constant, "features": first.input_shape[1]},
        fix=Fix("Drop the features, or leave them out of the norm."),
    )
