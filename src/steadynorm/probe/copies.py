"""Copies of a network whose parameters follow it and whose running statistics do not: targets, teachers, averages."""

from collections.abc import Iterable

import torch
from torch import nn

from steadynorm import models
from steadynorm.probe.drift import divergence
from steadynorm.probe.facts import MATERIAL_DIVERGENCE
from steadynorm.probe.state import has_initial_affine
from steadynorm.probe.training_facts import StaleCopy

# Distance of the parameters from those of the original, relative to their length. Of two networks that were drawn
# apart it is about 1.4, of one that follows by a moving average a few hundredths.
NEAR = 0.5


def stale(copy: nn.Module, originals: Iterable[nn.Module]) -> dict[str, StaleCopy]:
    """By path in `copy`, the norms whose statistics are not those of the original's; empty where it is no copy.

    A copy that lags has statistics that lag, rightly. So they count only where they were never learned and the
    original's were, or where all parameters are the original's, bit for bit. A copy of the start, whose norms are as
    they were made, follows nothing.
    """
    found: dict[str, StaleCopy] = {}
    has_moved = not all(map(has_initial_affine, models.norms(copy).values()))
    for original in originals:
        distance = _distance(copy, original)
        if distance is None or distance >= NEAR:
            continue
        theirs = models.norms(original)
        for path, layer in models.norms(copy).items():
            twin = theirs.get(path)
            if twin is None or not all(map(models.has_running_statistics, (layer, twin))):
                continue
            mine, other = models.running_statistics(layer), models.running_statistics(twin)
            apart = divergence(mine, other, float(getattr(layer, "eps", None) or 0.0))
            is_initial = bool((mine[0] == 0).all() and (mine[1] == 1).all())
            if apart > MATERIAL_DIVERGENCE and ((is_initial and has_moved) or distance == 0):
                found[path] = StaleCopy(apart, is_initial)
    return found


@torch.no_grad()
def _distance(copy: nn.Module, original: nn.Module) -> float | None:
    """Of all parameters, relative to the length of the original's; None where it has others."""
    mine, theirs = dict(copy.named_parameters()), dict(original.named_parameters())
    if (
        not mine
        or copy is original
        or [(n, p.shape) for n, p in mine.items()] != [(n, p.shape) for n, p in theirs.items()]
    ):
        return None
    if any(parameter is theirs[name] for name, parameter in mine.items()):
        return None  # they share it
    square = sum(float((p.double() - theirs[name].to(p).double()).square().sum()) for name, p in mine.items())
    length = sum(float(p.double().square().sum()) for p in theirs.values())
    return (square / length) ** 0.5 if length else None
