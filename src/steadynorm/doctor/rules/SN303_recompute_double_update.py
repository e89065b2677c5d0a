"""Activation checkpointing runs the forward twice, and each run moves the running statistics.

Why: what is made anew in the backward pass goes through the batch norm again, in training mode, with the same batch.
The average then forgets twice as fast: its noise rises by the square root of (1 - (1 - m)²) / (1 - m)² over that of m,
1.45 times measured at m = 0.1. Accuracy on digits did not change, at 4 samples a batch and at 16; it matters where
statistics are noisy already. Seen by watching which calls are made while gradients are computed.

Bad:
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.body = nn.Conv2d(1, 8, 3), nn.Sequential(nn.BatchNorm2d(8), nn.ReLU())

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.body, self.stem(x), use_reentrant=False)

    model = Checkpointed()
    batches = [torch.randn(16, 1, 8, 8)]

Good:
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    batches = [torch.randn(16, 1, 8, 8)]

Source: https://github.com/pytorch/pytorch/issues/96136
"""

from collections.abc import Iterator
from statistics import mode

from steadynorm.doctor.finding import Finding, Fix
from steadynorm.probe import Facts, Part

needs: tuple[Part, ...] = ("audit",)

# Independent values behind a statistic below which the running ones are noisy before they are made noisier.
FEW_VALUES = 16


def check(facts: Facts) -> Iterator[Finding]:
    """One finding for each norm that the backward pass updates."""
    if facts.audit is None:
        return
    size = mode(facts.train_batches.sizes) if facts.train_batches and facts.train_batches.sizes else None
    for path, norm in facts.audit.norms.items():
        again = norm.updates.get("backward", 0)
        if not again:
            continue
        evidence: dict[str, float | int | str] = {
            "updates in the forward pass": norm.updates.get("forward", 0),
            "updates in the backward pass": again,
        }
        values, is_few = facts.values.get(path), False
        if values is not None and values.independent_per_sample and size:
            evidence["independent values"] = values.independent_per_sample * size
            is_few = values.independent_per_sample * size < FEW_VALUES
        momentum = facts.norms[path].momentum
        advice = "Let the layer skip the second update."
        if momentum:
            advice = f"Set its momentum to {1 - (1 - momentum) ** 0.5:.3g}, which forgets as fast in two updates."
        yield Finding(
            code="SN303",
            severity="warning" if is_few else "note",
            confidence="proved",
            where=path,
            message="Each training step updates its running statistics again in the backward pass, by recomputation.",
            evidence=evidence,
            fix=Fix(advice),
        )
