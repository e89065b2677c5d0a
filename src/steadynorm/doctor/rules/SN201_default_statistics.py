"""Running statistics of 0 and 1 in a trained model were never learned, or got lost.

Why: weights were trained against the statistics of batches, and evaluation divides by 1 instead. Buffers are lost where
a checkpoint keeps `parameters()` only or is loaded with `strict=False`, or where weights alone are averaged.
What it costs is measured by exchanging the statistics of the layer for those of the data. Several layers that lost
theirs are one fault: where they are felt together, each is at least a warning.

Bad:
    batches = [torch.randn(64, 1, 8, 8) for _ in range(4)]
    model = nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    nn.init.uniform_(model[1].bias)

Good:
    batches = [torch.randn(64, 1, 8, 8) for _ in range(4)]
    model = nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    nn.init.uniform_(model[1].bias)
    for x in batches * 20:
        model(x)

Source: https://github.com/cleinc/bts/issues/90
"""

from collections.abc import Iterator

from steadynorm.doctor import fixes
from steadynorm.doctor.evidence import as_evidence, judged
from steadynorm.doctor.finding import Finding, Fix
from steadynorm.probe import Facts, Part

needs: tuple[Part, ...] = ("drift",)


def check(facts: Facts) -> Iterator[Finding]:
    """One finding for each layer of a trained model that has what it was made with, and data that differs from it."""
    if facts.is_fresh or facts.was_trained_evaluating:
        return
    lost = [path for path, norm in facts.norms.items() if norm.state_fault == "default"]
    for path, drift in facts.drift.items():
        norm = facts.norms[path]
        step = facts.audit.norms.get(path) if facts.audit else None
        # A layer that training calls in evaluation mode never learned any: SN305.
        if step is not None and not step.trained:
            continue
        if (
            path in facts.averaged
            or path in facts.lost  # SN207
            or norm.state_fault != "default"
            or not drift.is_beyond_chance
            or drift.effect is None
        ):
            continue
        severity, words = judged(drift.effect, facts, lost)
        fix = Fix("Recalibrate the statistics from the data.", True, fixes.recalibrate_, (path,))
        if severity == "note":
            fix = Fix("Load the buffers of the checkpoint, or recalibrate: so far it changes next to nothing.")
        evidence: dict[str, float | int | str] = {"mean": 0.0, "variance": 1.0, "divergence": drift.divergence}
        if norm.batches_tracked is not None:
            evidence["batches tracked"] = norm.batches_tracked
        yield Finding(
            code="SN201",
            severity=severity,
            confidence="measured",
            where=path,
            message=(
                "The model is trained, but the running statistics of this layer are those that it was made with; "
                f"{words}."
            ),
            evidence={**evidence, **as_evidence(drift.effect)},
            fix=fix,
        )
