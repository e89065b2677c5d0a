"""The vectors of a spectral normalization must have length 1, or the weight is divided by the wrong number.

Why: evaluation divides the weight by the product of two stored vectors with it. Averaging models (EMA, SWA, federated)
averages the vectors too, and the average of unit vectors is shorter: lengths of 0.63 to 0.74 made an output 420 times
too large over eight layers. Training mends them step by step; an averaged copy is never trained. steadynorm's own takes
the lengths off in evaluation.

Bad:
    model = nn.Sequential(nn.Flatten(), nn.utils.parametrizations.spectral_norm(nn.Linear(64, 8)))
    model[1].parametrizations.weight[0]._u.mul_(0.7)
    batches = [torch.randn(16, 1, 8, 8)]

Good:
    model = nn.Sequential(nn.Flatten(), nn.utils.parametrizations.spectral_norm(nn.Linear(64, 8)))
    batches = [torch.randn(16, 1, 8, 8)]

Source: Miyato et al., Spectral Normalization for GANs, arXiv 1802.05957; https://github.com/NCAR/miles-credit/pull/394
"""

from collections.abc import Iterator

from steadynorm.doctor import fixes
from steadynorm.doctor.finding import Finding, Fix
from steadynorm.probe import Facts, Part
from steadynorm.probe.facts import HALF, UNIT_TOLERANCE

needs: tuple[Part, ...] = ("state",)

# What a cast rounds in each of the numbers, bfloat16's being the coarsest.
HALF_TOLERANCE = 1e-2


def check(facts: Facts) -> Iterator[Finding]:
    """One finding for each weight with such vectors."""
    for vectors in facts.spectral:
        tolerance = HALF_TOLERANCE if vectors.dtype in HALF else UNIT_TOLERANCE
        after = vectors.norm_after
        if after is None or (abs(vectors.u_norm - 1) <= tolerance and abs(vectors.v_norm - 1) <= tolerance):
            continue
        yield Finding(
            code="SN208",
            severity="error",
            confidence="proved",
            where=vectors.path,
            message=(
                f"Its stored vectors have lengths {vectors.u_norm:.3g} and {vectors.v_norm:.3g} instead of 1: "
                f"evaluation computes with a spectral norm of {after:.3g} where 1 is promised."
            ),
            evidence={
                "length of u": vectors.u_norm,
                "length of v": vectors.v_norm,
                "tolerance": tolerance,
                "spectral norm of the weight used": after,
            },
            fix=Fix(
                "Take the vectors anew from the weight, by power iteration.", True, fixes.iterate_, (vectors.path,)
            ),
        )
