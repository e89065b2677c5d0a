"""Evaluation mode that was set by hand lasts until the next `model.train()`.

Why: `train()` sets every module below it, so that a loop which calls it at each epoch takes
back the `eval()` of a frozen backbone: from then on it normalises by the batch and its statistics move, and nothing
says so. A `train()` that is overridden to keep it, or a layer that is frozen, holds.

Bad:
    backbone = nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())
    model = nn.Sequential(backbone.requires_grad_(False), nn.Linear(288, 4))
    backbone.eval()
    batches = [torch.randn(16, 1, 8, 8)]

Good:
    backbone = nn.Sequential(nn.Conv2d(1, 8, 3), steadynorm.BatchNorm2d(8).freeze_(), nn.ReLU(), nn.Flatten())
    model = nn.Sequential(backbone.requires_grad_(False), nn.Linear(288, 4))
    batches = [torch.randn(16, 1, 8, 8)]

Source: https://github.com/roytseng-tw/Detectron.pytorch/issues/104
"""

from collections.abc import Iterator

from steadynorm.doctor.finding import Finding, Fix
from steadynorm.probe import Facts, Part

needs: tuple[Part, ...] = ("state",)


def check(facts: Facts) -> Iterator[Finding]:
    """One finding for each norm in evaluation mode by hand, in a model that is in training mode."""
    for path, norm in facts.norms.items():
        if not norm.is_undone or not norm.has_statistics:
            continue
        # Frozen parameters say that the layer was to stay as it is; with others the mode may be set at every step.
        is_meant = norm.trains_affine is False
        yield Finding(
            code="SN306",
            severity="warning" if is_meant else "note",
            confidence="proved",
            where=path,
            message=(
                "This layer is in evaluation mode in a model that trains, and the next model.train() takes it out: "
                "from then on it normalises by the batch, and its statistics move."
            ),
            evidence={"after model.train()": "training mode", "its parameters": "frozen" if is_meant else "trained"},
            fix=Fix("Freeze the layer so that it lasts: steadynorm.training.freeze_, or FrozenBatchNorm in its place."),
        )
