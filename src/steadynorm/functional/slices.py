"""Batch normalization of slices of a batch, each by its own statistics."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from steadynorm import grouping as grouping_
from steadynorm import kernels
from steadynorm.errors import InputError
from steadynorm.functional.batch import normalize_batch, runs_composed, through_activation
from steadynorm.functional.checks import check_affine, check_extras
from steadynorm.functional.differentiable import apart
from steadynorm.grouping import Grouping, dense_like, is_channels_last, with_strides
from steadynorm.kernels import FROM_OUTPUT, numba_cpu, ops, reference
from steadynorm.kernels.batch_plans import is_readable
from steadynorm.moments import Moments, merge


class _Settings(NamedTuple):
    grouping: Grouping
    sizes: tuple[int, ...]
    eps: float
    activation: str | None
    found: list[Tensor]


class _NormalizeSlices(torch.autograd.Function):
    """The compiled kernels, run once for all slices."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        settings: _Settings,
    ) -> Tensor:
        ctx.settings, ctx.strides = settings, x.stride()
        y, each, together = _forward(x, weight, bias, residual, settings)
        settings.found.extend(together)
        ctx.has_residual = residual is not None
        takes_output = ctx.has_residual and settings.activation in FROM_OUTPUT
        kept = residual if settings.activation is not None and not takes_output else None
        ctx.save_for_backward(x, weight, bias, kept, y if takes_output else None, *each)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        from steadynorm.kernels import numba_slices

        x, weight, bias, residual, y, mean, var = ctx.saved_tensors
        grouping, sizes, eps, activation, _ = ctx.settings
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():
            x, weight, bias = apart(x, weight, bias)
            normalized, _ = _one_by_one(x, sizes, weight, bias, eps=eps)
            slope = through_activation(dy, normalized, residual, y, activation)
            wanted = [t for t, needed in zip((x, weight, bias), needs, strict=False) if needed]
            found = iter(torch.autograd.grad(normalized, wanted, slope, create_graph=True) if wanted else ())
            return (*(next(found) if needed else None for needed in needs[:3]), slope if needs[3] else None, None)
        x = with_strides(x, ctx.strides)
        residual, y = (t if t is None else with_strides(t, ctx.strides) for t in (residual, y))
        dy = dense_like(dy, x)
        needs_dresidual = ctx.has_residual and needs[3]
        is_dy = needs_dresidual and activation is None
        rest = (weight, bias, residual, y, eps, activation, needs_dresidual and not is_dy)
        dx, dweight, dbias, g = numba_slices.backward(dy, x, grouping, sizes, mean, var, *rest)
        return (
            dx if needs[0] else None,
            dweight.to(weight.dtype) if needs[1] else None,
            dbias.to(bias.dtype) if needs[2] else None,
            (dy if is_dy else g) if needs_dresidual else None,
            None,
        )


_apply: Any = super(torch.autograd.Function, _NormalizeSlices).apply
"""`_NormalizeSlices.apply` less its looking for functional transforms, which `_is_for_kernels` has done."""


def _forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, settings: _Settings
) -> tuple[Tensor, Iterable[Tensor], Iterable[Tensor]]:
    """y, mean and variance of each slice, and of all together."""
    from steadynorm.kernels import numba_slices

    grouping, sizes, eps, activation, _ = settings
    return numba_slices.forward(x, grouping, sizes, weight, bias, residual, eps, activation)


def normalize_slices(
    x: Tensor,
    sizes: tuple[int, ...],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    activation: str | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Moments]:
    """Normalise every slice of a batch by its own statistics: `normalize_batch`, slice by slice.

    Args:
        x: (N, C, *), floating point, any memory order; channels-last stays channels-last.
        sizes: samples of each slice, in their order; they add up to N.
        weight, bias, residual, activation, mask: as `normalize_batch`.

    Returns: y (N, C, *), and the merged Moments of the slices.

    Raises:
        InputError: sizes that do not add up, or a tensor that does not go with x.

    Source: Hoffer, Hubara & Soudry, Train longer, generalize better (2017), Algorithm 1.
    """
    check_extras(x, residual, activation, mask)
    if sum(sizes) != x.shape[0] or min(sizes, default=-1) < 0:
        raise InputError(f"sizes got {sizes}, expected samples of slices that add up to the {x.shape[0]} of x.")
    check_affine(x, weight, bias)
    # Of a NumPy array they would be other integers, and known by the same plan.
    sizes = tuple(int(size) for size in sizes if size) or (0,)
    # A parameter that several slices use adds its gradients up unrounded.
    weight, bias = (None if t is None else t.to(reference.compute_dtype(t)) for t in (weight, bias))
    if not _is_for_kernels(x, weight, bias, residual, mask):
        return _one_by_one(x, sizes, weight, bias, eps=eps, residual=residual, activation=activation, mask=mask)
    x, grouping = grouping_.batch(x)
    residual = None if residual is None else dense_like(residual, x)
    settings = _Settings(grouping, sizes, eps, activation, [])
    tensors = (x, weight, bias, residual)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        y = _apply(*tensors, settings)
        mean, var = settings.found
    else:
        y, _, (mean, var) = _forward(*tensors, settings)
    return y, Moments(mean, var, grouping.values_per_group)


def _is_for_kernels(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, mask: Tensor | None
) -> bool:
    """Whether the compiled kernels can do it; what they cannot, `normalize_batch` does or says why not."""
    if mask is not None or ops.is_traced(x) or runs_composed(x, residual):
        return False
    return is_readable(weight) and is_readable(bias) and kernels.choose(x) is numba_cpu


def _one_by_one(
    x: Tensor,
    sizes: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float,
    residual: Tensor | None = None,
    activation: str | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Moments]:
    """`normalize_batch` slice by slice, on any device and under every transform."""
    ys, parts = [], []
    # One split instead of many slices: its backward is one concatenation.
    for part, also, valid in zip(*(_split(t, sizes) for t in (x, residual, mask)), strict=True):
        y, moments = normalize_batch(part, weight, bias, eps=eps, residual=also, activation=activation, mask=valid)
        ys.append(y)
        parts.append(moments)
    if is_channels_last(x):
        return torch.cat([y.movedim(1, -1) for y in ys]).movedim(-1, 1), merge(parts)
    return torch.cat(ys), merge(parts)


def _split(x: Tensor | None, sizes: tuple[int, ...]) -> tuple[Tensor | None, ...]:
    return (None,) * len(sizes) if x is None else x.split(list(sizes))
