"""A norm's weight and bias that no group of the optimizer holds are never trained.

Why: groups are often made by the type or the name of a layer, and what fits none is left out without a word; or a layer
was replaced after the optimizer was made, which goes on with the old one's parameters. Either the layers around it
train; or all of a new head is left out, layers before it train, and the optimizer holds parameters that the model no
longer has. A head that is trained alone, with nothing of the rest in the optimizer, is no fault.

Bad:
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    batches = [torch.randn(16, 1, 8, 8)]

Good:
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = [torch.randn(16, 1, 8, 8)]

Source: https://discuss.pytorch.org/t/84911
"""

from collections.abc import Iterator

from steadynorm.doctor.finding import Finding, Fix
from steadynorm.probe import Facts, Part

needs: tuple[Part, ...] = ("state", "optimizer", "forward")


def check(facts: Facts) -> Iterator[Finding]:
    """One finding for each norm with trainable parameters that are in no group, among others that are."""
    held = facts.held
    if held is None or not held.names:
        return
    producers: dict[str, set[str]] = {}
    for call in facts.calls:
        producers.setdefault(call.path, set()).add(call.producer)
    for path, norm in facts.norms.items():
        own = {name for name in held.trainable if name.rpartition(".")[0] == path}
        left_out = own - held.names
        if not norm.trains_affine or not left_out:
            continue
        neighbours = _neighbours(path, producers.get(path, set()) - {""}, facts) & held.names
        if not neighbours and held.foreign:
            neighbours = _before(path, facts) & held.names
        if not neighbours:
            continue
        yield Finding(
            code="SN702",
            severity="error",
            confidence="proved",
            where=path,
            message=(
                f"{' and '.join(sorted(name.rpartition('.')[2] for name in left_out))} of this layer take a gradient "
                f"and are in no group of the optimizer, while {min(neighbours)} is trained: they stay as they are."
            ),
            evidence={
                "parameters left out": len(left_out),
                "parameters of the optimizer": len(held.names),
                "parameters of the optimizer that the model does not have": held.foreign,
            },
            fix=Fix("Add them to a group; make the optimizer after the last layer was replaced."),
        )


def _neighbours(path: str, feeding: set[str], facts: Facts) -> set[str]:
    """Parameters of the layers that feed a norm, else of the one that is defined before it, else behind it."""
    assert facts.held is not None
    names = facts.held.trainable
    if feeding:
        return {name for name in names if name.rpartition(".")[0] in feeding}
    place = next(i for i, name in enumerate(names) if name.rpartition(".")[0] == path)
    others = [(i, name) for i, name in enumerate(names) if name.rpartition(".")[0] not in facts.norms]
    return {name for i, name in [*[o for o in others if o[0] < place][-1:], *[o for o in others if o[0] > place]][:1]}


def _before(path: str, facts: Facts) -> set[str]:
    """Parameters of the layers whose calls end before a norm's first one."""
    assert facts.held is not None
    called = [call.path for call in facts.calls]
    earlier = set(called[: called.index(path)]) if path in called else set()
    return {name for name in facts.held.trainable if name.rpartition(".")[0] in earlier}
