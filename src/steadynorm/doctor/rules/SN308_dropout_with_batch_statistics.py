"""Dropout at inference is asked for by the dropout layers, not by `model.train()`.

Why: sampling with dropout (MC dropout) wants the dropout layers in training mode. Where the whole model is put there,
batch norm normalises by the batch of the moment: the answer depends on the other samples, a batch of one raises or is
all bias, and each call moves the running statistics. Seen where `eval()` leaves both in training mode.

Bad:
    class Sampling(nn.Sequential):
        def train(self, mode=True):
            return super().train(True)

    model = Sampling(nn.Flatten(), nn.Linear(64, 8, bias=False), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 4))
    batches = [torch.randn(16, 1, 8, 8)]

Good:
    class Sampling(nn.Sequential):
        def train(self, mode=True):
            super().train(mode)
            self[3].train()
            return self

    model = Sampling(nn.Flatten(), nn.Linear(64, 8, bias=False), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 4))
    batches = [torch.randn(16, 1, 8, 8)]

Source: Gal & Ghahramani, Dropout as a Bayesian Approximation, arXiv 1506.02142;
https://github.com/lightning-uq-box/lightning-uq-box/pull/173
"""

from collections.abc import Iterator

from steadynorm.doctor.finding import Finding, Fix
from steadynorm.probe import Facts, Part

needs: tuple[Part, ...] = ("state",)


def check(facts: Facts) -> Iterator[Finding]:
    """One finding for each batch norm that eval() leaves in training mode beside dropout."""
    if not facts.dropping:
        return
    for path, norm in facts.norms.items():
        if not norm.trains_in_evaluation:
            continue
        yield Finding(
            code="SN308",
            severity="error",
            confidence="proved",
            where=path,
            message=(
                "eval() leaves dropout and this layer in training mode: with dropout sampled at inference, answers "
                "depend on the other samples of the batch as well, and each one moves the running statistics."
            ),
            evidence={"dropout layers in training mode": len(facts.dropping), "first": facts.dropping[0]},
            fix=Fix("Put the dropout layers alone into training mode after model.eval()."),
        )
