"""The vectors of a spectral normalization must be those of its weight, or the weight is divided by the wrong number.

Why: evaluation divides the weight by the product of two stored vectors with it. Averaging models (EMA, SWA, federated)
averages the vectors too, and the average of unit vectors is shorter: lengths of 0.63 to 0.74 made an output 420 times
too large over eight layers. Vectors of length 1 that point elsewhere do the same: those of another checkpoint, or of a
start that never trained. Training mends them step by step; an averaged copy is never trained. steadynorm's own takes
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
# Spectral norm of the weight used from which on the vectors are another weight's. One power iteration a step lags
# behind the weights: 8 trainings of digits (both of torch's; SGD, and Adam at up to 0.01) read 1.00 to 1.50 on the way,
# new layers of 8 shapes up to 1.04. Vectors that were not loaded read 30 and 45.
OTHER_WEIGHT = 2.0


def check(facts: Facts) -> Iterator[Finding]:
    """One finding for each weight whose vectors have another length, or point elsewhere."""
    for vectors in facts.spectral:
        tolerance = HALF_TOLERANCE if vectors.dtype in HALF else UNIT_TOLERANCE
        after = vectors.norm_after
        evidence: dict[str, float | int | str] = {"length of u": vectors.u_norm, "length of v": vectors.v_norm}
        if not (abs(vectors.u_norm - 1) <= tolerance and abs(vectors.v_norm - 1) <= tolerance):
            evidence["tolerance"] = tolerance
            what = f"Its stored vectors have lengths {vectors.u_norm:.3g} and {vectors.v_norm:.3g} instead of 1"
        elif after >= OTHER_WEIGHT and not vectors.is_fresh:
            evidence["threshold"] = OTHER_WEIGHT
            what = "Its stored vectors are not those of this weight"
        else:
            continue
        yield Finding(
            code="SN208",
            severity="error",
            confidence="proved",
            where=vectors.path,
            message=f"{what}: evaluation computes with a spectral norm of {after:.3g} where 1 is promised.",
            evidence={**evidence, "spectral norm of the weight used": after},
            fix=Fix(
                "Take the vectors anew from the weight, by power iteration.", True, fixes.iterate_, (vectors.path,)
            ),
        )
