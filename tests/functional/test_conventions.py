"""The bits of the published RMSNorm formulas, which checkpoints were trained with."""

from __future__ import annotations

import pytest
import torch

from steadynorm import kernels
from steadynorm.functional import rms_norm

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((7, 64), (2, 5, 768), (2, 1000), (1, 4096), (64, 33), (2, 3, 7, 19))
EPS = 1e-6


def llama(x, weight):
    """LlamaRMSNorm.forward of transformers."""
    hidden = x.to(torch.float32)
    variance = hidden.pow(2).mean(-1, keepdim=True)
    return weight * (hidden * torch.rsqrt(variance + EPS)).to(x.dtype)


def gemma(x, weight):
    """GemmaRMSNorm.forward of transformers."""
    wide = x.float()
    output = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return (output * (1.0 + weight.float())).type_as(x)


def t5(x, weight):
    """T5LayerNorm.forward of transformers."""
    variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
    hidden = x * torch.rsqrt(variance + EPS)
    if weight.dtype in [torch.float16, torch.bfloat16]:
        hidden = hidden.to(weight.dtype)
    return weight * hidden


def torchs(x, weight):
    return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, EPS)


FORMULAS = {"torch": torchs, "llama": llama, "gemma": gemma, "t5": t5}
pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")


@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("convention", FORMULAS)
def test_the_same_bits_as_the_formula(convention, shape, dtype, weight_dtype):
    x, addend = (torch.randn(shape) * 3).to(dtype), torch.randn(shape).to(dtype)
    weight = torch.randn(shape[-1]).to(weight_dtype)
    with kernels.backend("reference"):
        y = rms_norm(x, shape[-1:], weight, EPS, convention=convention)
        after, total = rms_norm(x, shape[-1:], weight, EPS, addend=addend, convention=convention)
    for found, given in ((y, x), (after, x + addend)):
        expected = FORMULAS[convention](given, weight)
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    assert torch.equal(total, x + addend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("convention", FORMULAS)
def test_other_kernels_differ_by_roundings_and_seldom(convention, dtype):
    """In half types by one unit in the last place, in few places: docs/layers.md gives the shares."""
    x, weight = (torch.randn(256, 768) * 3).to(dtype), torch.randn(768).to(dtype)
    y, expected = rms_norm(x, 768, weight, EPS, convention=convention), FORMULAS[convention](x, weight)
    if dtype == torch.float32:
        torch.testing.assert_close(y, expected, rtol=5e-7, atol=1e-9)
        return
    steps = (y.view(torch.int16).int() - expected.view(torch.int16).int()).abs()
    steps = torch.where(y == expected, 0, steps)  # also where a zero has another sign
    # One step of x̂, seen through a weight that is rounded after it, is up to two of the product.
    assert steps.max() <= (2 if convention in ("llama", "t5") else 1)
    assert (steps > 0).float().mean() < 2e-4


@pytest.mark.parametrize("convention", FORMULAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_those_of_the_formula(convention, dtype):
    x, weight, dy = ((torch.randn(s) * 2).to(dtype) for s in ((6, 40), (40,), (6, 40)))
    found = []
    for formula in (lambda x, w: rms_norm(x, 40, w, EPS, convention=convention), FORMULAS[convention]):
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        found.append(torch.autograd.grad(formula(*leaves), leaves, dy))
    rtol = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=4 * rtol)


@pytest.mark.parametrize("convention", FORMULAS)
def test_without_a_weight_there_is_one_convention(convention):
    x = torch.randn(4, 16).bfloat16()
    y = rms_norm(x, 16, None, EPS, convention=convention)
    assert y.dtype == x.dtype
    torch.testing.assert_close(y, torch.nn.functional.rms_norm(x, (16,), None, EPS))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_the_default_eps_is_torchs(dtype):
    x = torch.full((2, 8), 1e-5).to(dtype)
    expected = torch.nn.functional.rms_norm(x, (8,))
    torch.testing.assert_close(rms_norm(x, 8), expected)
    with kernels.backend("reference"):
        assert torch.equal(rms_norm(x, 8), expected)
