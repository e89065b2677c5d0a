"""The relatives over the batch as data: how each is made, and what a call of it brings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from steadynorm.layers import (
    BatchNorm1d,
    BatchNorm2d,
    BatchRenorm1d,
    BatchRenorm2d,
    DomainBatchNorm1d,
    DomainBatchNorm2d,
    FrozenBatchNorm1d,
    FrozenBatchNorm2d,
    GhostBatchNorm1d,
    GhostBatchNorm2d,
    StepBatchNorm1d,
)


@dataclass(frozen=True)
class Relative:
    """A layer for (N, C, L), `rows`, and one for (N, C, H, W), `images`; `extra` is what a call with x brings."""

    rows: Callable[..., nn.Module]
    images: Callable[..., nn.Module] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    extra: Callable[[Tensor], dict[str, Any]] = lambda x: {}
    is_moving: bool = True
    # Statistics that make the formula smooth in x; gradients treat some of it as constant elsewhere.
    settle: Callable[[nn.Module], Any] = lambda layer: None

    def make(self, kind: str = "rows", **options: Any) -> nn.Module:
        make = getattr(self, kind)
        return make(3, **self.options, **options)


def beyond_the_limits(layer: nn.Module) -> None:
    """Where r and d are at their limits whatever x is, so that they are constants to a finite difference too."""
    if layer.training:
        layer.running_mean.fill_(50)
        layer.running_var.fill_(0.01)


RELATIVES = {
    "debiased": Relative(BatchNorm1d, BatchNorm2d, {"debias": True}),
    "frozen": Relative(FrozenBatchNorm1d, FrozenBatchNorm2d, is_moving=False),
    "renorm": Relative(BatchRenorm1d, BatchRenorm2d, {"limits": (3.0, 5.0)}, settle=beyond_the_limits),
    "ghost": Relative(GhostBatchNorm1d, GhostBatchNorm2d, {"ghost_size": 4}),
    "domain": Relative(
        DomainBatchNorm1d,
        DomainBatchNorm2d,
        {"num_domains": 2},
        lambda x: {"domain": torch.tensor([0, 1, 0, 1, 1, 0, 1] * 3)[: len(x)]},
    ),
    "step": Relative(StepBatchNorm1d, None, {"steps": 3}, lambda x: {"step": 1}),
}
