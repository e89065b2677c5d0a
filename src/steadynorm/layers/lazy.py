"""Batch normalizations that take num_features from their first input, and then become their plain forms."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _LazyNormBase

from steadynorm.layers import checks
from steadynorm.layers.batch import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d, Guard, SingleValue


class LazyBatchNorm(_LazyNormBase, BatchNorm):
    """What the lazy forms share: num_features is that of the first input."""

    def __init__(
        self,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | None = None,
        guard: Guard = "skip",
        single_value: SingleValue = "error",
        debias: bool = False,
    ) -> None:
        super().__init__(eps, momentum, affine, track_running_stats, device, dtype)
        self._configure(bias, activation, guard, single_value, debias)

    def initialize_parameters(self, input: Tensor, *args: Any, **kwargs: Any) -> None:
        """Take num_features from `input` (N, C, *); what else the call brings plays no part."""
        checks.check_input(self, input, self.ranks, self.num_features or None)
        super().initialize_parameters(input)
        # torch.nn leaves it at 0 where there is nothing to make, or where a state_dict has made it.
        self.num_features = input.shape[1]


class LazyBatchNorm1d(LazyBatchNorm, nn.LazyBatchNorm1d):
    """`BatchNorm1d` that takes num_features from its first input."""

    cls_to_become = BatchNorm1d
    ranks = (2, 3)


class LazyBatchNorm2d(LazyBatchNorm, nn.LazyBatchNorm2d):
    """`BatchNorm2d` that takes num_features from its first input."""

    cls_to_become = BatchNorm2d
    ranks = (4,)


class LazyBatchNorm3d(LazyBatchNorm, nn.LazyBatchNorm3d):
    """`BatchNorm3d` that takes num_features from its first input."""

    cls_to_become = BatchNorm3d
    ranks = (5,)
