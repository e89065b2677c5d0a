"""With momentum 0 the running statistics never move.

Why: training normalises by the batch and learns, and evaluation goes on with the statistics that were there before the
first step. The number is at times meant as a freeze; but a frozen layer normalises by its running statistics in
training too, and this one does not. Where the stored statistics are those of the data, it is a note.

Bad:
    model = nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8, momentum=0.0), nn.ReLU())
    batches = [torch.randn(16, 1, 8, 8)]

Good:
    model = nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8, momentum=None), nn.ReLU())
    batches = [torch.randn(16, 1, 8, 8)]

Source: https://github.com/Cadene/pretrained-models.pytorch/issues/5
"""

from collections.abc import Iterator

from steadynorm.doctor import fixes
from steadynorm.doctor.finding import Finding, Fix
from steadynorm.probe import Facts, Part

needs: tuple[Part, ...] = ("state",)


def check(facts: Facts) -> Iterator[Finding]:
    """One finding for each layer that normalises by the batch in training and remembers none."""
    for path, norm in facts.norms.items():
        if not norm.learns or norm.is_toggled or norm.momentum != 0:
            continue
        drift = facts.drift.get(path)
        fits = drift is not None and not drift.is_beyond_chance
        evidence: dict[str, float | int | str] = {"momentum": 0.0}
        if drift is not None:
            evidence["divergence from the data"] = drift.divergence
        state = "those that it was made with" if norm.has_initial_statistics else "what was loaded"
        yield Finding(
            code="SN110",
            severity="note" if fits else "error",
            confidence="proved",
            where=path,
            message=(
                "Training normalises by the batch and never moves the running statistics: evaluation uses "
                f"{state}{', which fit the data so far' if fits else ''}."
            ),
            evidence=evidence,
            fix=Fix(
                "Set momentum=0.1, or freeze the layer: steadynorm.FrozenBatchNorm2d.from_batch_norm.",
                apply=fixes.start_momenta_,
                target=(path,),
            ),
        )
