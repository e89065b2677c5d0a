"""Weight decay on a norm's weight pulls a scale towards zero that has no need to be small.

Why: decay of a weight before a norm acts as a learning rate, since its length is divided out; the norm's own weight and
bias are plain scales and offsets, few in number, which most recipes leave out of it. It is a matter of taste: the
ImageNet recipes of ResNet decay them on purpose, and some found it to help on small data. Off by default for that.

Bad:
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=1e-4)
    batches = [torch.randn(16, 1, 8, 8)]

Good:
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    groups = [{"params": model[1].parameters(), "weight_decay": 0.0}, {"params": model[0].parameters()}]
    optimizer = torch.optim.SGD(groups, lr=0.1, weight_decay=1e-4)
    batches = [torch.randn(16, 1, 8, 8)]

Source: Summers & Dinneen, Four Things Everyone Should Know to Improve Batch Normalization, arXiv 1906.03548.
"""

from collections.abc import Iterator

from steadynorm.doctor.finding import Finding, Fix
from steadynorm.probe import Facts, Part

needs: tuple[Part, ...] = ("state", "optimizer")
is_optional = True


def check(facts: Facts) -> Iterator[Finding]:
    """One finding for the whole model."""
    if facts.held is None:
        return
    decayed = {name: decay for name, decay in facts.held.decays.items() if name.rpartition(".")[0] in facts.norms}
    if not decayed:
        return
    yield Finding(
        code="SN701",
        severity="note",
        confidence="proved",
        where="",
        message=f"The optimizer decays {len(decayed)} parameters of norm layers, first {next(iter(decayed))}.",
        evidence={"parameters": len(decayed), "largest decay": max(decayed.values())},
        fix=Fix("Split the groups: steadynorm.training.param_groups keeps norms and biases out of the decay."),
    )
