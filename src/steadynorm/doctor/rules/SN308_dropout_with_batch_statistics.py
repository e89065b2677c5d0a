"""Dropout at inference is asked for by the dropout layers, not by `model.train()`.

Why: sampling with dropout (MC dropout) wants the dropout layers in training mode. Where the whole model is put there,
batch norm normalises by the batch of the moment: the answer depends on the other samples, a batch of one raises or is
all bias, and each call moves the running statistics. Seen where `eval()` leaves both in training mode, and where a
forward in evaluation mode puts them there.

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

needs: tuple[Part, ...] = ("state", "forward")


def check(facts: Facts) -> Iterator[Finding]:
    """One finding for each batch norm that is in training mode, beside dropout, when the model is evaluated."""
    dropping = (*facts.dropping, *(call.path for call in facts.calls if call.drops and call.path not in facts.dropping))
    if not dropping:
        return
    trained = {call.path for call in facts.calls if call.is_training}
    for path, norm in facts.norms.items():
        by_forward = norm.learns and path in trained and not norm.trains_in_evaluation
        if not norm.trains_in_evaluation and not by_forward:
            continue
        who = "The forward puts" if by_forward else "eval() leaves"
        where = "into training mode, also in evaluation" if by_forward else "in training mode"
        yield Finding(
            code="SN308",
            severity="error",
            confidence="proved",
            where=path,
            message=(
                f"{who} dropout and this layer {where}: with dropout sampled at inference, answers depend on the other "
                "samples of the batch as well, and each one moves the running statistics."
            ),
            evidence={"dropout layers in training mode": len(set(dropping)), "first": dropping[0]},
            fix=Fix("Put the dropout layers alone into training mode after model.eval()."),
        )
