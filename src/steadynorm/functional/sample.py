"""Normalization within a sample: one autograd function over the kernels, and the four ways to group.

    y = activation(x̂ · (weight_offset + weight) + bias + residual),   x̂ = (x + addend − mean) / sqrt(var + eps)

As in `functional.batch`, functional transforms, forward-mode derivatives, the backward pass of a backward pass and
mixed dtypes run as plain differentiable PyTorch (`kernels.reference_sample.compose_sample`).
"""

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from steadynorm.functional.batch import through_activation
from steadynorm.functional.differentiable import apart
from steadynorm.grouping import SampleGrouping, dense_like, with_strides
from steadynorm.kernels import FROM_OUTPUT, numba_known, ops, reference_sample
from steadynorm.kernels.backends import choose_sample
from steadynorm.kernels.numba_known import Known
from steadynorm.kernels.sample_ops import OPS

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
        found: list[Tensor] | Known | None,
    ) -> Tensor | tuple[Tensor, ...]:
        """`found`: where mean and var go. None when traced: a graph has no place for them but among the outputs.

        Of a call that is known nobody asks for them: it has no addend, residual or mask.
        """
        ctx.settings, ctx.known, ctx.backend, ctx.strides = settings, None, None, x.stride()
        if isinstance(found, Known):
            y, mean, var = numba_known.forward(x, weight, bias, found)
            ctx.known, ctx.has_addend, ctx.has_residual = found, False, False
            ctx.save_for_backward(x, weight, bias, None, None, None, mean, var)
            ctx.set_materialize_grads(False)
            return y
        if found is not None:
            # The backward pass runs on it too: autograd may call that from a thread that knows of no `backend` block.
            ctx.backend = choose_sample(x, settings.grouping, masked=mask is not None)
        y, total, mean, var = _forward(x, addend, weight, bias, residual, mask, settings, ctx.backend)
        ctx.has_addend, ctx.has_residual = addend is not None, residual is not None
        activation = settings.activation
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
        ctx.set_materialize_grads(False)
        if found is None:
            ctx.mark_non_differentiable(mean, var, *(() if ctx.has_addend else (total,)))
            return y, total, mean, var
        found.extend((mean, var))
        return (y, total) if ctx.has_addend else y

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor | None, dtotal: Tensor | None = None, *_: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if not ctx.has_addend:
            # A compiler hands zeros to every output, also to those without a gradient.
            dtotal = None
        if dy is None:
            return dtotal, dtotal, *(None,) * 6
        if torch.is_grad_enabled():
            return _differentiable_backward(ctx, dy, dtotal)
        total, weight, bias, residual, y, mask, mean, var = ctx.saved_tensors
        grouping, eps, activation, *kind = ctx.settings
        is_traced = ops.is_traced(total)
        if not is_traced:
            total, residual, y = (t if t is None else with_strides(t, ctx.strides) for t in (total, residual, y))
        if dy.stride() != total.stride():
            dy = dense_like(dy, total)
        if ctx.known is not None and not is_traced:
            return _known_backward(ctx, dy, total, weight, bias, mean, var)
        if dtotal is not None:
            dtotal = dense_like(dtotal, total)
        needs = ctx.needs_input_grad
        needs_dresidual = ctx.has_residual and needs[4]
        is_dy = needs_dresidual and activation is None and mask is None
        rest = (mean, var, weight, bias, residual, y, mask, eps, activation, *kind)
        wanted = needs_dresidual and not is_dy, needs[2] or needs[3]
        if is_traced:
            dx, dweight, dbias, dresidual = OPS.sample_backward(dy, dtotal, total, *grouping, *rest, *wanted)
        else:
            backend = ctx.backend or choose_sample(total, grouping, masked=mask is not None)
            dx, dweight, dbias, dresidual = backend.sample_backward(dy, dtotal, total, grouping, *rest, *wanted)
        return (
            dx if needs[0] else None,
            dx if needs[1] else None,
            dweight.to(weight.dtype) if needs[2] else None,
            dbias.to(bias.dtype) if needs[3] else None,
            (dy if is_dy else dresidual) if needs_dresidual else None,
            *(None,) * 3,
        )


def _known_backward(
    ctx: Any, dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of a known call, from tensors that were unpacked once: a checkpoint allows no more."""
    needs_dx, _, needs_dweight, needs_dbias, *_ = ctx.needs_input_grad
    dx, dweight, dbias = numba_known.backward(dy, x, weight, bias, mean, var, ctx.known)
    if weight is not None and dweight.dtype != weight.dtype:
        dweight = dweight.to(weight.dtype)
    if bias is not None and dbias.dtype != bias.dtype:
        dbias = dbias.to(bias.dtype)
    return (
        dx if needs_dx else None,
        None,
        dweight if needs_dweight else None,
        dbias if needs_dbias else None,
        *(None,) * 4,
    )


_apply: Any = super(torch.autograd.Function, _NormalizeSample).apply
"""`_NormalizeSample.apply` less its looking for functional transforms, which `_runs_composed` has done."""


def _forward(
    x: Tensor,
    addend: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    settings: Settings,
    backend: ModuleType | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, the sum, mean and var: from the backend or, None, from the op that a trace sees."""
    grouping, *rest = settings
    if backend is None:
        y, total, mean, var = OPS.sample_forward(x, addend, *grouping, weight, bias, residual, mask, *rest)
        return y, total, mean, var
    y, total, mean, var = backend.sample_forward(x, addend, grouping, weight, bias, residual, mask, *rest)
    return y, total, mean, var


def _differentiable_backward(ctx: Any, dy: Tensor, dtotal: Tensor | None) -> tuple[Tensor | None, ...]:
    """The backward pass as a function that can itself be differentiated, to any order."""
    total, weight, bias, residual, y, mask, *_ = ctx.saved_tensors
    total, weight, bias = apart(total, weight, bias)
    settings = ctx.settings
    normalized, *_ = compose(total, weight, bias, None, mask, settings._replace(activation=None))
    g = dy
    if mask is not None:
        # First, since zero times what padding holds may be NaN.
        g = _where_valid(g, mask, settings.grouping)
        residual = None if residual is None else _where_valid(residual, mask, settings.grouping)
    g = through_activation(g, normalized, residual, y, settings.activation)
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
        *(None,) * 3,
    )


def _where_valid(x: Tensor, mask: Tensor, grouping: SampleGrouping) -> Tensor:
    valid = mask.reshape(grouping.samples, grouping.outer, 1, 1, grouping.inner)
    return grouping.restore(torch.where(valid, grouping.view(x), 0), x)


def compose(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    settings: Settings,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, mean and var as differentiable PyTorch; `x` as `normalize_sample` takes it."""
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
        y, mean, var = compose(x, weight, bias, residual, flat, settings)
        return y, x, mean.detach(), var.detach()
    addend = None if addend is None else dense_like(addend, x)
    residual = None if residual is None else dense_like(residual, x)
    tensors = (x, addend, weight, bias, residual, flat)
    if ops.is_traced(x):
        y, total, mean, var = _NormalizeSample.apply(*tensors, settings, None)
        return y, x if addend is None else total, mean, var
    if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)):
        return _forward(*tensors, settings, choose_sample(x, settings.grouping, masked=mask is not None))
    found: list[Tensor] = []
    if addend is None:
        return _apply(*tensors, settings, found), x, *found
    y, total = _apply(*tensors, settings, found)
    return y, total, *found


def apply_known(x: Tensor, weight: Tensor | None, bias: Tensor | None, settings: Settings, call: Known) -> Tensor:
    """y of a call whose tensors were found to be as the kernels take them."""
    if torch.is_grad_enabled() and (
        x.requires_grad or (weight is not None and weight.requires_grad) or (bias is not None and bias.requires_grad)
    ):
        y: Tensor = _apply(x, None, weight, bias, None, None, settings, call)
        return y
    return numba_known.forward(x, weight, bias, call)[0]


def under_autocast(x: Tensor) -> Tensor:
    """`x` as torch's layer_norm, group_norm and rms_norm would take it here: float32 under a device's autocast."""
    kind = x.device.type
    if kind in AUTOCAST_TO_FLOAT and x.dtype in HALF and torch.is_autocast_enabled(kind):
        return x.float()
    return x
