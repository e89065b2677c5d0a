"""In evaluation mode, what a model says of a sample must not depend on the samples next to it.

Why: the same image gets one answer alone and another in a batch, sorted data another than shuffled, and the metrics
depend on the batch size. Behind it is a norm left in training mode, F.batch_norm(..., training=True), a mean or a
softmax over the wrong axis, or a reshape that mixes samples. Found by exchanging the batch mates of one sample at a
fixed batch shape and looking at every module: the output alone misses half of the leaks of an untrained network.

Bad:
    class Centre(nn.Module):
        def forward(self, x):
            return x - x.mean(0)

    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), Centre())
    batches = [torch.randn(16, 1, 8, 8)]

Good:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.LayerNorm(8))
    batches = [torch.randn(16, 1, 8, 8)]

Source: Ben Braiek & Khomh, Testing Feedforward Neural Networks Training Programs, arXiv 2204.00694 (TheDeepChecker).
"""

from collections.abc import Iterator

from steadynorm.doctor.evidence import as_evidence
from steadynorm.doctor.finding import Finding, Fix
from steadynorm.probe import Facts, Part
from steadynorm.probe.facts import Leak

needs: tuple[Part, ...] = ("isolation",)

# Relative change of the model's output below which the leak is not yet felt.
VISIBLE_CHANGE = 1e-5


def check(facts: Facts) -> Iterator[Finding]:
    """One finding for each innermost module in which samples meet."""
    for leak in facts.leaks:
        is_visible = leak.output_change > VISIBLE_CHANGE
        evidence: dict[str, float | int | str] = {
            "module": leak.class_name,
            "change of its output for the sample": leak.change,
            "change of the model's output for it": leak.output_change,
            "second witness, NaN": "agrees" if leak.is_confirmed else "none",
        }
        if leak.recalibrated:
            evidence["stale layers, recalibrated for this"] = leak.recalibrated
        consequence = "later layers hide it so far"
        if is_visible:
            consequence = f"it moves the model's output by up to {leak.output_change:.1%}"
        if leak.effect is not None and is_visible:
            evidence |= as_evidence(leak.effect, "as the batches come", "with other batch mates")
            if leak.effect.changed:
                consequence = f"{leak.effect.changed:.0%} of the predictions change with other batch mates"
        yield Finding(
            code="SN801",
            severity="error" if is_visible else "warning",
            confidence="proved" if leak.is_confirmed else "measured",
            where=leak.path,
            message=(
                f"In evaluation mode the output of this {leak.class_name} for one sample depends on the others in the "
                f"batch; {consequence}."
            ),
            evidence=evidence,
            fix=Fix(_advice(leak, facts)),
        )


def _advice(leak: Leak, facts: Facts) -> str:
    norm = facts.norms.get(leak.path)
    if norm is not None and norm.trains_in_evaluation:
        return "eval() leaves this layer in training mode: mend the train() that overrides PyTorch's."
    if norm is not None and not norm.has_statistics:
        return "The layer keeps no running statistics: construct it with track_running_stats=True and recalibrate."
    if leak.class_name.startswith("DynamicQuantized"):
        return "It rounds all samples of a batch by one scale, taken from all of them: quantise with static scales."
    return (
        "Look in its forward for F.batch_norm(..., training=True), for means, maxima or a softmax over the axis of the "
        "samples, and for reshapes that move values between samples."
    )
