"""The one comparison of a computed weight with its oracle: value, every gradient, dtype, inputs unchanged."""

from __future__ import annotations

import math

import numpy as np
import torch

WEIGHT_ROUNDINGS = 8
"""On the way to one weight: a length or two moments, the root, its reciprocal, the products."""


def assert_weight_agrees(candidate, oracle, tensors, *, roundings=WEIGHT_ROUNDINGS):
    """`candidate` over tensors against `oracle` over float64 arrays, with a random cotangent.

    The error is measured against the largest value of a row (the natural size of a number that other values of its
    row enter), in units of the type that is computed in, plus the rounding of the number itself in a half type.
    """
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    expectation = oracle(*(t.detach().double().numpy() for t in leaves))
    rng = np.random.default_rng(5)
    dw = torch.from_numpy(rng.standard_normal(expectation.weight.shape)).to(leaves[-1].dtype)
    weight = candidate(*leaves)
    assert weight.dtype == tensors[-1].dtype, f"weight is {weight.dtype}, not {tensors[-1].dtype}"
    found = torch.autograd.grad(weight, leaves, dw)
    for leaf, before in zip(leaves, tensors, strict=True):
        assert torch.equal(leaf, before), "an input was overwritten"
    check("weight", weight, expectation.weight, roundings)
    names = ("first", "second")
    for name, got, expected in zip(names, found, expectation.gradients(dw.double().numpy()), strict=False):
        check(f"gradient of the {name}", got, expected, roundings)


def check(name, got, expected, roundings):
    computed = torch.float64 if got.dtype == torch.float64 else torch.float32
    fan_in = expected[0].size if expected.ndim > 1 else 1
    unit = torch.finfo(computed).eps / 2 * (roundings + math.log2(max(fan_in, 1)))
    rows = np.abs(expected).reshape(expected.shape[0], -1).max(1) if expected.ndim > 1 else np.abs(expected).max()
    size = np.maximum(rows.reshape(-1, *(1,) * (expected.ndim - 1)) if expected.ndim > 1 else rows, np.abs(expected))
    # A gradient is a difference of parts of the size of the largest of all rows.
    allowed = unit * np.maximum(size, np.abs(expected).max() if "gradient" in name else 0)
    if got.dtype != computed:
        allowed = allowed + torch.finfo(got.dtype).eps / 2 * np.abs(expected)
    error = np.abs(got.detach().double().numpy() - expected)
    assert np.isfinite(error).all(), f"{name} is not finite"
    assert (error <= allowed).all(), (
        f"{name} is off by {error.max():.3g}, {(error / (allowed + 1e-300)).max():.3g} too far"
    )
