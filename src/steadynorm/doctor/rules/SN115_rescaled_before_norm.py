"""Weight or spectral normalization right before a batch norm is divided out again.

Why: a batch norm does not change when its input is multiplied by a number per channel. Weight normalization learns just
that number, and gets no gradient; spectral normalization divides by one, which costs a power iteration at every step
and bounds nothing. Found by following the tensor from the layer into the norm.

Bad:
    conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 8, 3))
    model = nn.Sequential(conv, nn.BatchNorm2d(8), nn.ReLU())
    batches = [torch.randn(16, 1, 8, 8)]

Good:
    conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 8, 3))
    model = nn.Sequential(conv, nn.ReLU())
    batches = [torch.randn(16, 1, 8, 8)]

Source: Salimans & Kingma, Weight Normalization, arXiv 1602.07868, section 3.
"""

from collections.abc import Iterator

from steadynorm.doctor.finding import Finding, Fix
from steadynorm.probe import Facts, Part

needs: tuple[Part, ...] = ("forward",)


def check(facts: Facts) -> Iterator[Finding]:
    """One finding for each such layer whose every output goes into a batch norm that learns."""
    into: dict[str, set[str]] = {}
    made: dict[str, int] = {}
    for call in facts.calls:
        made[call.path] = made.get(call.path, 0) + 1
        norm = facts.norms.get(call.path)
        if norm is not None and norm.learns and call.producer in facts.rescaled:
            into.setdefault(call.producer, set()).add(call.path)
    for path, norms in into.items():
        if len(norms) != 1 or made.get(path) != made.get(min(norms)):
            continue
        yield Finding(
            code="SN115",
            severity="note",
            confidence="proved",
            where=path,
            message=f"The {facts.rescaled[path]} of this layer is divided out by {min(norms)} right behind it.",
            evidence={"norm": min(norms), "normalization of the weight": facts.rescaled[path]},
            fix=Fix("Take the normalization of the weight away: steadynorm.make_plain keeps what it computes."),
        )
