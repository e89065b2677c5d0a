"""Group normalization: statistics of a group of channels within one sample."""

import torch
from torch import Tensor
from torch.nn import functional as F

from steadynorm import grouping as grouping_
from steadynorm.functional import shapes
from steadynorm.functional.recall import recall, remember
from steadynorm.functional.sample import Settings, normalize_sample, under_autocast
from steadynorm.kernels import ACTIVATIONS, torch_small


def within_groups(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float,
    residual: Tensor | None,
    activation: str | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (N, C, *), and mean and biased variance (N · num_groups,), detached."""
    dense, grouping = grouping_.sample_groups(x, num_groups)
    settings = Settings(grouping, eps, activation)
    if residual is None and mask is None:
        remember(("group", num_groups, eps, activation), x, dense, weight, bias, settings)
    y, _, mean, var = normalize_sample(dense, weight, bias, settings, residual=residual, mask=mask)
    return y, mean, var


def normalize_groups(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float,
    residual: Tensor | None = None,
    activation: str | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """`group_norm` without its checks."""
    x = under_autocast(x)
    if torch.compiler.is_exporting() and mask is None:
        return finish(F.group_norm(x, num_groups, weight, bias, eps), residual, activation)
    return within_groups(x, num_groups, weight, bias, eps=eps, residual=residual, activation=activation, mask=mask)[0]


def finish(y: Tensor, residual: Tensor | None, activation: str | None) -> Tensor:
    """activation(y + residual), in PyTorch's own operators: for graphs that leave PyTorch."""
    y = y if residual is None else y + residual
    return y if activation is None else ACTIVATIONS[activation](y)


def quick_group(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, activation: str | None
) -> Tensor | None:
    """`group_norm` where little has to be found out for it, which is done unchecked; else None."""
    if activation is None and (y := torch_small.group(x, num_groups, weight, bias, eps)) is not None:
        return y
    return recall(("group", num_groups, eps, activation), x, weight, bias)


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Group normalization with the signature of `torch.nn.functional.group_norm`, and what it lacks.

    y = activation(weight · (x − mean) / sqrt(var + eps) + bias + residual)

    Args:
        x: (N, C, *), floating point, any memory order; channels-last stays channels-last.
        num_groups: how many groups of neighbouring channels; divides C.
        weight, bias: (C,) or None.
        eps: added to the variance, in its unit.
        residual: (N, C, *), added before the activation.
        activation: None or one of `ACTIVATIONS`.
        mask: (N, *) bool, True where a value is valid. Padding enters no statistic; its output and gradient are zero,
            whatever it holds.

    Returns: y (N, C, *).

    Source: Wu & He, Group Normalization (2018), eq. 1 to 7.
    """
    if residual is None and mask is None:
        y = quick_group(x, num_groups, weight, bias, eps, activation)
        if y is not None:
            return y
    shapes.check_channels_first(_who, x, None, weight, bias)
    shapes.check_groups(_who, num_groups, x.shape[1])
    shapes.check_several(_who, x, num_groups)
    shapes.check_eps(_who, eps)
    shapes.check_extras(_who, x, residual, activation, mask)
    return normalize_groups(x, num_groups, weight, bias, eps=eps, residual=residual, activation=activation, mask=mask)


def _who() -> str:
    return "group_norm"
