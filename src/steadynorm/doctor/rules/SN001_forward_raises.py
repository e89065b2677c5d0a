"""A forward that raises cannot be examined, trained or used.

Why: the model was called with a batch of its own data and raised. The module named is the innermost one that was
running. Everything that needs the forward pass is listed as not checked.

Bad:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(8))
    batches = [torch.randn(8, 1, 8, 8)]

Good:
    model = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4))
    batches = [torch.randn(8, 1, 8, 8)]

Source: none; it is what happened.
"""

from collections.abc import Iterator

from steadynorm.doctor.finding import Finding
from steadynorm.probe import Facts, Part

needs: tuple[Part, ...] = ("forward",)

WHEN = {
    "state": "Calling train() and eval() on the model",
    "forward": "In evaluation mode the forward",
    "isolation": "In evaluation mode the forward, on other samples of a batch,",
    "training": "With its batch norms in training mode the forward",
    "audit": "In a training step the forward",
    "drift": "With recalibrated statistics the forward",
}


def check(facts: Facts) -> Iterator[Finding]:
    """One finding for each place and way in which the forward raised."""
    # A layer that raises in training mode raises in each pass that trains: once is enough.
    for failure in {(f.path, f.message): f for f in reversed(facts.failures)}.values():
        yield Finding(
            code="SN001",
            severity="error",
            confidence="proved",
            where=failure.path,
            message=f"{WHEN[failure.part]} raises {failure.message}.",
            evidence={"error": failure.error, "while": failure.part},
        )
