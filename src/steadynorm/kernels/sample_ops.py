"""Normalization within a sample as torch ops, as `ops.py` has normalization over the batch."""

from typing import Any

import torch
from torch import Tensor

from steadynorm.grouping import SampleGrouping
from steadynorm.kernels.backends import choose_sample
from steadynorm.kernels.ops import gradient_like
from steadynorm.kernels.reference import as_gradient, statistics_dtype

LIBRARY = torch.library.Library("steadynorm", "FRAGMENT")
OPS = torch.ops.steadynorm
VIEW = "SymInt samples, SymInt outer, SymInt groups, SymInt channels, SymInt inner, bool is_per_position"
SETTINGS = "Tensor? mask, float eps, str? activation, bool is_centred, float weight_offset"

LIBRARY.define(
    f"sample_forward(Tensor x, Tensor? addend, {VIEW}, Tensor? weight, Tensor? bias, Tensor? residual, {SETTINGS})"
    " -> (Tensor y, Tensor total, Tensor mean, Tensor var)"
)
LIBRARY.define(
    f"sample_backward(Tensor dy, Tensor? dtotal, Tensor total, {VIEW}, Tensor mean, Tensor var, Tensor? weight,"
    f" Tensor? bias, Tensor? residual, Tensor? y, {SETTINGS}, bool needs_dresidual, bool needs_affine)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual)"
)


def sample_forward(
    x: Tensor,
    addend: Tensor | None,
    samples: int,
    outer: int,
    groups: int,
    channels: int,
    inner: int,
    is_per_position: bool,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    eps: float,
    activation: str | None,
    is_centred: bool,
    weight_offset: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, total, mean and var; total is empty without an addend, since an op may not return its input."""
    grouping = SampleGrouping(samples, outer, groups, channels, inner, is_per_position)
    backend = choose_sample(x, grouping, masked=mask is not None)
    y, total, mean, var = backend.sample_forward(
        x, addend, grouping, weight, bias, residual, mask, eps, activation, is_centred, weight_offset
    )
    return y, x.new_empty(0) if addend is None else total, mean, var


def sample_backward(
    dy: Tensor,
    dtotal: Tensor | None,
    total: Tensor,
    samples: int,
    outer: int,
    groups: int,
    channels: int,
    inner: int,
    is_per_position: bool,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor | None,
    mask: Tensor | None,
    eps: float,
    activation: str | None,
    is_centred: bool,
    weight_offset: float,
    needs_dresidual: bool,
    needs_affine: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dweight and dbias in the dtypes of weight and bias, the gradient of the residual; unasked for, empty."""
    grouping = SampleGrouping(samples, outer, groups, channels, inner, is_per_position)
    backend = choose_sample(total, grouping, masked=mask is not None)
    dx, dweight, dbias, dresidual = backend.sample_backward(
        dy,
        dtotal,
        total,
        grouping,
        mean,
        var,
        weight,
        bias,
        residual,
        y,
        mask,
        eps,
        activation,
        is_centred,
        weight_offset,
        needs_dresidual,
        needs_affine,
    )
    if not needs_affine:
        dweight, dbias = mean.new_empty(0), mean.new_empty(0)
    dweight, dbias = as_gradient(dweight, weight), as_gradient(dbias, bias)
    return dx, dweight, dbias, total.new_empty(0) if dresidual is None else dresidual


def _statistics_like(x: Tensor, count: int) -> Tensor:
    return x.new_empty(count, dtype=statistics_dtype(x))


def _fake_forward(
    x: Tensor,
    addend: Tensor | None,
    samples: int,
    outer: int,
    groups: int,
    channels: int,
    inner: int,
    is_per_position: bool,
    *_: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    count = samples * (inner if is_per_position else groups)
    total = x.new_empty(0) if addend is None else torch.empty_like(x)
    return torch.empty_like(x), total, _statistics_like(x, count), _statistics_like(x, count)


def _fake_backward(
    dy: Tensor, dtotal: Tensor | None, total: Tensor, samples: int, outer: int, groups: int, channels: int, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _inner, _is_per_position, _mean, _var, weight, bias, *_, needs_dresidual, needs_affine = rest
    width = groups * channels if needs_affine else 0
    dweight, dbias = (gradient_like(total, parameter, width) for parameter in (weight, bias))
    dresidual = torch.empty_like(total) if needs_dresidual else total.new_empty(0)
    return torch.empty_like(total), dweight, dbias, dresidual


LIBRARY.impl("sample_forward", sample_forward, "CompositeExplicitAutograd")
LIBRARY.impl("sample_backward", sample_backward, "CompositeExplicitAutograd")
torch.library.register_fake("steadynorm::sample_forward", _fake_forward)
torch.library.register_fake("steadynorm::sample_backward", _fake_backward)
