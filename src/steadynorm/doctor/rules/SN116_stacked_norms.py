"""A norm right behind a norm repeats it.

Why: the second is given what the first has just centred and scaled: it undoes the weight and the bias of the first and
costs a pass over memory. It is what is left when a block that ends with a norm is followed by one that begins with one.
Norms that are joined by an addition or an activation are not right behind each other. Found by following the tensor.

Bad:
    model = nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.ReLU())
    batches = [torch.randn(16, 1, 8, 8)]

Good:
    model = nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.BatchNorm2d(8))
    batches = [torch.randn(16, 1, 8, 8)]

Source: Ioffe & Szegedy, Batch Normalization, arXiv 1502.03167, section 3.
"""

from collections.abc import Iterator

from steadynorm.doctor.finding import Finding, Fix
from steadynorm.probe import Facts, Part

needs: tuple[Part, ...] = ("forward",)


def check(facts: Facts) -> Iterator[Finding]:
    """One finding for each norm whose every input is the untouched output of another."""
    producers: dict[str, set[str]] = {}
    for call in facts.calls:
        if call.path in facts.norms:
            producers.setdefault(call.path, set()).add(call.producer)
    for path, makers in producers.items():
        first = min(makers)
        if len(makers) > 1 or first not in facts.norms or first == path:
            continue
        kinds = facts.norms[first].kind, facts.norms[path].kind
        yield Finding(
            code="SN116",
            severity="note",
            confidence="proved",
            where=path,
            message=f"Its input is the output of {first}, untouched: one norm of the two does the work.",
            evidence={"first": f"{first} ({kinds[0]})", "second": f"{path} ({kinds[1]})"},
            fix=Fix("Drop one of the two, the first if the second has the weight and bias that were trained."),
        )
