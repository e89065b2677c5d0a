"""The one comparison of a normalization within samples with the oracle, as `tests/agree.py` has it over the batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests import oracles
from tests.agree import KINK_MARGIN, LAST, array, half_ulp, memory, tolerance
from tests.cases import laid_out
from tests.oracles import Array, Labels, Within
from tests.sample_cases import SampleCase, SampleInputs

Candidate = Callable[[SampleCase, SampleInputs], tuple[Tensor, Tensor | None]]
NAMES = ("x", "addend", "weight", "bias", "residual")


@dataclass
class Bench:
    """One case, what the oracle says of it, and the cotangents."""

    case: SampleCase
    inputs: SampleInputs
    total: Tensor
    ahead: Within
    dy: Tensor
    dtotal: Tensor | None

    @classmethod
    def of(cls, case: SampleCase) -> Bench:
        inputs = case.inputs()
        # The sum is stored in the dtype of x, and what is stored is normalised.
        total = inputs.x if inputs.addend is None else inputs.x + inputs.addend
        statistics, weights = case.labels()
        ahead = oracles.within_samples(
            array(total),
            statistics,
            weights,
            weight=array(inputs.weight),
            bias=array(inputs.bias),
            eps=case.eps,
            residual=array(inputs.residual),
            activation=case.activation,
            mask=array(inputs.mask),
            is_centred=case.is_centred,
            weight_offset=case.weight_offset,
        )
        dtotal = None if inputs.addend is None else _laid_out(case.cotangent("dtotal"), case)
        bench = cls(case, inputs, total, ahead, torch.empty(0), dtotal)
        dy = case.cotangent()
        for kink in oracles.KINKS[case.activation]:
            # Where rounding decides the derivative, none is asked for.
            dy = np.where(np.abs(ahead.z - kink) <= KINK_MARGIN * bench.relative() * bench.z_size(), 0.0, dy)
        bench.dy = _laid_out(dy, case)
        return bench

    def relative(self) -> Array:
        """The error allowed relative to the natural size of a number, value by value."""
        condition = np.abs(self.ahead.mean) * self.ahead.invstd
        found: Array = tolerance(self.case.dtype, int(self.ahead.count.max(initial=1)), condition)
        return found

    def largest(self, values: Array) -> Array:
        """The largest absolute value behind each statistic, at each of its places."""
        return _largest_by(self.case.labels()[0], values)

    def z_size(self) -> Array:
        """The size of the terms that are added to give z."""
        bias, residual = array(self.inputs.bias), array(self.inputs.residual)
        size: Array = np.abs(self.ahead.scale) * (1.0 + self.largest(self.ahead.x_hat))
        if bias is not None:
            size = size + np.abs(bias.ravel()[self.case.labels()[1]])
        return size if residual is None else size + np.abs(np.nan_to_num(residual))

    def bounds(self) -> dict[str, tuple[Array, Array]]:
        """By name, what a result should be and how far off it may be."""
        ahead, relative, dy = self.ahead, self.relative(), array(self.dy)
        dtotal = array(self.dtotal)
        grads = ahead.gradients(dy, dtotal)
        valid = oracles.everywhere(array(self.inputs.mask), dy)
        slope = ahead.invstd * self.largest(np.where(valid, dy * ahead.scale, 0.0))
        dx_size = slope * (1.0 + self.largest(ahead.x_hat)) + (0.0 if dtotal is None else np.abs(dtotal))
        dx_allowed = relative * dx_size
        if self.case.activation is not None and self.case.dtype.itemsize == 2:
            # The gradient of z may be kept in the type of x between two passes: rounded once more.
            dx_allowed = dx_allowed + half_ulp(self.case.dtype) * ahead.invstd * np.abs(ahead.scale * grads.dresidual)
        _, weights = self.case.labels()
        width = len(grads.dweight)
        terms = np.bincount(weights.ravel(), ((dy * valid * (1.0 + np.abs(ahead.x_hat))) ** 2).ravel(), width)
        worst = np.zeros(width)
        np.maximum.at(worst, weights.ravel(), relative.ravel())
        sums = worst * (np.abs(grads.dweight) + np.abs(grads.dbias) + np.sqrt(terms))
        return {
            "y": (ahead.y, relative * self.z_size()),
            "dx": (grads.dx, dx_allowed),
            "daddend": (grads.dx, dx_allowed),
            "dresidual": (grads.dresidual, relative * self.largest(dy * valid)),
            "dweight": (grads.dweight.reshape(self.case.weight_shape), sums.reshape(self.case.weight_shape)),
            "dbias": (grads.dbias.reshape(self.case.weight_shape), sums.reshape(self.case.weight_shape)),
        }


def _laid_out(values: Array, case: SampleCase) -> Tensor:
    return laid_out(torch.from_numpy(values).to(case.dtype), case.cotangent_layout or case.layout)


def _largest_by(labels: Labels, values: Array) -> Array:
    found = np.zeros(int(labels.max(initial=0)) + 1)
    np.maximum.at(found, labels.ravel(), np.abs(values).ravel())
    return found[labels]


def assert_agrees(candidate: Candidate, case: SampleCase) -> None:
    """Run `candidate` on `case` and compare all of it with the oracle, or fail with what is wrong and by how much.

    Compared: y, the returned sum (to the bit), every gradient for random cotangents of both; dtype, shape and memory
    format of each; that a second backward gives the same bits; that no input has changed.
    """
    bench = Bench.of(case)
    found = run(candidate, bench)
    problems = [f"{name}: {problem}" for name in found for problem in _form(name, found[name], bench)]
    for name, (expected, allowed) in bench.bounds().items():
        if name in found:
            error = np.abs(array(found[name]) - expected)
            worst = float(
                (np.where(np.isnan(error), np.inf, error) - _limit(expected, allowed, found[name])).max(initial=0)
            )
            if worst > 0:
                problems.append(f"{name} is off by {error.max():.3g}, {worst:.3g} more than is allowed")
    assert not problems, f"{case}: " + "; ".join(problems)


def run(candidate: Candidate, bench: Bench) -> dict[str, Tensor]:
    """Forward and backward of `candidate`, checking on the way that it leaves its inputs alone."""
    inputs, case = bench.inputs, bench.case
    leaves = {name: t.requires_grad_() for name in NAMES if (t := getattr(inputs, name)) is not None}
    fixed = [*leaves.values(), bench.dy, *([inputs.mask] if inputs.mask is not None else [])]
    before = [memory(tensor) for tensor in fixed]
    y, total = candidate(case, inputs)
    assert y.requires_grad, f"{case}: the output does not lead back to its inputs"
    outputs: list[Tensor] = [y]
    cotangents: list[Any] = [bench.dy.to(y.dtype)]
    if bench.dtotal is not None:
        assert total is not None
        assert torch.equal(total, bench.total), f"{case}: the returned sum is not x + addend"
        outputs, cotangents = [y, total], [*cotangents, bench.dtotal]
    again, grads = (
        torch.autograd.grad(outputs, list(leaves.values()), cotangents, retain_graph=True) for _ in range(2)
    )
    for name, first, second in zip(leaves, again, grads, strict=True):
        assert torch.equal(memory(first), memory(second)), f"{case}: d{name} differs when asked for a second time"
    for tensor, bytes_before in zip(fixed, before, strict=True):
        assert torch.equal(memory(tensor), bytes_before), f"{case}: an input was overwritten"
        shared = tensor.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()
        assert not shared or y.numel() == 0, f"{case}: the output shares memory with an input"
    return {"y": y.detach(), **{f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}}


def _form(name: str, tensor: Tensor, bench: Bench) -> list[str]:
    """What is wrong with the dtype, shape or memory format of one result."""
    like, problems = getattr(bench.inputs, "x" if name == "y" else name.removeprefix("d")), []
    for quality in ("dtype", "shape"):
        if getattr(tensor, quality) != getattr(like, quality):
            problems.append(f"{quality} is {getattr(tensor, quality)}, not {getattr(like, quality)}")
    # Rows of a channels-last tensor are copied together; the layout of their gradient is autograd's to choose.
    kept = ("y",) if bench.case.norm in ("layer", "rms", "gemma") else ("y", "dx")
    if name in kept and bench.case.layout in ("plain", "channels_last"):
        wanted = LAST[like.dim()] if bench.case.layout == "channels_last" else torch.contiguous_format
        if not tensor.is_contiguous(memory_format=wanted):
            problems.append(f"memory format is not {wanted}, strides {tuple(tensor.stride())}")
    return problems


def _limit(expected: Array, allowed: Array, found: Tensor) -> Array:
    """An absolute allowance, and what rounding the number itself to a half type costs."""
    if found.dtype not in (torch.float16, torch.bfloat16):
        return allowed
    smallest = torch.finfo(found.dtype).smallest_normal
    return allowed + np.maximum(np.abs(expected) + allowed, smallest) * half_ulp(found.dtype)
