"""Which axis of its input a batch norm should have been given as channels.

Channels differ from one another, in mean and in spread, more than places or times do. The share of variance that an
axis explains says how much its entries differ in mean, the variance of the logarithms of their variances how much in
spread. Places next to each other resemble each other, channels next to each other do not.
"""

import torch
from torch import Tensor, nn

from steadynorm import models
from steadynorm.probe.training_facts import Axes

# Fewer entries of an axis than this say nothing about it.
FEWEST_ENTRIES = 4
# More values than this, of few samples, say nothing new and cost as much as the layers themselves.
MOST_VALUES = 2**20


def axes(module: nn.Module, x: Tensor) -> Axes | None:
    """How much the entries of axis 1 differ, and of the last one; None where it is no batch norm of such input."""
    if models.norm_kind(module) not in ("batch", "sync") or x.dim() < 3 or not x.is_floating_point():
        return None
    if min(x.shape[1], x.shape[-1]) < FEWEST_ENTRIES or x.shape[0] < FEWEST_ENTRIES:
        return None
    x = x.detach()[: max(FEWEST_ENTRIES, MOST_VALUES // max(x[0].numel(), 1))].double()
    declared, last = (_share(x, axis) for axis in (1, x.dim() - 1))
    return Axes(*declared, *last)


def _share(x: Tensor, axis: int) -> tuple[float, float, float]:
    """Share of the variance between the entries of an axis, variance of their log variances, likeness of neighbours."""
    rows = x.transpose(0, axis).flatten(1)
    var, mean = torch.var_mean(rows, 1, correction=0)
    total = x.var(correction=0).clamp(min=1e-30)
    lives = var > 1e-12 * total
    spread = float(var[lives].log().var(correction=0)) if int(lives.sum()) > 1 else 0.0
    standard = (rows - mean[:, None]) / var.clamp(min=1e-30).sqrt()[:, None]
    neighbours = (standard[1:] * standard[:-1]).mean(1)[lives[1:] & lives[:-1]]
    likeness = float(neighbours.mean()) if neighbours.numel() else 0.0
    return float(mean.var(correction=0) / total), spread, likeness
