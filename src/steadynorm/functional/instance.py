"""Instance normalization: statistics of one channel of one sample."""

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
) -> tuple[Tensor, Moments]:
    """Normalise every channel of every sample on its own; and what running statistics are to move towards.

    Args: as `instance_norm`.

    Returns: y (N, C, *), and Moments (C,): the mean over samples of their means and of their unbiased variances, each
        sample once, whatever its length. Samples with fewer than two valid values do not enter.
    """
    options = {"eps": eps, "residual": residual, "activation": activation, "mask": mask}
    y, mean, var = within_groups(x, x.shape[1], weight, bias, **options)  # type: ignore[arg-type]
    positions = x[0, 0].numel() if x.shape[0] else 0
    if mask is None:
        return y, Moments(mean.mean(0), var.mean(0), positions if x.shape[0] else 0)
    counts = mask.flatten(1).sum(1, keepdim=True)
    enters = counts > 1
    samples = enters.sum()
    unbiased = torch.where(enters, Moments(mean, var, counts).unbiased_var, 0).sum(0) / samples.clamp(min=1)
    mean = torch.where(enters, mean, 0).sum(0) / samples.clamp(min=1)
    # The count that gives this unbiased variance back: samples of different lengths have no count in common.
    count = torch.where(enters, counts, 0).sum()
    share = (count - 1).clamp(min=0).to(var.dtype) / count.clamp(min=1)
    return y, Moments(mean, unbiased * share, count)


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
    shapes.check_channels(_who, x, x.shape[1] if x.dim() > 1 else 1, weight, bias)
    shapes.check_extras(_who, x, residual, activation, mask)
    if torch.compiler.is_exporting() and mask is None and running_mean is None:
        return finish(F.instance_norm(x, None, None, weight, bias, True, 0.0, eps), residual, activation)
    y, moments = normalize_instances(x, weight, bias, **options)  # type: ignore[arg-type]
    if running_mean is not None and running_var is not None:
        update_running_(running_mean, running_var, moments, momentum, guard=guard)
    return y


def _who() -> str:
    return "instance_norm"
