"""InstanceNorm1d, InstanceNorm2d, InstanceNorm3d, and their lazy forms.

A batch normalization that takes the statistics of every sample on its own; settings, switches and what is remembered
are those of `layers/batch.py`.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from steadynorm.errors import DegenerateStatisticsError, InputError
from steadynorm.functional.instance import across_instances, normalize_instances, normalize_portably
from steadynorm.layers import checks
from steadynorm.layers.batch import BatchNorm, Guard, SingleValue
from steadynorm.layers.lazy import LazyBatchNorm
from steadynorm.layers.running import Running
from steadynorm.moments import Moments


class PerInstance(BatchNorm):
    """What instance normalizations do unlike batch normalizations, constructed at once or lazily."""

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Normalise, add, activate: activation(weight · (x − mean) / sqrt(var + eps) + bias + residual).

        Args:
            input: x (N, C, *), floating point; or (C, *), one sample, and then everything without N.
            residual: (N, C, *), added before the activation.
            mask: (N, *) bool, True where a value is valid. Padding enters no statistic, and its output and gradient
                are zero, whatever it holds.
            lengths: (N,) integers, instead of `mask`: how many positions of the last axis are valid, from its start.

        Returns: y in the shape, dtype and memory order of `input`.

        Raises:
            InputError: a tensor or setting that cannot be used.
            DegenerateStatisticsError: one position, normalised by its own statistics.
            NonFiniteStatisticsError: the statistics of a sample are not finite, with ``guard="raise"``.
        """
        if isinstance(input, torch.fx.Proxy) or input.dim() != self.ranks[0] - 1:
            return super().forward(input, residual, mask, lengths)
        alone = [None if t is None else t.unsqueeze(0) for t in (residual, mask, lengths)]
        return super().forward(input.unsqueeze(0), *alone).squeeze(0)

    def _by_batch(
        self, x: Tensor, running: Running | None, weight: Tensor | None, bias: Tensor | None, extras: dict[str, Any]
    ) -> tuple[Tensor, Moments]:
        if running is None and torch.compiler.is_exporting():
            y = normalize_portably(x, weight, bias, **extras)
            # Nobody remembers it; an empty tensor would be a node of the graph.
            return y, Moments(y, y, 0)
        y, mean, var = normalize_instances(x, weight, bias, **extras)
        if running is None:
            return y, Moments(mean, var, 0)
        return y, across_instances(x, mean, var, extras["mask"])

    def _decide(self, x: Tensor, has_running: bool) -> tuple[bool, bool]:
        if math.prod(x.shape[2:]) != 1 or not x.shape[0]:
            return super()._decide(x, has_running)
        by_running = not self.training if self.normalize_by is None else self.normalize_by == "running"
        if has_running and (by_running or self.single_value == "running"):
            return False, False
        raise DegenerateStatisticsError(
            f"{checks.name(self)} expected more than one position per channel, got shape {tuple(x.shape)}, whose"
            " variance is zero and whose output would be the bias: use larger inputs, or an identity here."
        )

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() != self.ranks[0]:
            expected = checks.SHAPES[self.ranks[0]]
            fitting = {3: "InstanceNorm1d", 4: "InstanceNorm2d", 5: "InstanceNorm3d"}.get(input.dim())
            advice = f"use {fitting} for {checks.SHAPES[input.dim()]}" if fitting else "reshape it"
            raise InputError(
                f"{checks.name(self)} expected {expected} or {expected.replace('N, ', '')}, got {tuple(input.shape)}:"
                f" {advice}."
            )
        is_counted = self.weight is not None or self.running_mean is not None
        checks.check_input(self, input, self.ranks, self.num_features if is_counted else None)


class InstanceNorm(PerInstance):
    """What the instance normalizations of every rank share; see `InstanceNorm2d`."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | None = None,
        guard: Guard = "skip",
        single_value: SingleValue = "error",
    ) -> None:
        super().__init__(
            num_features,
            eps,
            momentum,
            affine,
            track_running_stats,
            device,
            dtype,
            bias=bias,
            activation=activation,
            guard=guard,
            single_value=single_value,
        )


class InstanceNorm1d(InstanceNorm, nn.InstanceNorm1d):
    """`InstanceNorm2d` for (N, C, L) and (C, L)."""

    ranks = (3,)


class InstanceNorm2d(InstanceNorm, nn.InstanceNorm2d):
    """Instance normalization of (N, C, H, W) or (C, H, W), in place of `torch.nn.InstanceNorm2d`.

    y = activation(weight · (x − mean) / sqrt(var + eps) + bias + residual)

    Mean and biased variance are those of one channel of one sample. With `track_running_stats` evaluation uses running
    statistics instead, which move towards the average over the samples of a batch.

    Args:
        num_features: C; plays no part without weight, bias and running statistics.
        eps: added to the variance, in its unit; positive.
        momentum: weight of the new batch in the running statistics, in [0, 1]; None gives all batches the same.
        affine: whether there are weight and bias.
        track_running_stats: whether there are running statistics.
        device, dtype: of weight and bias. The running statistics are float32 at least, whatever the module is cast to.
        bias: whether there is a bias where there is a weight.
        activation: None or one of `steadynorm.functional.ACTIVATIONS`.
        guard: what a batch with statistics that are not finite does to the running ones; see `BatchNorm2d`.
        single_value: what one position per channel does in training: "error", or "running", the running statistics
            normalise and do not move.

    Source: Ulyanov, Vedaldi & Lempitsky, Instance Normalization (2016), eq. 4.
    """

    ranks = (4,)


class InstanceNorm3d(InstanceNorm, nn.InstanceNorm3d):
    """`InstanceNorm2d` for (N, C, D, H, W) and (C, D, H, W)."""

    ranks = (5,)


class LazyInstanceNorm1d(LazyBatchNorm, PerInstance, nn.LazyInstanceNorm1d):
    """`InstanceNorm1d` that takes num_features from its first input."""

    cls_to_become = InstanceNorm1d
    ranks = (3,)


class LazyInstanceNorm2d(LazyBatchNorm, PerInstance, nn.LazyInstanceNorm2d):
    """`InstanceNorm2d` that takes num_features from its first input."""

    cls_to_become = InstanceNorm2d
    ranks = (4,)


class LazyInstanceNorm3d(LazyBatchNorm, PerInstance, nn.LazyInstanceNorm3d):
    """`InstanceNorm3d` that takes num_features from its first input."""

    cls_to_become = InstanceNorm3d
    ranks = (5,)
