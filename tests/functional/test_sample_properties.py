from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steadynorm import functional as S
from steadynorm import kernels
from steadynorm.functional.layer import normalize_positions

sizes = st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(2, 12))
seeds = st.integers(0, 2**31)
FLOATS = [torch.float32, torch.float64]


@pytest.fixture(autouse=True, scope="module")
def reference():
    """What holds for the definition holds for the kernels that agree with it, and float64 ones take long to compile."""
    with kernels.backend("reference"):
        yield


def random(shape, seed):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


@given(sizes, seeds)
def test_one_group_is_a_layer_norm_of_the_sample(shape, seed):
    x, (_, c, length) = random(shape, seed), shape
    weight, bias = random((c,), seed + 1), random((c,), seed + 2)
    wide = [t[:, None].expand(c, length) for t in (weight, bias)]
    expected = S.layer_norm(x, (c, length), *wide)
    torch.testing.assert_close(S.group_norm(x, 1, weight, bias), expected)


@given(sizes, seeds)
def test_a_group_for_every_channel_is_an_instance_norm(shape, seed):
    x, weight, bias = random(shape, seed), random(shape[1:2], seed + 1), random(shape[1:2], seed + 2)
    expected = S.instance_norm(x, weight=weight, bias=bias)
    assert torch.equal(S.group_norm(x, shape[1], weight, bias), expected)


@given(sizes.filter(lambda shape: shape[1] > 1), seeds)
def test_a_layer_norm_over_channels_is_one_over_the_last_dimension(shape, seed):
    x, weight, bias = random(shape, seed), random(shape[1:2], seed + 1), random(shape[1:2], seed + 2)
    expected = S.layer_norm(x.movedim(1, -1), shape[1], weight, bias).movedim(-1, 1)
    torch.testing.assert_close(normalize_positions(x, weight, bias, eps=1e-5), expected)


@given(sizes, seeds)
def test_a_layer_norm_of_centred_rows_is_an_rms_norm(shape, seed):
    x = random(shape, seed)
    x = x - x.mean(-1, keepdim=True)
    torch.testing.assert_close(S.layer_norm(x, shape[-1]), S.rms_norm(x, shape[-1], eps=1e-5))


@given(sizes.filter(lambda shape: shape[1] * shape[2] > 1), seeds, st.floats(0.1, 10.0), st.floats(-5.0, 5.0))
def test_scale_and_shift_of_the_input_do_not_matter(shape, seed, a, b):
    x = random(shape, seed)
    torch.testing.assert_close(
        S.group_norm(a * x + b, 1, eps=1e-14), S.group_norm(x, 1, eps=1e-14), rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(S.rms_norm(a * x, shape[-1], eps=1e-14), S.rms_norm(x, shape[-1], eps=1e-14))


@given(sizes, seeds)
def test_gradients_are_free_of_what_the_norm_takes_out(shape, seed):
    """Σ dx = 0 and Σ dx·x̂ ≈ 0 behind every statistic."""
    x = random(shape, seed).requires_grad_()
    y = S.instance_norm(x, eps=1e-14)
    (dx,) = torch.autograd.grad(y, x, random(shape, seed + 1))
    torch.testing.assert_close(dx.sum(-1), torch.zeros(shape[:2]).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close((dx * y.detach()).sum(-1), torch.zeros(shape[:2]).double(), atol=1e-6, rtol=0)


@given(sizes.filter(lambda shape: shape[1] * shape[2] > 1), seeds)
def test_samples_do_not_know_each_other(shape, seed):
    x = random(shape, seed)
    together = S.group_norm(x, 1)
    for sample, alone in zip(x, together, strict=True):
        assert torch.equal(S.group_norm(sample[None], 1)[0], alone)


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("norm", ["group", "instance"])
def test_masked_equals_cropped(norm, dtype, activation):
    """Output and all gradients are those of every sample cut to its length, whatever the padding holds."""
    lengths, weight, bias = [7, 2, 4], torch.randn(6, dtype=dtype), torch.randn(6, dtype=dtype)
    mask = torch.arange(7) < torch.tensor(lengths)[:, None]
    full, other = (torch.randn(3, 6, 7, dtype=dtype) for _ in range(2))
    dy = torch.randn(3, 6, 7, dtype=dtype)

    def call(x, w, b, r, m=None):
        if norm == "group":
            return S.group_norm(x, 3, w, b, residual=r, activation=activation, mask=m)
        return S.instance_norm(x, weight=w, bias=b, residual=r, activation=activation, mask=m)

    padded = [torch.where(mask[:, None], t, math.nan) for t in (full, other)]
    leaves = [t.clone().requires_grad_() for t in (padded[0], weight, bias, padded[1])]
    y = call(*leaves, mask)
    found = torch.autograd.grad(y, leaves, dy)
    sums = [torch.zeros(6, dtype=dtype), torch.zeros(6, dtype=dtype)]
    for n, length in enumerate(lengths):
        cut = [full[n : n + 1, :, :length], weight, bias, other[n : n + 1, :, :length]]
        parts = [t.clone().requires_grad_() for t in cut]
        alone = call(*parts)
        dx, dweight, dbias, dresidual = torch.autograd.grad(alone, parts, dy[n : n + 1, :, :length])
        sums = [sums[0] + dweight, sums[1] + dbias]
        for masked, cropped in ((y, alone), (found[0], dx), (found[3], dresidual)):
            torch.testing.assert_close(masked[n, :, :length], cropped[0], rtol=1e-4, atol=1e-5)
            assert (masked[n, :, length:] == 0).all()
    for masked, cropped in zip((found[1], found[2]), sums, strict=True):
        torch.testing.assert_close(masked, cropped, rtol=1e-4, atol=1e-5)


def test_a_sample_without_a_valid_value_is_zero():
    mask = torch.tensor([[True, True, True], [False, False, False]])
    x = torch.randn(2, 4, 3)
    x[1] = math.nan
    y = S.group_norm(x.requires_grad_(), 2, torch.ones(4), torch.ones(4), mask=mask)
    y.backward(torch.ones_like(y))
    assert (y[1] == 0).all()
    assert (x.grad[1] == 0).all()


@pytest.mark.parametrize(
    "call", [lambda x: S.layer_norm(x, 4), lambda x: S.rms_norm(x, 4), lambda x: S.group_norm(x, 2)]
)
def test_an_empty_tensor_stays_empty(call):
    x = torch.empty(0, 6, 4, requires_grad=True)
    y = call(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, 6, 4)
