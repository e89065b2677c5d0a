"""Setting track_running_stats to False on a batch norm that has statistics does not switch them off.

Why: the attribute is read when the layer is made. Set later, training normalises by the batch and moves nothing, while
evaluation still uses the statistics from before: a backbone "frozen" so is trained as one model and evaluated as
another (accuracy 0.898 in training mode, 0.652 in evaluation, on the same data).

Bad:
    model = nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    model[1].track_running_stats = False
    batches = [torch.randn(16, 1, 8, 8)]

Good:
    model = nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), steadynorm.BatchNorm2d(8).freeze_(), nn.ReLU())
    batches = [torch.randn(16, 1, 8, 8)]

Source: https://github.com/Lightning-AI/pytorch-lightning/issues/15062
"""

from collections.abc import Iterator

from steadynorm.doctor import fixes
from steadynorm.doctor.evidence import as_evidence, in_words
from steadynorm.doctor.finding import Finding, Fix
from steadynorm.probe import Facts, Part

needs: tuple[Part, ...] = ("state",)


def check(facts: Facts) -> Iterator[Finding]:
    """One finding for each such layer; a warning where its statistics still fit the data."""
    for path, norm in facts.norms.items():
        if not norm.is_toggled:
            continue
        drift = facts.drift.get(path)
        fits = drift is not None and not drift.is_beyond_chance
        message = "Training uses the batch and leaves the running statistics as they are, evaluation uses them"
        evidence: dict[str, float | int | str] = {"track_running_stats": "False", "running_mean": "kept"}
        if drift is not None:
            evidence["divergence from the data"] = drift.divergence
            if drift.effect is not None:
                evidence |= as_evidence(drift.effect)
                message += f"; {in_words(drift.effect)}"
        yield Finding(
            code="SN205",
            severity="warning" if fits else "error",
            confidence="proved",
            where=path,
            message=f"{message}.",
            evidence=evidence,
            fix=Fix(
                "Set track_running_stats=True again. To freeze the layer use steadynorm.training.freeze_ or "
                "FrozenBatchNorm; to have no statistics set running_mean and running_var to None.",
                apply=fixes.track_,
                target=(path,),
            ),
        )
