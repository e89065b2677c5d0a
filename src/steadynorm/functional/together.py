"""Several tensors, normalised as the one batch that they are parts of.

The parts are micro-batches of one process, or one tensor on each of several processes, or both. Every part keeps its
own memory; what they share are the statistics going forward and the two sums coming back, which is all that has to be
merged. A `Reduction` does so across processes.

    mean, var = merge(moments of every part)                        y_k = activation(weight · x̂_k + bias + residual_k)
    dweight, dbias = Σ_k over the parts, and over the processes     dx_k as if there were one batch
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from steadynorm import grouping as grouping_
from steadynorm.errors import InputError
from steadynorm.functional.batch import (
    count_of,
    flat_mask,
    is_packed,
    runs_composed,
    through_activation,
)
from steadynorm.functional.checks import check_affine, check_extras
from steadynorm.functional.differentiable import apart
from steadynorm.functional.packing import Packing, pack, unpack
from steadynorm.grouping import Grouping, dense_like, with_strides
from steadynorm.kernels import FROM_OUTPUT, ops, reference
from steadynorm.moments import Moments, merge, on_device

OPS = torch.ops.steadynorm


class Part(NamedTuple):
    """One of the tensors: x (N, C, *), residual (N, C, *) or None, mask (N, *) bool or None. N may differ, and be 0."""

    x: Tensor
    residual: Tensor | None = None
    mask: Tensor | None = None


class Reduction(Protocol):
    """What joins the parts of this process with those of others."""

    def merge(self, local: Moments) -> Moments:
        """The Moments of all, from those of each: the same on every process. Takes no part in autograd."""

    def add(self, local: Tensor) -> Tensor:
        """The sum over all processes, differentiable to any order."""


class _Settings(NamedTuple):
    eps: float
    activation: str | None
    reduction: Reduction | None
    groupings: tuple[Grouping, ...]


class _Together(torch.autograd.Function):
    """One node for all parts: its backward pass begins when the gradient of the last of them has arrived."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor | None, bias: Tensor | None, settings: _Settings, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        parts = _parts(tensors)
        eps, activation, reduction, groupings = settings
        call = OPS if ops.is_traced(parts[0].x) else ops
        found = []
        for (x, _, mask), grouping in zip(parts, groupings, strict=True):
            mean, var = call.moments(x, *grouping, flat_mask(mask, grouping))
            found.append(Moments(mean, var, count_of(x, mask)))
        merged = merge(found) if reduction is None else reduction.merge(merge(found))
        mean, var = merged.mean, merged.var
        ys = [
            call.normalize(x, *grouping, mean, var, weight, bias, residual, flat_mask(mask, grouping), eps, activation)
            for (x, residual, mask), grouping in zip(parts, groupings, strict=True)
        ]
        count = on_device(merged.count, mean)
        takes_output = [part.residual is not None and activation in FROM_OUTPUT for part in parts]
        sides = [
            y if takes else part.residual if activation is not None else None
            for y, takes, part in zip(ys, takes_output, parts, strict=True)
        ]
        ctx.settings, ctx.takes_output, ctx.strides = settings, takes_output, [part.x.stride() for part in parts]
        ctx.save_for_backward(weight, bias, mean, var, count, *(p.x for p in parts), *(p.mask for p in parts), *sides)
        ctx.mark_non_differentiable(mean, var, count)
        return mean, var, count, *ys

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        dys = list(gradients[3:])
        if torch.is_grad_enabled():
            return _differentiable_backward(ctx, dys)
        weight, bias, mean, var, count, *rest = ctx.saved_tensors
        eps, activation, reduction, groupings = ctx.settings
        k = len(groupings)
        xs, masks, sides = rest[:k], rest[k : 2 * k], rest[2 * k :]
        call: Any = OPS
        if not ops.is_traced(xs[0]):
            call = ops
            xs = [with_strides(x, strides) for x, strides in zip(xs, ctx.strides, strict=True)]
            sides = [t if t is None else with_strides(t, s) for t, s in zip(sides, ctx.strides, strict=True)]
        needs, sums, gs = ctx.needs_input_grad, [], []
        for i, (x, side, grouping) in enumerate(zip(xs, sides, groupings, strict=True)):
            residual, y = (None, side) if ctx.takes_output[i] else (side, None)
            dy, dys[i] = dense_like(dys[i], x), None  # type: ignore[call-overload]
            g, *both = call.backward_sums(
                dy, x, *grouping, mean, var, weight, bias, residual, y, flat_mask(masks[i], grouping), eps, activation
            )
            gs.append(g)
            sums.append(torch.stack(both))
        local = torch.stack(sums).sum(0)
        dweight, dbias = local if reduction is None else reduction.add(local)
        found: list[Tensor | None] = []
        for i, (x, grouping) in enumerate(zip(xs, groupings, strict=True)):
            dx = None
            if needs[3 + 3 * i]:
                dx = call.backward_input(
                    gs[i], x, *grouping, mean, var, weight, dweight, dbias, count, flat_mask(masks[i], grouping), eps
                )
            found += [dx, gs[i] if needs[4 + 3 * i] else None, None]
        # Those of weight and bias are the sums of this process: adding them over processes is left to whoever owns
        # the parameters (DDP, FSDP).
        return (
            local[0].to(weight.dtype) if needs[0] else None,
            local[1].to(bias.dtype) if needs[1] else None,
            None,
            *found,
        )


def _parts(tensors: Sequence[Any]) -> list[Part]:
    return [Part(*tensors[i : i + 3]) for i in range(0, len(tensors), 3)]


def _differentiable_backward(ctx: Any, dys: list[Tensor]) -> tuple[Tensor | None, ...]:
    """The backward pass as a function that can itself be differentiated, to any order."""
    weight, bias, _, _, _, *rest = ctx.saved_tensors
    eps, activation, reduction, groupings = ctx.settings
    k = len(groupings)
    weight, bias, *xs = apart(weight, bias, *rest[:k])
    masks, sides = rest[k : 2 * k], rest[2 * k :]
    needs = ctx.needs_input_grad
    parts = [Part(x, None, mask) for x, mask in zip(xs, masks, strict=True)]
    normalized, _ = _composed(parts, weight, bias, eps, None, reduction)
    gs = []
    for i, (dy, mask, side) in enumerate(zip(dys, masks, sides, strict=True)):
        if mask is not None:
            # First, since zero times what padding holds may be NaN.
            dy = torch.where(mask.unsqueeze(1), dy, 0)
            side = None if side is None else torch.where(mask.unsqueeze(1), side, 0)
        residual, y = (None, side) if ctx.takes_output[i] else (side, None)
        gs.append(through_activation(dy, normalized[i], residual, y, activation))
    wanted = [t for t, needed in ((weight, needs[0]), (bias, needs[1])) if needed]
    wanted += [x for i, x in enumerate(xs) if needs[3 + 3 * i]]
    found = iter(torch.autograd.grad(normalized, wanted, gs, create_graph=True) if wanted else ())
    gradients = [next(found) if needs[0] else None, next(found) if needs[1] else None, None]
    for i, g in enumerate(gs):
        gradients += [next(found) if needs[3 + 3 * i] else None, g if needs[4 + 3 * i] else None, None]
    return tuple(gradients)


def _composed(
    parts: Sequence[Part],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str | None,
    reduction: Reduction | None,
) -> tuple[list[Tensor], Moments]:
    """All of it as plain differentiable PyTorch: every sum over processes is a `Reduction.add`."""

    def total(local: Tensor) -> Tensor:
        return local if reduction is None else reduction.add(local)

    dtype = reference.statistics_dtype(parts[0].x)
    values = [x.to(dtype) if mask is None else torch.where(mask.unsqueeze(1), x, 0).to(dtype) for x, _, mask in parts]
    dims = [[0, *range(2, x.dim())] for x in values]
    sums = torch.stack([x.sum(d) for x, d in zip(values, dims, strict=True)]).sum(0)
    counts = torch.stack([on_device(count_of(x, mask), sums) for x, _, mask in parts])
    joined = total(torch.cat([sums, counts.sum().reshape(1)]))
    count = joined[-1].clamp(min=1)
    mean = joined[:-1] / count
    squares = []
    for x, d, (_, _, mask) in zip(values, dims, parts, strict=True):
        centred = x - mean.view(1, -1, *[1] * (x.dim() - 2))
        squares.append((centred if mask is None else torch.where(mask.unsqueeze(1), centred, 0)).square().sum(d))
    var = total(torch.stack(squares).sum(0)) / count
    ys = [
        reference.compose(x, weight, bias, residual, mask, eps, activation, (mean, var))[0]
        for x, residual, mask in parts
    ]
    return ys, Moments(mean.detach(), var.detach(), joined[-1].detach())


def normalize_together(
    parts: Sequence[Part],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    activation: str | None = None,
    reduction: Reduction | None = None,
) -> tuple[list[Tensor], Moments]:
    """Normalise every part with the statistics of all: output, gradients and Moments are those of one batch.

    Args:
        parts: at least one; x and residual of all in one dtype and with the same C.
        weight, bias: (C,) or None. Their gradients are the sums over the parts of this process.
        activation: None or one of `ACTIVATIONS`.
        reduction: how to reach the parts of other processes, all of which call with parts of their own.

    Returns: y (N, C, *) of every part, and the Moments of all, float64 and detached.

    Raises:
        InputError: a part that does not fit the others, or a weight or bias that does not fit them.

    Source: Ioffe & Szegedy, Batch Normalization (2015), Algorithm 1, over a batch that is never in one place.
    """
    _check(parts, activation)
    check_affine(parts[0].x, weight, bias)
    if any(runs_composed(x, residual) for x, residual, _ in parts):
        return _composed(parts, weight, bias, eps, activation, reduction)
    tensors: list[Tensor | None] = []
    groupings = []
    packings = [Packing(x, mask) if mask is not None and is_packed(x, mask) else None for x, _, mask in parts]
    for (x, residual, mask), packing in zip(parts, packings, strict=True):
        if packing is not None:
            x, residual, mask = pack(x, packing), None if residual is None else pack(residual, packing), None
        x, grouping = grouping_.batch(x)
        groupings.append(grouping)
        tensors += [x, None if residual is None else dense_like(residual, x), mask]
    settings = _Settings(eps, activation, reduction, tuple(groupings))
    mean, var, count, *ys = _Together.apply(weight, bias, settings, *tensors)
    ys = [y if packing is None else unpack(y, packing) for y, packing in zip(ys, packings, strict=True)]
    if reduction is None and all(part.mask is None for part in parts):
        count = sum(grouping.values_per_group for grouping in groupings)
    return ys, Moments(mean, var, count)


def _check(parts: Sequence[Part], activation: str | None) -> None:
    if not parts:
        raise InputError("normalize_together got no parts: give at least one.")
    first = parts[0].x
    for x, residual, mask in parts:
        if x.shape[1] != first.shape[1] or x.dtype != first.dtype:
            raise InputError(
                f"normalize_together got parts {tuple(first.shape)} of {first.dtype} and {tuple(x.shape)} of"
                f" {x.dtype}: parts of one batch have the same channels and dtype."
            )
        check_extras(x, residual, activation, mask)
