"""Channels that a norm multiplies by nothing, or that never vary, are paid for and say nothing.

Why: a weight that decay has driven to zero, or an input without variance, makes a constant of the channel. A few are
usual; a quarter of a layer can be pruned without a change of the output, or points to a learning rate that killed the
units before it. A layer whose weights are all zero, as residual branches start, is left alone.

Bad:
    model = nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    nn.init.uniform_(model[1].bias)
    model[1].weight.data[:4] = 1e-9
    batches = [torch.randn(16, 1, 8, 8)]

Good:
    model = nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    nn.init.zeros_(model[1].weight)
    batches = [torch.randn(16, 1, 8, 8)]

Source: Liu et al., Learning Efficient Convolutional Networks through Network Slimming, arXiv 1708.06519, section 3.
"""

from collections.abc import Iterator

from steadynorm.doctor.finding import Finding, Fix
from steadynorm.probe import Facts, Part

needs: tuple[Part, ...] = ("state",)

SHARE = 0.25


def check(facts: Facts) -> Iterator[Finding]:
    """One finding for each layer of which a good part is dead."""
    for path, norm in facts.norms.items():
        channels = norm.channels or 0
        if not channels or norm.dead <= SHARE * channels:
            continue
        yield Finding(
            code="SN112",
            severity="note",
            confidence="proved",
            where=path,
            message=f"{norm.dead} of {channels} channels are constant after this layer: paid for, and without a say.",
            evidence={"channels": norm.dead, "share": norm.dead / channels, "threshold": SHARE},
            fix=Fix("Prune them, or look at what killed them: weight decay on the norm, the learning rate."),
        )
