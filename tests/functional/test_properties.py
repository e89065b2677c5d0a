from __future__ import annotations

import contextlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steadynorm import kernels
from steadynorm.functional import normalize_batch
from tests import agree, cases, oracles

shapes = st.tuples(st.integers(2, 6), st.integers(1, 5), st.integers(1, 7))
seeds = st.integers(0, 2**31)


def random(shape, seed, dtype=torch.float64):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).to(dtype)


@given(shapes, seeds, st.floats(-1e3, 1e3))
def test_the_input_gradient_is_orthogonal_to_a_shift_and_a_scale(shape, seed, offset):
    """Σ dx = 0 and, but for eps, Σ dx·x̂ = 0 in every group: neither a shift nor a scale of x changes y."""
    x, dy = (offset + random(shape, seed)).requires_grad_(), random(shape, seed + 1)
    y, _ = normalize_batch(x, eps=1e-14)
    (dx,) = torch.autograd.grad(y, x, dy)
    slope = x.detach().var((0, 2), correction=0).rsqrt() * dy.abs().amax((0, 2)) * shape[0] * shape[2]
    assert (dx.sum((0, 2)).abs() <= 1e-11 * (1 + abs(offset)) * slope).all()
    assert ((dx * y.detach()).sum((0, 2)).abs() <= 1e-9 * (1 + abs(offset)) * slope).all()


@given(shapes, seeds, st.floats(0.1, 10), st.floats(-10, 10), st.sampled_from([-1, 1]))
def test_a_scale_and_a_shift_of_the_input_do_not_matter(shape, seed, a, b, sign):
    x = random(shape, seed)
    plain, _ = normalize_batch(x, eps=1e-14)
    moved, _ = normalize_batch(sign * a * x + b, eps=1e-14)
    torch.testing.assert_close(moved, sign * plain, rtol=1e-6, atol=1e-6)


@given(shapes, seeds)
def test_permuting_samples_permutes_the_output(shape, seed):
    x = random(shape, seed)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(shape[0]))
    torch.testing.assert_close(normalize_batch(x[order])[0], normalize_batch(x)[0][order])


@given(shapes, seeds)
def test_the_output_is_standard(shape, seed):
    y, moments = normalize_batch(random(shape, seed), eps=0.0)
    torch.testing.assert_close(y.mean((0, 2)), torch.zeros(shape[1]).double(), atol=1e-9, rtol=0)
    torch.testing.assert_close(y.square().mean((0, 2)), torch.ones(shape[1]).double())
    assert moments.count == shape[0] * shape[2]


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masked_equals_concatenated(backend, activation, dtype):
    """Output, statistics and all gradients are those of the valid values put one after another."""
    backend.needs(torch.ones(3, 5, 7, dtype=dtype))
    lengths = [7, 1, 4]
    sequences = [torch.randn(5, n, dtype=dtype) for n in lengths]
    padded, padded_residual = torch.full((3, 5, 7), math.nan, dtype=dtype), torch.full((3, 5, 7), math.nan, dtype=dtype)
    mask = torch.arange(7) < torch.tensor(lengths)[:, None]
    for row, other, sequence in zip(padded, padded_residual, sequences, strict=True):
        row[:, : sequence.shape[1]] = sequence
        other[:, : sequence.shape[1]] = sequence.flip(1)
    joined = torch.cat(sequences, 1)[None]
    joined_residual = torch.cat([sequence.flip(1) for sequence in sequences], 1)[None]
    weight, bias = torch.randn(5, dtype=dtype), torch.randn(5, dtype=dtype)
    found = []
    for x, residual, valid in ((padded, padded_residual, mask), (joined, joined_residual, None)):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias, residual)]
        y, moments = normalize_batch(*leaves[:3], residual=leaves[3], activation=activation, mask=valid)
        picked = y.movedim(1, -1)[mask].T if valid is not None else y[0]
        cotangent = torch.linspace(-1, 2, picked.numel(), dtype=dtype).reshape(picked.shape)
        dx, dweight, dbias, dresidual = torch.autograd.grad((picked * cotangent).sum(), leaves)
        if valid is not None:
            for gradient in (y.detach(), dx, dresidual):
                assert (gradient.movedim(1, -1)[~mask] == 0).all()
            dx, dresidual = (t.movedim(1, -1)[mask].T[None] for t in (dx, dresidual))
        count = torch.as_tensor(moments.count)
        found.append([picked, moments.mean, moments.var, count, dx, dweight, dbias, dresidual])
    for masked, concatenated in zip(*found, strict=True):
        torch.testing.assert_close(masked, concatenated, rtol=1e-5, atol=1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("name", ["plain", "channels last", "rows", "bfloat16", "add, relu", "lengths"])
def test_moments_are_those_of_the_batch_in_float64_and_detached(backend, name):
    case = cases.BY_NAME[name]
    backend.needs(case.inputs().x)
    inputs = case.inputs()
    _, moments = normalize_batch(inputs.x.requires_grad_(), inputs.weight, inputs.bias, mask=inputs.mask)
    mean, var, count = oracles.moments(agree.array(inputs.x), agree.array(inputs.mask))
    for found, expected in ((moments.mean, mean), (moments.var, var)):
        assert found.dtype == torch.float64
        assert not found.requires_grad
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=1e-6)
    assert int(moments.count) == count


@pytest.mark.parametrize("layout", ["plain", "channels last"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.97])
def test_masks_of_many_runs(layout, share):
    """Few runs are copied one by one, many gathered value by value; NaN in the padding is harmless."""
    x, residual, dy = (torch.randn(3, 6, 4, 50) for _ in range(3))
    mask = torch.rand(3, 4, 50) < share
    if layout == "channels last":
        x, residual, dy = (t.to(memory_format=torch.channels_last) for t in (x, residual, dy))
    poisoned = torch.where(mask.unsqueeze(1), x, math.nan)
    weight = torch.rand(6) + 0.5
    found = []
    for values, name in ((x, "reference"), (poisoned, "automatic")):
        leaves = values.clone().requires_grad_(), residual.clone().requires_grad_(), weight.clone().requires_grad_()
        with kernels.backend(name) if name == "reference" else contextlib.nullcontext():
            y, moments = normalize_batch(leaves[0], leaves[2], residual=leaves[1], activation="silu", mask=mask)
        found.append([y, moments.mean, moments.var, moments.count, *torch.autograd.grad(y, leaves, dy)])
        assert y.stride() == x.stride()
        assert found[-1][4].stride() == x.stride()
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
