"""Each forward in training mode moves the running statistics, also one that nobody learns from.

Why: a second pass for a penalty, a log, a warm-up or the closure of an optimizer counts as a batch. The average forgets
faster than its momentum says, and follows whatever the second pass was given. Two passes that are each learned from, as
in accumulation or in a critic of real and made samples, are no fault.

Bad:
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    batches = [torch.randn(16, 1, 8, 8)]

    def loss(output, batch):
        return (output - model(batch).detach()).square().mean()

Good:
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    batches = [torch.randn(16, 1, 8, 8)]

    def loss(output, batch):
        return output.square().mean()

Source: https://github.com/m2lines/Samudra/issues/572
"""

import os.path
from collections.abc import Iterator

from steadynorm.doctor.finding import Finding, Fix
from steadynorm.probe import Facts, Part
from steadynorm.probe.training_facts import NormStep

needs: tuple[Part, ...] = ("audit",)


def check(facts: Facts) -> Iterator[Finding]:
    """One finding for the whole model, or for the part of it that is called by itself."""
    audit = facts.audit
    if audit is None:
        return
    learned_from = max(audit.backwards, 1)
    moving = [norm for norm in audit.norms.values() if norm.updates]
    outside = [norm.path for norm in moving if norm.updates.get("outside", 0) or _is_asked_again(norm)]
    extra = audit.forwards - learned_from
    if not moving or (extra <= 0 and not outside):
        return
    where = "" if extra > 0 else os.path.commonpath([path.replace(".", "/") for path in outside]).replace("/", ".")
    what, most = "part" if where else "model", max(sum(norm.updates.values()) for norm in moving)
    said = (
        f"One training step calls this {what} more often in training mode than it learns from it: {most} "
        f"updates of the running statistics for {learned_from} backward pass{'es' if learned_from > 1 else ''}."
    )
    if extra <= 0 and any(map(_is_asked_again, moving)):
        said = (
            f"In one training step the optimizer asks this {what} for its loss more than once: {most} updates of the "
            "running statistics for one step."
        )
    yield Finding(
        code="SN304",
        severity="note",
        confidence="proved",
        where=where,
        message=said,
        evidence={
            "forwards of the model": audit.forwards,
            "backward passes": audit.backwards,
            "layers updated outside its forward": len(outside),
            "layers updated by the optimizer's closure": sum("optimizer" in norm.updates for norm in moving),
        },
        fix=Fix(
            "Make the extra pass with the statistics held still: in evaluation mode, or inside training.transaction."
        ),
    )


def _is_asked_again(norm: NormStep) -> bool:
    """Whether the optimizer's closure moves the statistics, and not for the only time in the step."""
    return bool(norm.updates.get("optimizer", 0)) and sum(norm.updates.values()) > 1
