"""Normalization as functions: one autograd function over the kernels.

    y = activation(weight · (x − mean) / sqrt(var + eps) + bias + residual)

`normalize_batch` takes the statistics of its input, `normalize_running` those it is given. Under functional
transforms (vmap, grad, jvp), for forward-mode derivatives, for the backward pass of a backward pass, and for mixed
dtypes the same formula runs as plain differentiable PyTorch (`kernels.reference.compose`).
"""

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from steadynorm import grouping as grouping_
from steadynorm import kernels
from steadynorm.errors import DegenerateStatisticsError, InputError
from steadynorm.functional import small
from steadynorm.functional.checks import check_affine, check_extras, check_mask
from steadynorm.functional.differentiable import apart
from steadynorm.functional.packing import Packing, pack, unpack
from steadynorm.functional.shapes import about_single_value
from steadynorm.grouping import Grouping, dense_like, with_strides
from steadynorm.kernels import ACTIVATIONS, FROM_OUTPUT, numba_cpu, ops, reference
from steadynorm.moments import Moments

OPS = torch.ops.steadynorm


class _Settings(NamedTuple):
    """What a call of `_Normalize` does with its tensors."""

    grouping: Grouping
    eps: float
    activation: str | None
    is_constant: bool
    """Whether statistics are constants to the backward pass, or functions of `x`."""
    backend: ModuleType | None
    """What runs it, the backward pass too: autograd may call that from a thread that knows of no `backend` block. None
    when traced, and the ops choose."""
    found: list[Tensor] | None
    """Where mean and var go. None when the call is traced: a graph has no place for them but among the outputs."""


class _Normalize(torch.autograd.Function):
    """Normalise, add, activate; with given statistics, or with those of `x`, which are taken where they are None."""

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
        settings: _Settings,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        ctx.settings, ctx.backend, ctx.strides = settings, settings.backend, x.stride()
        y, mean, var = _forward(x, weight, bias, residual, mask, mean, var, settings)
        activation = settings.activation
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
        ctx.set_materialize_grads(False)
        if settings.found is None:
            ctx.mark_non_differentiable(mean, var)
            return y, mean, var
        settings.found.extend((mean, var))
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 8
        if torch.is_grad_enabled():
            return _differentiable_backward(ctx, dy)
        x, weight, bias, residual, y, mask, mean, var = ctx.saved_tensors
        grouping, eps, activation, is_constant, *_ = ctx.settings
        is_traced = ops.is_traced(x)
        if not is_traced:
            x, residual, y = (t if t is None else with_strides(t, ctx.strides) for t in (x, residual, y))
        if dy.stride() != x.stride():
            dy = dense_like(dy, x)
        needs = ctx.needs_input_grad
        needs_dresidual = ctx.has_residual and needs[3]
        dresidual: Tensor | None = None
        if needs_dresidual and activation is None and mask is None:
            needs_dresidual, dresidual = False, dy
        flat = flat_mask(mask, grouping)
        wanted = needs_dresidual, needs[1] or needs[2]
        rest = (mean, var, weight, bias, residual, y, flat, eps, activation, is_constant, *wanted)
        if is_traced:
            dx, dweight, dbias, g = OPS.backward(dy, x, *grouping, *rest)
        else:
            backend = ctx.backend or kernels.choose(x, masked=mask is not None)
            dx, dweight, dbias, g = backend.backward(dy, x, grouping, *rest)
        return (
            dx if needs[0] else None,
            dweight if needs[1] else None,
            dbias if needs[2] else None,
            g if needs_dresidual else dresidual,
            *(None,) * 4,
        )


_apply: Any = super(torch.autograd.Function, _Normalize).apply
"""`_Normalize.apply` less its looking for functional transforms, which `runs_composed` has done: 4 of 10 µs."""


def flat_mask(mask: Tensor | None, grouping: Grouping) -> Tensor | None:
    """A mask (N, *) as kernels take it."""
    return None if mask is None else mask.reshape(grouping.outer, grouping.inner)


def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    settings: _Settings,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, mean and var: from the backend or, None, from the ops that a trace sees."""
    grouping, eps, activation, _, backend, _ = settings
    rest = (weight, bias, residual, flat_mask(mask, grouping), eps, activation)
    if backend is None:
        if mean is not None and var is not None:
            return OPS.normalize(x, *grouping, mean, var, *rest), mean, var
        y, mean, var = OPS.forward(x, *grouping, *rest)
        return y, mean, var
    if mean is not None and var is not None:
        return backend.normalize(x, grouping, mean, var, *rest), mean, var
    y, mean, var = backend.forward(x, grouping, *rest)
    return y, mean, var


def _differentiable_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """The backward pass as a function that can itself be differentiated, to any order."""
    x, weight, bias, residual, y, mask, mean, var = ctx.saved_tensors
    x, weight, bias = apart(x, weight, bias)
    _, eps, activation, is_constant, *_ = ctx.settings
    statistics = (mean, var) if is_constant else None
    normalized, *_ = reference.compose(x, weight, bias, None, mask, eps, None, statistics)
    if mask is not None:
        # First, since zero times what padding holds may be NaN.
        dy = torch.where(mask.unsqueeze(1), dy, 0)
        residual = None if residual is None else torch.where(mask.unsqueeze(1), residual, 0)
    g = through_activation(dy, normalized, residual, y, activation)
    wanted = [t for t, needed in zip((x, weight, bias), ctx.needs_input_grad, strict=False) if needed]
    found = iter(torch.autograd.grad(normalized, wanted, g, create_graph=True) if wanted else ())
    gradients = [next(found) if needed else None for needed in ctx.needs_input_grad[:3]]
    return (*gradients, g if ctx.needs_input_grad[3] else None, *(None,) * 4)


def through_activation(
    dy: Tensor, normalized: Tensor, residual: Tensor | None, y: Tensor | None, activation: str | None
) -> Tensor:
    """dy · activation'(z) as a differentiable function, for z = normalized + residual, or on the side where y is."""
    if activation is None:
        return dy
    if y is not None:
        # Piecewise linear: the slope is a constant on the side of the output.
        side = y.detach().requires_grad_()
        (slope,) = torch.autograd.grad(ACTIVATIONS[activation](side).sum(), side)
        return dy * slope
    z = normalized if residual is None else normalized + residual
    (g,) = torch.autograd.grad(ACTIVATIONS[activation](z), z, dy, create_graph=True)
    return g


def runs_composed(x: Tensor, residual: Tensor | None) -> bool:
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
    """Check, choose how to run, and run; `statistics` are constants or, not `is_constant`, those of `x`.

    Returns: y, and mean and var, detached.
    """
    check_extras(x, residual, activation, mask)
    if residual is None and mask is None and (is_constant or statistics is None):
        done = small.normalize(x, weight, bias, statistics, eps, activation)
        if done is not None:
            return done
    check_affine(x, weight, bias)
    if statistics is not None:
        check_affine(x, *statistics, names=("mean", "var"))
    if runs_composed(x, residual):
        kept = statistics if is_constant else None
        y, *found = reference.compose(x, weight, bias, residual, mask, eps, activation, kept)
        return y, found[0].detach(), found[1].detach()
    if mask is not None and is_packed(x, mask):
        packing = Packing(x, mask)
        part, beside = pack(x, packing), None if residual is None else pack(residual, packing)
        y, mean, var = _normalize(part, weight, bias, statistics, eps, beside, activation, None, is_constant)
        return unpack(y, packing), mean, var
    x, grouping = grouping_.batch(x)
    if residual is not None:
        residual = dense_like(residual, x)
    is_recorded = torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    )
    is_traced = ops.is_traced(x)
    backend = None if is_traced else kernels.choose(x, masked=mask is not None)
    given_mean: Tensor | None = None
    given_var: Tensor | None = None
    if statistics is not None:
        given_mean, given_var = (t.detach() if t.requires_grad else t for t in statistics)
        if is_recorded or not is_constant:
            # Copies: what the backward pass reads must not move with the running statistics.
            dtype = reference.statistics_dtype(x)
            given_mean, given_var = (t.to(dtype, copy=is_recorded) for t in (given_mean, given_var))
    tensors = (x, weight, bias, residual, mask, given_mean, given_var)
    if is_traced:
        y, *found = _Normalize.apply(*tensors, _Settings(grouping, eps, activation, is_constant, None, None))
        return y, found[0].detach(), found[1].detach()
    found = []
    settings = _Settings(grouping, eps, activation, is_constant, backend, found)
    if not is_recorded:
        return _forward(*tensors, settings)
    y = _apply(*tensors, settings)
    return y, found[0], found[1]


def is_packed(x: Tensor, mask: Tensor) -> bool:
    """Whether a masked call is made without its padding: where the kernels take everything but the mask.

    The one value that a mask may leave is its own mean, and its gradient zero: to the bit on the reference.
    """
    return not ops.is_traced(x) and kernels.choose(x) is numba_cpu and int(mask.sum()) > 1


def count_of(x: Tensor, mask: Tensor | None) -> int | Tensor:
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
    if mask is not None:
        check_mask(x, mask)
    x = x.detach()
    count = count_of(x, mask)
    if runs_composed(x, None):
        _, mean, var = reference.compose(x, None, None, None, mask, 1.0, None)
    else:
        if mask is not None and is_packed(x, mask):
            x, mask = Packing(x, mask).pack(x), None
        x, grouping = grouping_.batch(x)
        mean, var = (OPS if ops.is_traced(x) else ops).moments(x, *grouping, flat_mask(mask, grouping))
    return Moments(mean, var, count)


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
    count = count_of(x, mask) if moments is None else moments.count
    return y, Moments(mean, var, count)


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
    if not ops.is_traced(running_mean):
        ops.move_(running_mean, running_var, moments, momentum, num_batches_tracked, guard)
        return
    count = moments.count
    plain, tensor = (0, count) if isinstance(count, Tensor) else (count, None)
    OPS.update_running_(
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
        advice = "normalise such a batch by running statistics with training=False"
        raise DegenerateStatisticsError(about_single_value("batch_norm", x, advice))
    y, moments = normalize_batch(x, weight, bias, eps=eps, residual=residual, activation=activation, mask=mask)
    if running_mean is not None and running_var is not None:
        update_running_(running_mean, running_var, moments, momentum, guard=guard)
    return y
