"""Normalization as functions: one autograd function over the kernels.

    y = activation(weight · (x − mean) / sqrt(var + eps) + bias + residual)

`normalize_batch` takes the statistics of its input, `normalize_running` those it is given. Under functional
transforms (vmap, grad, jvp), for forward-mode derivatives, for the backward pass of a backward pass, and for mixed
dtypes the same formula runs as plain differentiable PyTorch (`kernels.reference.compose`).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from steadynorm import grouping as grouping_
from steadynorm.errors import DegenerateStatisticsError, InputError
from steadynorm.grouping import Grouping, dense_like
from steadynorm.kernels import ACTIVATIONS, FROM_OUTPUT, ops, reference
from steadynorm.moments import Moments

OPS = torch.ops.steadynorm


class _Normalize(torch.autograd.Function):
    """Normalise, add, activate; with given statistics, or with those of `x`, which are taken where they are None.

    Statistics are constants to the backward pass or, not `is_constant`, functions of `x`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mask: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        settings: tuple[Grouping, float, str | None, bool],
    ) -> tuple[Tensor, Tensor, Tensor]:
        grouping, eps, activation, _ = ctx.settings = settings
        flat = None if mask is None else mask.reshape(grouping[0], grouping[2])
        run = OPS if ops.is_traced(x) else ops
        if mean is not None and var is not None:
            y = run.normalize(x, *grouping, mean, var, weight, bias, residual, flat, eps, activation)
        else:
            y, mean, var = run.forward(x, *grouping, weight, bias, residual, flat, eps, activation)
        ctx.has_residual = residual is not None
        takes_output = ctx.has_residual and activation in FROM_OUTPUT
        ctx.save_for_backward(
            x,
            weight,
            bias,
            residual if activation is not None and not takes_output else None,
            y if takes_output else None,
            mask,
            mean,
            var,
        )
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)
        return y, mean, var

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 8
        x, weight, bias, residual, y, mask, mean, var = ctx.saved_tensors
        grouping, eps, activation, is_constant = ctx.settings
        if torch.is_grad_enabled():
            return _differentiable_backward(ctx, dy)
        dy = dense_like(dy, x)
        flat = None if mask is None else mask.reshape(grouping[0], grouping[2])
        needs_dresidual = ctx.has_residual and ctx.needs_input_grad[3]
        if needs_dresidual and activation is None and mask is None:
            needs_dresidual = False
            dresidual: Tensor | None = dy
        else:
            dresidual = None
        run = OPS if ops.is_traced(x) else ops
        dx, dweight, dbias, g = run.backward(
            dy,
            x,
            *grouping,
            mean,
            var,
            weight,
            bias,
            residual,
            y,
            flat,
            eps,
            activation,
            is_constant,
            needs_dresidual,
        )
        return (
            dx if ctx.needs_input_grad[0] else None,
            dweight.to(weight.dtype) if ctx.needs_input_grad[1] else None,
            dbias.to(bias.dtype) if ctx.needs_input_grad[2] else None,
            g if needs_dresidual else dresidual,
            *(None,) * 4,
        )


def _differentiable_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """The backward pass as a function that can itself be differentiated, to any order."""
    x, weight, bias, residual, y, mask, mean, var = ctx.saved_tensors
    _, eps, activation, is_constant = ctx.settings
    statistics = (mean, var) if is_constant else None
    normalized, *_ = reference.compose(x, weight, bias, None, mask, eps, None, statistics)
    g = dy if mask is None else torch.where(mask.unsqueeze(1), dy, 0)
    if y is not None:
        # Piecewise linear: the slope is a constant on the side of the output.
        side = y.detach().requires_grad_()
        (slope,) = torch.autograd.grad(ACTIVATIONS[activation](side).sum(), side)
        g = g * slope
    elif activation is not None:
        z = normalized if residual is None else normalized + residual
        (g,) = torch.autograd.grad(ACTIVATIONS[activation](z), z, g, create_graph=True)
    wanted = [t for t, needed in zip((x, weight, bias), ctx.needs_input_grad, strict=False) if needed]
    found = iter(torch.autograd.grad(normalized, wanted, g, create_graph=True) if wanted else ())
    gradients = [next(found) if needed else None for needed in ctx.needs_input_grad[:3]]
    return (*gradients, g if ctx.needs_input_grad[3] else None, *(None,) * 4)


def _runs_composed(x: Tensor, residual: Tensor | None) -> bool:
    """Whether the call needs plain differentiable PyTorch instead of the kernels."""
    if residual is not None and residual.dtype != x.dtype:
        return True
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: tuple[Tensor, Tensor] | None,
    eps: float,
    residual: Tensor | None,
    activation: str | None,
    mask: Tensor | None,
    is_constant: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Check, choose how to run, and run; `statistics` are constants or, not `is_constant`, those of `x`."""
    if activation is not None and activation not in ACTIVATIONS:
        raise InputError(f"activation got {activation!r}, expected None or one of {', '.join(ACTIVATIONS)}.")
    if residual is not None and residual.shape != x.shape:
        raise InputError(f"residual got shape {tuple(residual.shape)}, expected that of x, {tuple(x.shape)}.")
    _check_mask(x, mask)
    if _runs_composed(x, residual):
        return reference.compose(x, weight, bias, residual, mask, eps, activation, statistics if is_constant else None)
    x, grouping = grouping_.batch(x)
    if residual is not None:
        residual = dense_like(residual, x)
    mean = var = None
    if statistics is not None:
        # Copies: what the backward pass reads must not move with the running statistics.
        mean, var = (t.detach().to(reference.statistics_dtype(x), copy=True) for t in statistics)
    return _Normalize.apply(x, weight, bias, residual, mask, mean, var, (grouping, eps, activation, is_constant))


def _check_mask(x: Tensor, mask: Tensor | None) -> None:
    expected = (x.shape[0], *x.shape[2:])
    if mask is not None and (mask.dtype != torch.bool or mask.shape != expected):
        raise InputError(
            f"mask got shape {tuple(mask.shape)} and {mask.dtype}, expected {expected} and torch.bool: True is valid."
        )


def _count(x: Tensor, mask: Tensor | None) -> int | Tensor:
    """Values behind each statistic of the batch."""
    if mask is not None:
        return mask.sum()
    return x.numel() // x.shape[1] if x.shape[1] else 0


def moments(x: Tensor, mask: Tensor | None = None) -> Moments:
    """The Moments of this batch per channel, float64 and detached, in one pass over it.

    Args:
        x: (N, C, *), floating point, any memory order.
        mask: (N, *) bool, True where a value is valid.
    """
    _check_mask(x, mask)
    x = x.detach()
    if _runs_composed(x, None):
        _, mean, var = reference.compose(x, None, None, None, mask, 1.0, None)
    else:
        x, grouping = grouping_.batch(x)
        flat = None if mask is None else mask.reshape(grouping.outer, grouping.inner)
        mean, var = (OPS if ops.is_traced(x) else ops).moments(x, *grouping, flat)
    return Moments(mean, var, _count(x, mask))


def normalize_batch(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    activation: str | None = None,
    mask: Tensor | None = None,
    moments: Moments | None = None,
) -> tuple[Tensor, Moments]:
    """Normalise `x` with the statistics of this batch.

    y = activation(weight · (x − mean) / sqrt(var + eps) + bias + residual)

    Args:
        x: (N, C, *), floating point, any memory order; channels-last stays channels-last.
        weight, bias: (C,) or None.
        residual: (N, C, *), added before the activation.
        activation: None or one of `ACTIVATIONS`.
        mask: (N, *) bool, True where a value is valid. Padding enters no statistic; its output and gradient are zero,
            whatever it holds.
        moments: those of this very batch, where the caller has them already (`steadynorm.functional.moments`): they are
            not taken again. Gradients flow through them all the same.

    Returns: y (N, C, *) and the Moments of the batch per channel, float64 and detached.

    Source: Ioffe & Szegedy, Batch Normalization (2015), Algorithm 1.
    """
    statistics = None
    if moments is not None:
        if moments.mean.shape != x.shape[1:2] or moments.var.shape != x.shape[1:2]:
            raise InputError(
                f"moments got shapes {tuple(moments.mean.shape)} and {tuple(moments.var.shape)}, expected"
                f" {tuple(x.shape[1:2])} for both: give those of this batch."
            )
        statistics = moments.mean, moments.var
    y, mean, var = _normalize(x, weight, bias, statistics, eps, residual, activation, mask, is_constant=False)
    count = _count(x, mask) if moments is None else moments.count
    return y, Moments(mean.detach(), var.detach(), count)


def normalize_running(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    activation: str | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Normalise `x` with given statistics, which count as constants.

    Args: as `normalize_batch`; mean, var: (C,).

    Returns: y (N, C, *).
    """
    return _normalize(x, weight, bias, (mean, var), eps, residual, activation, mask, is_constant=True)[0]


def update_running_(
    running_mean: Tensor,
    running_var: Tensor,
    moments: Moments,
    momentum: float | None,
    *,
    num_batches_tracked: Tensor | None = None,
    guard: bool = True,
) -> None:
    """Move running statistics towards a batch, in place: `moments.ema_`, once per batch and on the fast path.

    Does nothing inside a backward pass: there a forward pass is a recomputation under activation checkpointing, and
    its batch has been counted. Under functional transforms (vmap, grad) it does nothing either: the batch lives
    inside the transform, the buffers outside.
    """
    if torch._C._are_functorch_transforms_active():
        return
    count = moments.count
    plain, tensor = (0, count) if isinstance(count, Tensor) else (count, None)
    run = OPS if ops.is_traced(running_mean) else ops
    run.update_running_(
        running_mean, running_var, num_batches_tracked, moments.mean, moments.var, tensor, plain, momentum, guard
    )


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
    mask: Tensor | None = None,
    guard: bool = True,
) -> Tensor:
    """Batch normalization with the signature of `torch.nn.functional.batch_norm`, and what it lacks.

    Args: as `normalize_batch`; running_mean, running_var: (C,), used in evaluation, changed in place in training.
        guard: a batch whose statistics are not finite leaves the running ones alone (`moments.ema_`).

    Returns: y (N, C, *).

    Raises:
        DegenerateStatisticsError: one value per channel in training.
    """
    if not training:
        if running_mean is None or running_var is None:
            raise InputError("batch_norm got no running statistics, expected both with training=False: give them.")
        return normalize_running(
            x, running_mean, running_var, weight, bias, eps=eps, residual=residual, activation=activation, mask=mask
        )
    if x.numel() == x.shape[1] > 0:
        raise DegenerateStatisticsError(_about_single_value(x))
    y, moments = normalize_batch(x, weight, bias, eps=eps, residual=residual, activation=activation, mask=mask)
    if running_mean is not None and running_var is not None:
        update_running_(running_mean, running_var, moments, momentum, guard=guard)
    return y


def _about_single_value(x: Tensor) -> str:
    what, where = "one sample", ""
    if x.dim() > 2:
        what, where = "one sample with one position", " behind a pooling to 1x1"
    return (
        f"batch_norm expected more than one value per channel in training, got shape {tuple(x.shape)}, whose variance"
        f" is zero: this is {what}, often the last, ragged batch of an epoch{where}:"
        " use drop_last=True in the DataLoader, or normalise such a batch by running statistics with training=False."
    )
