"""Where the variance is below eps, a batch norm shrinks what it should scale.

Why: the output's deviation is the root of var / (var + eps), 0.71 where the two are equal and less below. The layer no
longer normalises those channels: their scale in training follows that of the weights before them. It happens after
casts, with inputs in other units, and with an eps of 1e-3 from other libraries. Dead channels are left out. Where the
data was looked at it is the variance of the data that counts: the stored one may still hold some of its initial 1.

Bad:
    model = nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8, momentum=0.5))
    nn.init.normal_(model[0].weight, std=1e-4)
    batches = [torch.randn(64, 1, 8, 8)] * 20
    for x in batches:
        model(x)

Good:
    model = nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8, momentum=0.4))
    batches = [torch.randn(64, 1, 8, 8)] * 20
    for x in batches:
        model(x)

Source: Ioffe & Szegedy, Batch Normalization, arXiv 1502.03167, algorithm 1.
"""

from collections.abc import Iterator

from steadynorm.doctor.finding import Finding, Fix
from steadynorm.probe import Facts, Part
from steadynorm.probe.facts import DEAD_VARIANCE, Norm

needs: tuple[Part, ...] = ("state",)

SHARE = 0.1


def check(facts: Facts) -> Iterator[Finding]:
    """One finding for each layer with many such channels."""
    for path, norm in facts.norms.items():
        channels, below = norm.channels or 0, _below_eps(norm, facts)
        if not channels or below <= SHARE * channels:
            continue
        yield Finding(
            code="SN111",
            severity="note",
            confidence="proved",
            where=path,
            message=(
                f"{below} of {channels} channels vary less than eps ({norm.eps:g}): their output has less "
                "than 0.71 of the deviation that the layer is there to give."
            ),
            evidence={"channels": below, "share": below / channels, "threshold": SHARE},
            fix=Fix("Lower eps, or scale the input."),
        )


def _below_eps(norm: Norm, facts: Facts) -> int:
    """Channels that vary less than eps, and more than dead ones: in the data where that is known, else as stored."""
    drift = facts.drift.get(norm.path)
    if drift is None or not drift.measured:
        return norm.below_eps
    return sum(DEAD_VARIANCE <= var < (norm.eps or 0.0) for _, var in drift.measured)
