"""Weights that are trained in evaluation mode are trained without the normalization.

Why: without `model.train()`, or with an `eval()` that nothing takes back, batch norm divides by the running statistics
that it was made with, 1, and never learns others: what is trained is a network without normalization (0.326 of digits
against 0.99). Fine-tuning with the statistics of a pretrained network held still is usual and is no fault. The state
tells it: trained weights, statistics that never moved, and a loss that rises when they are brought up to date.

Bad:
    class Stays(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())

        def forward(self, x):
            return self.body.eval()(x)

    model = Stays()
    batches = [torch.randn(16, 1, 8, 8)]

Good:
    model = nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    batches = [torch.randn(16, 1, 8, 8)]

Source: https://github.com/backseason/PoolNet/issues/30
"""

from collections.abc import Iterator

from steadynorm.doctor.evidence import as_evidence, in_words
from steadynorm.doctor.finding import Finding, Fix
from steadynorm.probe import Facts, Part

needs: tuple[Part, ...] = ("audit", "drift")


def check(facts: Facts) -> Iterator[Finding]:
    """One finding for each norm that evaluates while it is trained; or for the model whose state shows that it did."""
    is_seen = False
    for path, step in (facts.audit.norms if facts.audit else {}).items():
        norm = facts.norms[path]
        if step.trained or not norm.learns or not norm.trains_affine:
            continue
        is_seen = True
        yield Finding(
            code="SN305",
            severity="error" if norm.has_initial_statistics else "note",
            confidence="proved",
            where=path,
            message="A training step calls this layer in evaluation mode: its statistics are never learned.",
            evidence={"calls in the step": sum(step.calls.values()), "batches tracked": norm.batches_tracked or 0},
            fix=Fix("Call model.train() before training, and eval() nowhere in a forward."),
        )
    if not is_seen:
        yield from _from_state(facts)


def _from_state(facts: Facts) -> Iterator[Finding]:
    effect = facts.drift_together
    if effect is None or not facts.was_trained_evaluating:
        return
    yield Finding(
        code="SN305",
        severity="warning",
        confidence="measured",
        where="",
        message=(
            "The weights are trained, no batch norm has ever seen a batch, and the model fits statistics of 0 and 1: "
            f"it was trained in evaluation mode; {in_words(effect)}."
        ),
        evidence={
            "layers": sum(norm.learns for norm in facts.norms.values()),
            "batches tracked": 0,
            **as_evidence(effect),
        },
        fix=Fix("Train again with model.train(): recalibration alone would harm these weights."),
    )
