"""A norm whose statistics are those of one value, or of two, throws its input away.

Why: a single value is its own mean, so that the output is the bias whatever comes in; RMS norm keeps the sign. Two
values normalise to plus and minus one: only which of them is larger survives. It happens where a group norm with as
many groups as channels meets a map of one pixel, and where a layer norm is given the size of the wrong dimension.
PyTorch raises for instance norm and for a batch of one sample, and says nothing otherwise.

Bad:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.GroupNorm(8, 8), nn.ReLU(), nn.Linear(8, 4))
    batches = [torch.randn(16, 1, 8, 8)]

Good:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.GroupNorm(2, 8), nn.ReLU(), nn.Linear(8, 4))
    batches = [torch.randn(16, 1, 8, 8)]

Source: https://github.com/pytorch/pytorch/issues/45687
"""

import math
from collections.abc import Iterator

from steadynorm.doctor.finding import Finding, Fix
from steadynorm.probe import Facts, Part
from steadynorm.probe.facts import Norm

needs: tuple[Part, ...] = ("forward",)


def check(facts: Facts) -> Iterator[Finding]:
    """One finding for each norm within samples that one or two values, in some call, share a statistic of."""
    fewest: dict[str, int] = {}
    for call in facts.calls:
        norm = facts.norms.get(call.path)
        values = None if norm is None else _values(norm, call.input_shape)
        if values is not None:
            fewest[call.path] = min(values, fewest.get(call.path, values))
    for path, values in fewest.items():
        norm = facts.norms[path]
        # The root mean square of two values keeps their direction.
        if not 0 < values <= (1 if norm.kind == "rms" else 2):
            continue
        lost = "its output is the bias, whatever comes in"
        if values == 2:
            lost = "its output says which of the two is larger and nothing else"
        elif norm.kind == "rms":
            lost = "its output is the sign of the input and nothing else"
        yield Finding(
            code="SN103",
            severity="error" if values == 1 else "warning",
            confidence="proved",
            where=path,
            message=f"Each statistic of this layer is that of {values} value{'s' if values > 1 else ''}: {lost}.",
            evidence={"values per statistic": values},
            fix=Fix(
                "Let more channels share a statistic (fewer groups, the right normalized_shape), or drop the norm."
            ),
        )


def _values(norm: Norm, shape: tuple[int, ...]) -> int | None:
    """Values per statistic in one sample; None for norms over the batch."""
    if norm.group_size is None or norm.has_statistics or len(shape) < 2:
        return None
    if norm.kind in ("layer", "rms"):
        return norm.group_size
    # (C, L) is one sample without its batch dimension, which instance norms take.
    is_unbatched = norm.kind == "instance" and len(shape) == 2
    return norm.group_size * math.prod(shape[1:] if is_unbatched else shape[2:])
