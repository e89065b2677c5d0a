"""Normalization within a sample: one autograd function over the kernels, and the four ways to group.

    y = activation(x̂ · (weight_offset + weight) + bias + residual),   x̂ = (x + addend − mean) / sqrt(var + eps)

As in `functional.batch`, functional transforms, forward-mode derivatives, the backward pass of a backward pass and
mixed dtypes run as plain differentiable PyTorch (`kernels.reference_sample.compose_sample`).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from steadynorm.grouping import SampleGrouping, dense_like
from steadynorm.kernels import ACTIVATIONS, FROM_OUTPUT, ops, reference_sample, sample_ops

OPS = torch.ops.steadynorm
HALF = (torch.bfloat16, torch.float16)
AUTOCAST_TO_FLOAT = frozenset({"cuda", "xpu", "mps", "mtia", "maia"})
"""Devices on which torch's autocast runs layer_norm, group_norm and rms_norm in float32; on the CPU it does not."""


class Settings(NamedTuple):
    """What a call is made with besides tensors."""

    grouping: SampleGrouping
    eps: float
    activation: str | None = None
    is_centred: bool = True
    weight_offset: float = 0.0


class _NormalizeSample(torch.autograd.Function):
    """Add, normalise, add, activate."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        addend: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mask: Tensor | None,
        settings: Settings,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        grouping, eps, activation, *kind = ctx.settings = settings
        run = OPS if ops.is_traced(x) else sample_ops
        y, total, mean, var = run.sample_forward(
            x, addend, *grouping, weight, bias, residual, mask, eps, activation, *kind
        )
        ctx.has_addend, ctx.has_residual = addend is not None, residual is not None
        takes_output = ctx.has_residual and activation in FROM_OUTPUT
        ctx.save_for_backward(
            total if ctx.has_addend else x,
            weight,
            bias,
            residual if activation is not None and not takes_output else None,
            y if takes_output else None,
            mask,
            mean,
            var,
        )
        ctx.mark_non_differentiable(mean, var, *(() if ctx.has_addend else (total,)))
        ctx.set_materialize_grads(False)
        return y, total, mean, var

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dtotal: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if not ctx.has_addend:
            # A compiler hands zeros to every output, also to those without a gradient.
            dtotal = None
        if dy is None:
            return dtotal, dtotal, *(None,) * 5
        total, weight, bias, residual, y, mask, mean, var = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _differentiable_backward(ctx, dy, dtotal)
        grouping, eps, activation, *kind = ctx.settings
        dy = dense_like(dy, total)
        if dtotal is not None:
            dtotal = dense_like(dtotal, total)
        needs_dresidual = ctx.has_residual and ctx.needs_input_grad[4]
        is_dy = needs_dresidual and activation is None and mask is None
        run = OPS if ops.is_traced(total) else sample_ops
        dx, dweight, dbias, dresidual = run.sample_backward(
            dy,
            dtotal,
            total,
            *grouping,
            mean,
            var,
            weight,
            bias,
            residual,
            y,
            mask,
            eps,
            activation,
            *kind,
            needs_dresidual and not is_dy,
            ctx.needs_input_grad[2] or ctx.needs_input_grad[3],
        )
        return (
            dx if ctx.needs_input_grad[0] else None,
            dx if ctx.needs_input_grad[1] else None,
            dweight.to(weight.dtype) if ctx.needs_input_grad[2] else None,
            dbias.to(bias.dtype) if ctx.needs_input_grad[3] else None,
            (dy if is_dy else dresidual) if needs_dresidual else None,
            None,
            None,
        )


def _differentiable_backward(ctx: Any, dy: Tensor, dtotal: Tensor | None) -> tuple[Tensor | None, ...]:
    """The backward pass as a function that can itself be differentiated, to any order."""
    total, weight, bias, residual, y, mask, *_ = ctx.saved_tensors
    settings = ctx.settings
    normalized, *_ = _compose(total, weight, bias, None, mask, settings._replace(activation=None))
    g = dy
    if mask is not None:
        # First, since zero times what padding holds may be NaN.
        g = _where_valid(g, mask, settings.grouping)
        residual = None if residual is None else _where_valid(residual, mask, settings.grouping)
    if y is not None:
        # Piecewise linear: the slope is a constant on the side of the output.
        side = y.detach().requires_grad_()
        (slope,) = torch.autograd.grad(ACTIVATIONS[settings.activation](side).sum(), side)
        g = g * slope
    elif settings.activation is not None:
        z = normalized if residual is None else normalized + residual
        (g,) = torch.autograd.grad(ACTIVATIONS[settings.activation](z), z, g, create_graph=True)
    needs_dx = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
    needs = (needs_dx, *ctx.needs_input_grad[2:4])
    wanted = [t for t, needed in zip((total, weight, bias), needs, strict=True) if needed]
    found = iter(torch.autograd.grad(normalized, wanted, g, create_graph=True) if wanted else ())
    dx, dweight, dbias = [next(found) if needed else None for needed in needs]
    if dx is not None and dtotal is not None:
        dx = dx + dtotal
    return (
        dx if ctx.needs_input_grad[0] else None,
        dx if ctx.needs_input_grad[1] else None,
        dweight,
        dbias,
        g if ctx.needs_input_grad[4] else None,
        None,
        None,
    )


def _where_valid(x: Tensor, mask: Tensor, grouping: SampleGrouping) -> Tensor:
    valid = mask.reshape(grouping.samples, grouping.outer, 1, 1, grouping.inner)
    return grouping.restore(torch.where(valid, grouping.view(x), 0), x)


def _compose(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    settings: Settings,
) -> tuple[Tensor, Tensor, Tensor]:
    grouping, eps, activation, is_centred, weight_offset = settings
    residual = None if residual is None else grouping.view(dense_like(residual, x))
    y, mean, var = reference_sample.compose_sample(
        grouping.view(x), grouping, weight, bias, residual, mask, eps, activation, is_centred, weight_offset
    )
    return grouping.restore(y, x), mean, var


def _runs_composed(x: Tensor, residual: Tensor | None) -> bool:
    """Whether the call needs plain differentiable PyTorch: transforms, mixed dtypes, graphs that leave PyTorch."""
    if residual is not None and residual.dtype != x.dtype:
        return True
    return (
        torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0 or torch.compiler.is_exporting()
    )


def normalize_sample(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    settings: Settings,
    *,
    addend: Tensor | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normalise `x`, dense in the order of `settings.grouping`, with statistics within each sample.

    Args:
        x: in any shape; `addend` and `residual` in the same.
        weight, bias: groups·channels values in any shape, or None; without a weight no weight_offset.
        mask: bool, samples·outer·inner values in any shape, True where a value is valid.

    Returns: y, x + addend (`x` itself without one), mean and var (one of each statistic, detached).
    """
    grouping = settings.grouping
    if addend is not None and (addend.dtype != x.dtype or _runs_composed(x, residual)):
        x, addend = dense_like(x + addend, x), None
    weight, bias = (t if t is None or t.dim() == 1 else t.flatten() for t in (weight, bias))
    flat = None if mask is None else mask.reshape(grouping.samples, grouping.outer * grouping.inner)
    if _runs_composed(x, residual):
        y, mean, var = _compose(x, weight, bias, residual, flat, settings)
        return y, x, mean.detach(), var.detach()
    addend = None if addend is None else dense_like(addend, x)
    residual = None if residual is None else dense_like(residual, x)
    y, total, mean, var = _NormalizeSample.apply(x, addend, weight, bias, residual, flat, settings)
    return y, x if addend is None else total, mean, var


def under_autocast(x: Tensor) -> Tensor:
    """`x` as torch's layer_norm, group_norm and rms_norm would take it here: float32 under a device's autocast."""
    kind = x.device.type
    if kind in AUTOCAST_TO_FLOAT and x.dtype in HALF and torch.is_autocast_enabled(kind):
        return x.float()
    return x
