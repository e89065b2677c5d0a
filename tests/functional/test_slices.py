from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from steadynorm import kernels
from steadynorm.errors import InputError
from steadynorm.functional import normalize_batch, normalize_slices

SHAPES = {
    "planes": ((7, 5, 9, 4), (3, 3, 1)),
    "planes, long runs": ((4, 3, 40, 41), (2, 2)),
    "planes, many tasks": ((12, 40, 30, 30), (5, 4, 3)),
    "channels last": ((7, 16, 5, 4), (3, 3, 1)),
    "channels last, folded": ((9, 3, 6, 5), (4, 4, 1)),
    "channels last, many tasks": ((12, 32, 40, 40), (5, 5, 2)),
    "rows": ((50, 70), (20, 20, 10)),
    "rows, folded": ((300, 5), (100, 100, 100)),
    "rows, many": ((4000, 48), (1500, 1500, 1000)),
    "planes, a slice each": ((8, 40, 30, 30), (2, 2, 2, 2)),
    "channels last, a slice of two tasks each": ((4, 64, 80, 80), (1, 1, 1, 1)),
    "rows, a slice each": ((2048, 70), (512, 512, 512, 512)),
    "rows, folded, a slice each": ((8192, 11), (2048, 2048, 2048, 2048)),
}


def tensors(name, dtype=torch.float32):
    shape, sizes = SHAPES[name]
    made = [torch.randn(shape, dtype=dtype) * 3 + 5, torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)]
    if name.startswith("channels last"):
        made = [t.to(memory_format=torch.channels_last) for t in made]
    return *made, torch.rand(shape[1]) + 0.5, torch.randn(shape[1]), sizes


def everything(call, x, residual, dy, weight, bias):
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias, residual)]
    y, moments = call(leaves[0], leaves[1], leaves[2], leaves[3])
    return [y, moments.mean, moments.var, *torch.autograd.grad(y, leaves, dy)]


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("name", SHAPES)
def test_every_slice_is_a_batch_of_its_own(name, activation, threads):
    """The same kernels on the same values, so the same bits, but for the sum over slices of what they share."""
    threads(2)
    x, residual, dy, weight, bias, sizes = tensors(name)
    found = everything(
        lambda x, w, b, r: normalize_slices(x, sizes, w, b, residual=r, activation=activation),
        x, residual, dy, weight, bias,
    )  # fmt: skip
    assert found[0].stride() == x.stride()
    assert found[3].stride() == x.stride()
    start, dweight, dbias = 0, torch.zeros(len(weight)).double(), torch.zeros(len(weight)).double()
    for size in sizes:
        part = slice(start, start + size)
        own = everything(
            lambda x, w, b, r: normalize_batch(x, w, b, residual=r, activation=activation),
            x[part], residual[part], dy[part], weight.double(), bias.double(),
        )  # fmt: skip
        assert torch.equal(found[0][part], own[0])
        assert torch.equal(found[3][part], own[3])
        assert torch.equal(found[6][part], own[6])
        dweight, dbias, start = dweight + own[4], dbias + own[5], start + size
    torch.testing.assert_close(found[4], dweight.float())
    torch.testing.assert_close(found[5], dbias.float())
    whole = x.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(found[1], whole.mean(1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[2], whole.var(1, unbiased=False), rtol=1e-5, atol=1e-6)


LARGE = [name for name in SHAPES if "many" in name or "each" in name]


@pytest.mark.parametrize("name", LARGE)
def test_bits_do_not_depend_on_the_number_of_threads(name, threads):
    x, residual, dy, weight, bias, sizes = tensors(name)
    found = []
    for n in (1, 2):
        threads(n)
        found.append(
            everything(lambda x, w, b, r: normalize_slices(x, sizes, w, b, residual=r), x, residual, dy, weight, bias)
        )
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["planes", "channels last"])
def test_agrees_with_the_reference(name, dtype):
    x, residual, dy, weight, bias, sizes = tensors(name, dtype)
    weight, bias = weight.double(), bias.double()

    def call(x, w, b, r):
        return normalize_slices(x, sizes, w, b, residual=r)

    found = everything(call, x, residual, dy, weight, bias)
    with kernels.backend("reference"):
        expected = everything(call, x, residual, dy, weight, bias)
    tolerance = {"rtol": 1e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-9, "atol": 1e-9}
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_gradcheck(activation):
    x, residual = (torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight, bias = (torch.randn(2, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def call(x, weight, bias, residual):
        return normalize_slices(x, (2, 3), weight, bias, residual=residual, activation=activation)[0]

    assert gradcheck(call, (x, weight, bias, residual))
    assert gradgradcheck(call, (x, weight, bias, residual))


def test_a_weight_in_half_precision():
    x, weight = torch.randn(6, 4, 5), torch.rand(4).half().requires_grad_()
    y, _ = normalize_slices(x, (3, 3), weight)
    (dweight,) = torch.autograd.grad(y, weight, torch.randn(y.shape))
    assert dweight.dtype == torch.float16


def test_a_residual_of_another_shape():
    with pytest.raises(InputError, match="residual got shape"):
        normalize_slices(torch.randn(6, 4, 5), (3, 3), residual=torch.randn(3, 4, 5))


@pytest.mark.parametrize("shape", [(6, 4, 5), (6, 4), (6, 70)])
@pytest.mark.parametrize("sizes", [(0, 6), (3, 0, 3), (6, 0)])
def test_a_slice_of_no_samples_is_as_if_it_were_not_there(shape, sizes):
    x = torch.randn(shape)
    found, expected = (normalize_slices(x, given) for given in (sizes, tuple(size for size in sizes if size)))
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1].var, expected[1].var)


def test_sizes_from_numpy_are_sizes():
    x = torch.randn(4, 3, 5)
    found = normalize_slices(x, tuple(np.array([2, 2])))[0]
    assert torch.equal(found, normalize_slices(x, (2, 2))[0])


def test_slices_far_from_each_other_are_pooled_to_the_last_digits():
    x = torch.randn(64, 40, dtype=torch.float64) + 1e6 * torch.arange(4).repeat_interleave(16)[:, None]
    _, pooled = normalize_slices(x, (16,) * 4)
    torch.testing.assert_close(pooled.mean, x.mean(0), rtol=1e-14, atol=0)
    torch.testing.assert_close(pooled.var, x.var(0, unbiased=False), rtol=1e-13, atol=0)


@pytest.mark.parametrize("sizes", [(3, 2), (), (7, -1)])
def test_sizes_that_do_not_add_up(sizes):
    with pytest.raises(InputError, match="add up to the 6"):
        normalize_slices(torch.randn(6, 4, 5), sizes)
