"""Freezing parameters does not freeze the running statistics.

Why: `requires_grad = False` stops the optimizer. In training mode a batch norm still normalises by the batch and moves
its statistics, so that a "frozen" backbone is another one after each epoch. `.eval()` on it lasts until the next
`model.train()`. It is not always worse: on a shifted domain moving statistics gave 0.896, frozen ones 0.880.

Bad:
    backbone = nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())
    model = nn.Sequential(backbone.requires_grad_(False), nn.Linear(288, 4))
    batches = [torch.randn(16, 1, 8, 8)]

Good:
    backbone = nn.Sequential(nn.Conv2d(1, 8, 3), steadynorm.BatchNorm2d(8).freeze_(), nn.ReLU(), nn.Flatten())
    model = nn.Sequential(backbone.requires_grad_(False), nn.Linear(288, 4))
    batches = [torch.randn(16, 1, 8, 8)]

Source: https://github.com/pytorch/pytorch/issues/86590
"""

from collections.abc import Iterator

from steadynorm.doctor.finding import Finding, Fix
from steadynorm.probe import Facts, Part
from steadynorm.probe.facts import Norm

needs: tuple[Part, ...] = ("forward",)


def check(facts: Facts) -> Iterator[Finding]:
    """One finding for each norm that moves although it and the layer before it are frozen, and others are not."""
    for path, norm in facts.norms.items():
        # A copy that follows another network is SN307's.
        if facts.audit is not None and path in facts.audit.copies:
            continue
        if not norm.learns or norm.is_toggled or norm.trains_affine or norm.momentum == 0:
            continue
        frozen = _frozen_with(norm, facts)
        if not frozen:
            continue
        yield Finding(
            code="SN302",
            severity="warning",
            confidence="proved",
            where=path,
            message=(
                f"No parameter of this layer and of {frozen} is trained, but training normalises by the batch and "
                "moves the running statistics: what was frozen changes."
            ),
            evidence={
                "frozen with it": frozen,
                "momentum": "cumulative" if norm.momentum is None else norm.momentum,
                "frozen modules": len(facts.frozen_layers),
            },
            fix=Fix("Freeze the norm too: steadynorm.training.freeze_, or FrozenBatchNorm in its place."),
        )


def _frozen_with(norm: Norm, facts: Facts) -> str:
    """The frozen layer that feeds this norm, or the frozen block that it is part of; empty if there is none."""
    calls = [call for call in facts.calls if call.path == norm.path]
    producers = {call.producer for call in calls}
    if not calls:
        return ""
    if "" not in producers:
        return min(producers) if producers <= facts.frozen_layers else ""
    block = norm.path.rpartition(".")[0]
    layers = [p for p in facts.frozen_layers if p.startswith(f"{block}.") and p not in facts.norms]
    return block if block in facts.frozen_layers and layers else ""
