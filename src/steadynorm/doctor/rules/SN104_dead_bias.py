"""A bias right before a batch norm does nothing.

Why: the norm subtracts the mean of the channel, and the bias with it. Its gradient is zero in training, it costs memory
and time in the optimizer, and in evaluation it is a constant that the running mean already holds. Layer norm and group
norm do not cancel it. Found by following the tensor from the layer into the norm, proved by moving the bias in training
mode and seeing that nothing else in the network moves.

Bad:
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    batches = [torch.randn(16, 1, 8, 8)]

Good:
    model = nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    batches = [torch.randn(16, 1, 8, 8)]

Source: Ioffe & Szegedy, Batch Normalization, arXiv 1502.03167, section 3.2.
"""

from collections.abc import Iterator

from steadynorm.doctor import fixes
from steadynorm.doctor.finding import Finding, Fix
from steadynorm.probe import Facts, Part

needs: tuple[Part, ...] = ("forward",)


def check(facts: Facts) -> Iterator[Finding]:
    """One finding for each dead bias."""
    for dead in facts.dead_biases:
        yield Finding(
            code="SN104",
            severity="note",
            confidence="proved",
            where=dead.producer,
            message=(
                f"The bias of this layer ({dead.parameters} parameters) never learns: {dead.norm} subtracts it again."
            ),
            evidence={"norm": dead.norm, "parameters": dead.parameters, "largest change when it moves": dead.change},
            fix=Fix(
                f"Fold the bias into the running mean of {dead.norm} and remove it (bias=False in the code).",
                is_safe=True,
                apply=fixes.fold_biases_,
                target=(dead.producer, dead.norm),
            ),
        )
