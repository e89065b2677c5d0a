"""The one comparison of an implementation with the oracle: everything a training step can see."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tests import oracles
from tests.cases import Case, Inputs, laid_out
from tests.oracles import Array, Expectation

Candidate = Callable[..., Tensor]
Oracle = Callable[..., Expectation]

LAST = {4: torch.channels_last, 5: torch.channels_last_3d}

# Roundings on the way to one output: subtract, scale, shift, add, the root, and an activation good to a few of them.
ROUNDINGS = 6
# Mean and pivot each carry a rounding of their own size, which the normalization divides by the deviation.
CONDITION = 2
# No gradient is asked for closer to a kink of the activation than this many times the tolerance of its input.
KINK_MARGIN = 4


def half_ulp(dtype: torch.dtype) -> float:
    """Largest relative error of rounding to `dtype`."""
    return torch.finfo(dtype).eps / 2


def tolerance(dtype: torch.dtype, count: int, condition: Any = 0.0) -> Any:
    """Largest error allowed, relative to the natural size of the number that is compared.

    unit · (roundings + log2(count) + 2 · condition)

    `unit` is half an ulp of the type that is computed in: float64 for float64, float32 for everything else.
    `log2(count)` is how the error of a sum grows that is added in blocks. `condition` is |mean| / sqrt(var + eps) per
    channel: what rounding a mean to float32 costs after the division. Storing in a half type adds the rounding of
    the number itself (see `_limit`), and nothing else.
    """
    unit = half_ulp(torch.float64 if dtype == torch.float64 else torch.float32)
    return unit * (ROUNDINGS + math.log2(max(count, 1)) + CONDITION * condition)


@dataclass
class Outcome:
    """What a candidate gave: tensors by name, and the tensors it was given."""

    tensors: dict[str, Tensor]
    inputs: Inputs


@dataclass
class Bound:
    """What a number should be, how far from it the candidate may be, and one rounding of it, elementwise."""

    expected: Array
    allowed: Array
    rounding: Array


class Error(NamedTuple):
    """The largest error of one result: as it is, as a share of what is allowed, and in roundings."""

    largest: float
    share: float
    roundings: float


def assert_agrees(candidate: Candidate, oracle: Oracle, case: Case) -> None:
    """Run `candidate` on `case` and compare all of it with `oracle`, or fail with what is wrong and by how much.

    Compared: output, gradients of x, weight, bias and residual for a random cotangent, running statistics; the dtype,
    shape, device and memory format of each; that a second backward gives the same bits; and that no input has changed.

    Args:
        candidate: called as torch.nn.functional.batch_norm is, and with residual=, activation=, mask= where the case
            has them; returns y and updates the running statistics.
        oracle: the same signature over NumPy float64 arrays, returns an Expectation.
    """
    inputs = case.inputs()
    expectation = ask(oracle, inputs, case)
    dy = cotangent(expectation, inputs, case)
    expected = bounds(expectation, inputs, case, dy)
    outcome = run(candidate, inputs, case, dy)
    problems = [f"{name}: {problem}" for name in outcome.tensors for problem in _form(name, outcome, case)]
    problems += _values(outcome, expected)
    assert not problems, f"{case.name}: " + "; ".join(problems)


def array(tensor: Tensor | None) -> Any:
    """A copy of a tensor as the oracle takes it."""
    if tensor is None:
        return None
    tensor = tensor.detach().cpu()
    return (tensor if tensor.dtype == torch.bool else tensor.double()).numpy().copy()


def ask(oracle: Oracle, inputs: Inputs, case: Case) -> Expectation:
    """What the oracle says about the case."""
    return oracle(
        array(inputs.x),
        array(inputs.running_mean),
        array(inputs.running_var),
        array(inputs.weight),
        array(inputs.bias),
        case.training,
        case.momentum,
        case.eps,
        residual=array(inputs.residual),
        activation=case.activation,
        mask=array(inputs.mask),
    )


def cotangent(expectation: Expectation, inputs: Inputs, case: Case) -> Tensor:
    """A random dy, zero where z is so close to a kink of the activation that its rounding decides the derivative."""
    dy = case.cotangent()
    z = expectation.ahead.z
    relative = tolerance(case.dtype, expectation.ahead.count, _condition(expectation, case))
    width = KINK_MARGIN * oracles.spread(relative * _z_size(expectation, inputs), z.ndim)
    for kink in oracles.KINKS[case.activation]:
        dy = np.where(np.abs(z - kink) <= width, 0.0, dy)
    return laid_out(torch.from_numpy(dy).to(case.dtype), case.cotangent_layout or case.layout)


def run(candidate: Candidate, inputs: Inputs, case: Case, dy: Tensor) -> Outcome:
    """Forward and backward of `candidate`, checking on the way that it leaves its inputs alone."""
    leaves = {
        name: tensor.requires_grad_()
        for name in ("x", "weight", "bias", "residual")
        if (tensor := getattr(inputs, name)) is not None
    }
    fixed = [*leaves.values(), dy, *([inputs.mask] if inputs.mask is not None else [])]
    if not case.training:
        fixed += [inputs.running_mean, inputs.running_var]
    before = [memory(tensor) for tensor in fixed]
    extra: dict[str, Any] = {"residual": inputs.residual, "activation": case.activation, "mask": inputs.mask}
    y = candidate(
        inputs.x,
        inputs.running_mean,
        inputs.running_var,
        inputs.weight,
        inputs.bias,
        case.training,
        case.momentum,
        case.eps,
        **{name: value for name, value in extra.items() if value is not None},
    )
    assert y.requires_grad, f"{case.name}: the output does not lead back to its inputs"
    again, grads = (torch.autograd.grad(y, list(leaves.values()), dy, retain_graph=True) for _ in range(2))
    for name, first, second in zip(leaves, again, grads, strict=True):
        assert torch.equal(memory(first), memory(second)), f"{case.name}: d{name} differs when asked for a second time"
    for tensor, bytes_before in zip(fixed, before, strict=True):
        assert torch.equal(memory(tensor), bytes_before), f"{case.name}: an input was overwritten"
        shared = tensor.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()
        assert not shared or y.numel() == 0, f"{case.name}: the output shares memory with an input"
    named = {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    statistics = {"running_mean": inputs.running_mean, "running_var": inputs.running_var}
    return Outcome({"y": y.detach(), **named, **statistics}, inputs)


def memory(tensor: Tensor) -> Tensor:
    """A copy of every byte of the storage behind `tensor`, so that NaN, gaps and layout count too."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.detach().untyped_storage()).clone()


def bounds(expectation: Expectation, inputs: Inputs, case: Case, dy_tensor: Tensor) -> dict[str, Bound]:
    """What each result should be and how far off it may be.

    The size of a number is that of the terms it is made of; of a sum of many, the root of the sum of their squares:
    that is the size of a sum of roundings, which have no common sign.
    """
    ahead = expectation.ahead
    dy = array(dy_tensor)
    grads = expectation.gradients(dy)
    condition = _condition(expectation, case)
    loose, sharp = tolerance(case.dtype, ahead.count, condition), tolerance(case.dtype, ahead.count)
    valid = oracles.everywhere(array(inputs.mask), dy)
    weight = 1.0 if inputs.weight is None else np.abs(array(inputs.weight))
    dy_max = _channel_max(np.where(valid, dy, 0.0))
    slope = weight * ahead.invstd
    dx_size = slope * dy_max * (1.0 + _channel_max(ahead.x_hat))
    terms = np.sqrt(oracles.total((dy * (1.0 + np.abs(ahead.x_hat))) ** 2, valid))
    sum_size = np.abs(grads.dweight) + np.abs(grads.dbias) + terms
    mean_size = np.abs(array(inputs.running_mean)) + np.abs(ahead.mean)
    parameter = case.dtype if inputs.weight is None else inputs.weight.dtype
    statistic = inputs.running_mean.dtype

    def bound(expected: Array, relative: Array | float, size: Array, dtype: torch.dtype) -> Bound:
        allowed, rounding = relative * size, tolerance(case.dtype, 1) / ROUNDINGS * size
        if rounding.ndim != expected.ndim:
            allowed, rounding = (oracles.spread(values, expected.ndim) for values in (allowed, rounding))
        return Bound(expected, _limit(expected, allowed, dtype), np.broadcast_to(rounding, expected.shape))

    dx = bound(grads.dx, loose, dx_size, case.dtype)
    if case.activation is not None and case.dtype.itemsize == 2:
        # The gradient of z is kept in the type of x between the two passes: rounded once more, where it is not dy.
        dx.allowed = dx.allowed + half_ulp(case.dtype) * oracles.spread(slope, dy.ndim) * np.abs(grads.dresidual)
    return {
        "y": bound(ahead.y, loose, _z_size(expectation, inputs), case.dtype),
        "dx": dx,
        "dresidual": bound(grads.dresidual, loose, dy_max, case.dtype),
        "dweight": bound(grads.dweight, loose, sum_size, parameter),
        "dbias": bound(grads.dbias, loose, sum_size, parameter),
        "running_mean": bound(expectation.running_mean, sharp, mean_size, statistic),
        "running_var": bound(expectation.running_var, loose, expectation.running_var, statistic),
    }


def errors(outcome: Outcome, expected: dict[str, Bound]) -> dict[str, Error]:
    """By name, how far off the results are."""
    found = {}
    for name, tensor in outcome.tensors.items():
        bound = expected[name]
        error = np.abs(array(tensor) - bound.expected)
        error = np.where(np.isnan(error), np.inf, error)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = [np.where(error == 0, 0.0, error / unit) for unit in (bound.allowed, bound.rounding)]
        found[name] = Error(*(float(values.max(initial=0.0)) for values in (error, *ratios)))
    return found


def _values(outcome: Outcome, expected: dict[str, Bound]) -> list[str]:
    return [
        f"{name} is off by {error.largest:.3g}, {error.share:.3g} times what is allowed"
        for name, error in errors(outcome, expected).items()
        if not error.share <= 1.0
    ]


def _form(name: str, outcome: Outcome, case: Case) -> list[str]:
    """What is wrong with the dtype, shape, device or memory format of one result."""
    like = getattr(outcome.inputs, "x" if name == "y" else name.removeprefix("d"))
    tensor, problems = outcome.tensors[name], []
    for quality in ("dtype", "shape", "device"):
        if getattr(tensor, quality) != getattr(like, quality):
            problems.append(f"{quality} is {getattr(tensor, quality)}, not {getattr(like, quality)}")
    if name in ("y", "dx") and case.layout in ("plain", "channels_last"):
        wanted = LAST[like.dim()] if case.layout == "channels_last" else torch.contiguous_format
        if not tensor.is_contiguous(memory_format=wanted):
            problems.append(f"memory format is not {wanted}, strides {tuple(tensor.stride())}")
    return problems


def _limit(expected: Array, absolute: Array, dtype: torch.dtype) -> Array:
    """An absolute allowance, and what rounding the number itself to a half type costs."""
    if dtype in (torch.float16, torch.bfloat16):
        finfo = torch.finfo(dtype)
        rounding = np.maximum(np.abs(expected) + absolute, finfo.smallest_normal) * half_ulp(dtype)
        return absolute + rounding
    return np.broadcast_to(absolute, expected.shape)


def _channel_max(values: Array) -> Array:
    return np.abs(values).max(axis=tuple(i for i in range(values.ndim) if i != 1), initial=0.0)


def _condition(expectation: Expectation, case: Case) -> Array:
    ahead = expectation.ahead
    return np.abs(ahead.mean) / np.sqrt(ahead.var + case.eps)


def _z_size(expectation: Expectation, inputs: Inputs) -> Array:
    """Per channel: the size of the terms that are added to give z."""
    weight = 1.0 if inputs.weight is None else np.abs(array(inputs.weight))
    bias = 0.0 if inputs.bias is None else np.abs(array(inputs.bias))
    size = weight * (1.0 + _channel_max(expectation.ahead.x_hat)) + bias
    return size if inputs.residual is None else size + _channel_max(np.nan_to_num(array(inputs.residual)))


def derivatives(call: Callable[[], Tensor], leaves: Sequence[Tensor], order: int) -> list[Tensor]:
    """Gradients of the squares of gradients of ... of the mean square of what `call` gives."""
    found = [call().square().mean()]
    for left in reversed(range(order)):
        total = torch.stack([t.square().sum() for t in found]).sum()
        found = [*torch.autograd.grad(total, leaves, create_graph=left > 0)]
    return found
