"""Instance normalization: statistics of one channel of one sample."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from steadynorm.errors import InputError
from steadynorm.functional import shapes
from steadynorm.functional.batch import normalize_running, update_running_
from steadynorm.functional.group import finish, within_groups
from steadynorm.moments import Moments


def normalize_instances(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float,
    residual: Tensor | None = None,
    activation: str | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`instance_norm` by the statistics of `x`, without its checks.

    Returns: y (N, C, *), and mean and biased variance (N, C), detached.
    """
    extras: dict[str, Any] = {"residual": residual, "activation": activation, "mask": mask}
    y, mean, var = within_groups(x, x.shape[1], weight, bias, eps=eps, **extras)
    return y, mean.reshape(x.shape[:2]), var.reshape(x.shape[:2])


def normalize_portably(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float,
    residual: Tensor | None = None,
    activation: str | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """y of `normalize_instances` by the operator that converters know, where nothing is masked."""
    if mask is not None:
        options = {"eps": eps, "residual": residual, "activation": activation, "mask": mask}
        return normalize_instances(x, weight, bias, **options)[0]  # type: ignore[arg-type]
    return finish(F.instance_norm(x, None, None, weight, bias, True, 0.0, eps), residual, activation)


def across_instances(x: Tensor, mean: Tensor, var: Tensor, mask: Tensor | None) -> Moments:
    """What running statistics move towards: the average over samples, each once, whatever its length.

    Args:
        x: (N, C, *), for its shape.
        mean, var: (N, C), biased.
        mask: (N, *); a sample with fewer than two valid values does not enter.

    Returns: Moments (C,), whose unbiased variance is the average of the unbiased variances.
    """
    if mask is None:
        return Moments(mean.mean(0), var.mean(0), math.prod(x.shape[2:]) if x.shape[0] else 0)
    counts = mask.flatten(1).sum(1, keepdim=True)
    enters = counts > 1
    samples = enters.sum().clamp(min=1)
    unbiased = torch.where(enters, Moments(mean, var, counts).unbiased_var, 0).sum(0) / samples
    # Samples of different lengths have no count in common: the one that gives this unbiased variance back.
    count = torch.where(enters, counts, 0).sum()
    share = (count - 1).clamp(min=0).to(var.dtype) / count.clamp(min=1)
    return Moments(torch.where(enters, mean, 0).sum(0) / samples, unbiased * share, count)


def instance_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
    mask: Tensor | None = None,
    guard: bool = True,
) -> Tensor:
    """Instance normalization with the signature of `torch.nn.functional.instance_norm`, and what it lacks.

    y = activation(weight · (x − mean) / sqrt(var + eps) + bias + residual)

    Args:
        x: (N, C, *), floating point, any memory order; channels-last stays channels-last.
        running_mean, running_var: (C,), moved in place where the statistics of `x` are used, used where they are not.
        weight, bias: (C,) or None.
        use_input_stats: whether each sample is normalised by its own statistics, or all by the running ones.
        momentum: weight of the new batch in the running statistics, in [0, 1].
        eps: added to the variance, in its unit.
        residual: (N, C, *), added before the activation.
        activation: None or one of `ACTIVATIONS`.
        mask: (N, *) bool, True where a value is valid. Padding enters no statistic; its output and gradient are zero,
            whatever it holds.
        guard: a batch whose statistics are not finite leaves the running ones alone (`moments.ema_`).

    Returns: y (N, C, *).

    Source: Ulyanov, Vedaldi & Lempitsky, Instance Normalization (2016), eq. 4.
    """
    shapes.check_eps(_who, eps)
    options = {"eps": eps, "residual": residual, "activation": activation, "mask": mask}
    if not use_input_stats:
        if running_mean is None or running_var is None:
            raise InputError("instance_norm got no running statistics, expected both with use_input_stats=False.")
        return normalize_running(x, running_mean, running_var, weight, bias, **options)  # type: ignore[arg-type]
    shapes.check_channels_first(_who, x, None, weight, bias)
    shapes.check_several(_who, x, max(x.shape[1], 1))
    shapes.check_extras(_who, x, residual, activation, mask)
    if torch.compiler.is_exporting() and running_mean is None:
        return normalize_portably(x, weight, bias, **options)  # type: ignore[arg-type]
    y, mean, var = normalize_instances(x, weight, bias, **options)  # type: ignore[arg-type]
    if running_mean is not None and running_var is not None:
        moments = across_instances(x, mean, var, mask)
        update_running_(running_mean, running_var, moments, momentum, guard=guard)
    return y


def _who() -> str:
    return "instance_norm"
