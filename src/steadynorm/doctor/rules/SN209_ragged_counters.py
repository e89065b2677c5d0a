"""Norms of one network that have seen different numbers of batches have not been trained together.

Why: each forward in training mode counts one batch in every batch norm that it reaches. Counters that differ by more
than the number of calls in a pass tell of stages that were frozen for a while, of branches that are used at times, of a
checkpoint put together from two. Often it is meant; it says where to look when statistics of some layers are stale.

Bad:
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    batches = [torch.randn(16, 1, 8, 8)]
    model[1].num_batches_tracked.fill_(500)
    model[4].num_batches_tracked.fill_(20)

Good:
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    batches = [torch.randn(16, 1, 8, 8)]
    model[1].num_batches_tracked.fill_(500)
    model[4].num_batches_tracked.fill_(500)

Source: none; it is what the counters are for.
"""

from collections import Counter
from collections.abc import Iterator

from steadynorm.doctor.finding import Finding, Fix
from steadynorm.probe import Facts, Part

needs: tuple[Part, ...] = ("forward",)
is_optional = True


def check(facts: Facts) -> Iterator[Finding]:
    """One finding for each norm that counted differently from most."""
    calls = Counter(call.path for call in facts.calls)
    passes = {
        path: (norm.batches_tracked or 0) / calls[path]
        for path, norm in facts.norms.items()
        if norm.has_statistics and norm.batches_tracked is not None and calls[path]
    }
    if not passes:
        return
    usual, _ = Counter(passes.values()).most_common(1)[0]
    for path, count in passes.items():
        if count == usual:
            continue
        yield Finding(
            code="SN209",
            severity="note",
            confidence="proved",
            where=path,
            message=f"This layer has seen {count:g} batches where most have seen {usual:g}.",
            evidence={"batches tracked": facts.norms[path].batches_tracked or 0, "calls in a pass": calls[path]},
            fix=Fix("None needed if the layer was frozen or skipped on purpose."),
        )
