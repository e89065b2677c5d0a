"""Small tensors that torch's own kernels normalise, and those that they would lose digits of, which they do not."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

import steadynorm as sn
from steadynorm import functional
from steadynorm.errors import DegenerateStatisticsError, InputError
from steadynorm.kernels import torch_small
from tests.agree import derivatives

CALLS = {
    "layer": (
        (32, 70),
        lambda x, w, b: functional.layer_norm(x, (70,), w, b),
        lambda x, w, b: F.layer_norm(x, (70,), w, b),
    ),
    "layer, two dimensions": (
        (5, 7, 10),
        lambda x, w, b: functional.layer_norm(x, (7, 10), w, b),
        lambda x, w, b: F.layer_norm(x, (7, 10), w, b),
    ),
    "group": (
        (3, 12, 5, 7),
        lambda x, w, b: functional.group_norm(x, 4, w, b),
        lambda x, w, b: F.group_norm(x, 4, w, b),
    ),
    "group of rows": (
        (9, 48),
        lambda x, w, b: functional.group_norm(x, 2, w, b),
        lambda x, w, b: F.group_norm(x, 2, w, b),
    ),
}
ALL = pytest.mark.parametrize("name", CALLS)


def made(name, mean=0.0):
    shape, ours, theirs = CALLS[name]
    sizes = shape[1:] if name.startswith("layer") else shape[1:2]
    x = (torch.randn(shape) + mean).requires_grad_()
    return ours, theirs, (x, torch.randn(sizes).requires_grad_(), torch.randn(sizes).requires_grad_())


def step(call, tensors):
    y = call(*tensors)
    return [y, *torch.autograd.grad(y, tensors, torch.linspace(-1, 2, y.numel()).to(y.dtype).reshape(y.shape))]


@ALL
@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_torchs_bits_where_the_mean_is_small(name, mean):
    ours, theirs, tensors = made(name, mean)
    for found, expected in zip(step(ours, tensors), step(theirs, tensors), strict=True):
        assert torch.equal(found, expected)


@ALL
@pytest.mark.parametrize("mean", [30.0, 1e4, -1e4])
def test_a_large_mean_costs_no_digits(name, mean):
    ours, theirs, tensors = made(name, mean)
    exact = step(theirs, tuple(t.detach().double().requires_grad_() for t in tensors))
    for found, expected in zip(step(ours, tensors), exact, strict=True):
        assert (found - expected).abs().max() < 2e-6 * expected.abs().max()


@ALL
def test_one_row_that_is_far_is_enough(name):
    ours, theirs, (x, weight, bias) = made(name)
    with torch.no_grad():
        x[-1] += 1e4
    exact = theirs(*(t.detach().double() for t in (x, weight, bias)))
    assert (ours(x, weight, bias) - exact).abs().max() < 1e-5
    assert (theirs(x, weight, bias) - exact).abs().max() > 1e-5  # which is why


@ALL
def test_what_is_not_finite_or_all_the_same(name):
    ours, _, (x, weight, bias) = made(name)
    same = torch.full_like(x, 12345.678)
    torch.testing.assert_close(ours(same, None, None), torch.zeros_like(same), atol=1e-3, rtol=0)
    with torch.no_grad():
        x[0] = torch.nan
    y = ours(x, weight, bias)
    assert y[0].isnan().all()
    assert y[1:].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_ours(dtype):
    x = torch.randn(32, 70, dtype=dtype)
    assert torch_small.layer(x, (70,), None, None, 1e-5) is None
    assert torch_small.group(x, 7, None, None, 1e-5) is None


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_what_else_is_ours():
    x, images = torch.randn(32, 70), torch.randn(3, 12, 5, 7)
    assert torch_small.layer(x, (70,), None, None, 1e-5) is not None
    assert torch_small.group(images, 4, None, None, 1e-5) is not None
    for other in (
        x.t().contiguous().t(),
        torch.randn(torch_small.FEW_ROWS + 1, 70),
        torch.randn(2, torch_small.SMALL),
        x.to("meta"),
        x[:0],
    ):
        assert torch_small.layer(other, other.shape[1:], None, None, 1e-5) is None
    for other in (
        images.contiguous(memory_format=torch.channels_last),
        torch.randn(1, 4, torch_small.SMALL_IMAGES // 4 + 1),
        images[:0],
        images[0, 0, 0],
    ):
        assert torch_small.group(other, 4, None, None, 1e-5) is None
    with sn.backend("numba"):
        assert torch_small.layer(x, (70,), None, None, 1e-5) is None
        assert torch_small.group(images, 4, None, None, 1e-5) is None
    found = []

    def look(x):
        found.append(torch_small.layer(x, (70,), None, None, 1e-5))
        return x

    torch.func.vmap(look)(x[None])
    torch.func.grad(lambda x: look(x).sum())(x)
    torch.func.jvp(look, (x,), (x,))
    with forward_ad.dual_level():
        look(forward_ad.make_dual(x, x))
    with FakeTensorMode(allow_non_fake_inputs=True):
        look(x)
    torch.func.functionalize(look)(x)
    torch.func.functionalize(lambda weight: look(x))(x)
    make_fx(look)(x)
    assert found == [None] * 8


@pytest.mark.parametrize("far", [0, 100])
def test_a_trace_does_not_depend_on_the_data(far):
    weight, traced = torch.ones(16), torch.randn(4, 16) + far
    graph = make_fx(lambda x: functional.layer_norm(x, 16, weight))(traced).graph
    called = {str(node.target) for node in graph.nodes if node.op == "call_function"}
    assert "steadynorm.sample_forward.default" in called
    assert not any("native" in name for name in called)


@pytest.mark.parametrize("make", [lambda: (sn.LayerNorm(16), (4, 16)), lambda: (sn.GroupNorm(4, 16), (4, 16, 3))])
def test_a_strict_export_takes_any_batch(make):
    model, shape = make()
    dynamic = ({0: torch.export.Dim("batch")},)
    exported = torch.export.export(model, (torch.randn(shape),), dynamic_shapes=dynamic, strict=True).module()
    x = torch.randn(2 * torch_small.SMALL_IMAGES // 16, *shape[1:])
    torch.testing.assert_close(exported(x), model(x))


def test_a_weight_with_gaps_between_its_values():
    x, weight, bias = torch.randn(4, 8, 5, 5), torch.randn(16)[::2], torch.tensor([2.0]).expand(8)
    expected = nn.functional.group_norm(x, 4, weight, bias)
    torch.testing.assert_close(functional.group_norm(x, 4, weight, bias), expected)


def test_what_torch_refuses_we_refuse_in_our_words():
    x, images = torch.randn(32, 70), torch.randn(3, 12, 5, 7)
    for bad in (
        lambda: functional.layer_norm(x, 35),
        lambda: functional.layer_norm(x, 70, torch.ones(35)),
        lambda: functional.layer_norm(x, 70, eps=-1.0),
        lambda: functional.layer_norm("x", 70),
        lambda: functional.group_norm(images, 5),
        lambda: functional.group_norm(images, 0),
        lambda: functional.group_norm(images, 4, torch.ones(4)),
        lambda: functional.group_norm(images, 4, eps=float("nan")),
        lambda: functional.group_norm(images[0, 0, 0], 1),
        lambda: sn.GroupNorm(4, 16)(images),
        lambda: sn.LayerNorm(35)(x),
    ):
        with pytest.raises((InputError, AttributeError)):
            bad()
    for single in (lambda: functional.layer_norm(x, ()), lambda: functional.group_norm(x, 70)):
        with pytest.raises((InputError, DegenerateStatisticsError)):
            single()
    with pytest.raises(DegenerateStatisticsError):
        functional.layer_norm(x[:, :1], 1)


@ALL
@pytest.mark.parametrize("order", [2, 3])
def test_higher_derivatives(name, order):
    """torch's own of layer norm are wrong from the third on."""
    ours, _, leaves = made(name)

    found = derivatives(lambda: ours(*leaves), leaves, order)
    with sn.backend("reference"):
        for one, two in zip(found, derivatives(lambda: ours(*leaves), leaves, order), strict=True):
            assert (one - two).abs().max() < 1e-4 * two.abs().max()


@pytest.mark.parametrize("has", [(False, True), (True, False), (False, False)])
def test_a_bias_without_a_weight_and_the_other_way_round(has):
    x = torch.randn(4, 6, 5, 5, requires_grad=True)
    weight, bias = (torch.randn(6, requires_grad=True) if there else None for there in has)
    leaves = [t for t in (x, weight, bias) if t is not None]
    dy, found = torch.randn(4, 6, 5, 5), []
    for name in (None, "reference"):
        with contextlib.nullcontext() if name is None else sn.backend(name):
            found.append(torch.autograd.grad(functional.group_norm(x, 2, weight, bias), leaves, dy))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two)
