"""One batch norm called on different data in turn learns the statistics of neither.

Why: in training each call is normalised by itself, in evaluation all by what the running average made of them in turn.
Real and made images through one critic, levels of a pyramid through one head, time steps through one cell: where the
calls differ, evaluation is another network. Calls on data of one kind, as in a siamese network, do no harm. Measured is
how far the statistics of each call are from those of all, and whether training and evaluation part for it.

Bad:
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.head = nn.BatchNorm1d(64), nn.Linear(64, 4)

        def forward(self, x):
            x = x.flatten(1)
            return self.head(self.norm(x)) + self.head(self.norm(3 * x + 2))

    model = Pair()
    batches = [torch.randn(64, 1, 8, 8) for _ in range(4)]

Good:
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.head = nn.BatchNorm1d(64), nn.Linear(64, 4)

        def forward(self, x):
            x = x.flatten(1)
            return self.head(self.norm(x)) + self.head(self.norm(x.flip(0)))

    model = Pair()
    batches = [torch.randn(64, 1, 8, 8) for _ in range(4)]

Source: Wu & Johnson, Rethinking "Batch" in BatchNorm, arXiv 2105.07576, section 5.2.
"""

from collections.abc import Iterator

from steadynorm.doctor.finding import Finding, Fix
from steadynorm.probe import Facts, Part

needs: tuple[Part, ...] = ("drift",)

# Between crops of two sizes, 0.025, and real and made images, 0.15.
WARNING = 0.1
# Share of the output's variance by which training and evaluation part, as in SN102.
MATERIAL_GAP = 0.10


def check(facts: Facts) -> Iterator[Finding]:
    """One finding for each norm whose calls are too different to share statistics."""
    for path, shared in facts.shared.items():
        if shared.divergence < shared.threshold:
            continue
        gap = facts.training_gap
        part = 0.0 if gap is None or facts.is_fresh else gap.relative_square
        is_felt = part >= MATERIAL_GAP
        evidence: dict[str, float | int | str] = {
            "calls in a pass": shared.calls,
            "divergence of a call from all": shared.divergence,
            "the same by chance": shared.null,
            "threshold": shared.threshold,
        }
        if gap is not None:
            evidence["training against evaluation, share of output variance"] = gap.relative_square
        felt = f"; training and evaluation part by {part:.0%} of the output's variance" if is_felt else ""
        yield Finding(
            code="SN106",
            severity="warning" if is_felt and shared.divergence >= WARNING else "note",
            confidence="measured",
            where=path,
            message=(
                f"The {shared.calls} calls of this layer in one pass are of different data: training normalises each "
                f"by itself, evaluation all by their mixture{felt}."
            ),
            evidence=evidence,
            fix=Fix(
                "Give each kind of data its own norm (steadynorm.DomainBatchNorm), or join the calls into one batch."
            ),
        )
