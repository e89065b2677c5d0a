"""A call that was made before gives the same bits, and never stands for one that was not checked."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import steadynorm
from steadynorm import functional
from steadynorm.errors import InputError
from steadynorm.functional import recall
from steadynorm.functional.layer import normalize_positions
from steadynorm.kernels import torch_small

CALLS = {
    "layer": ((300, 70), lambda x, w, b: functional.layer_norm(x, (70,), w, b)),
    "rms": ((300, 70), lambda x, w, b: functional.rms_norm(x, (70,), w)),
    "gemma": ((300, 70), lambda x, w, b: functional.rms_norm(x, (70,), w, convention="gemma")),
    "group": ((3, 12, 17, 19), lambda x, w, b: functional.group_norm(x, 4, w, b)),
    "group, silu": ((3, 12, 17, 19), lambda x, w, b: functional.group_norm(x, 4, w, b, activation="silu")),
    "short planes": ((3, 12, 5), lambda x, w, b: functional.group_norm(x, 4, w, b)),
    "large planes": ((1, 4, 401, 397), lambda x, w, b: functional.group_norm(x, 2, w, b)),
    "positions": ((3, 12, 17, 19), lambda x, w, b: normalize_positions(x, w, b, eps=1e-5)),
}
LAST = {"group", "group, silu", "positions", "large planes"}


@pytest.fixture(autouse=True)
def nothing_is_known(monkeypatch):
    """And nothing goes to torch's own kernels, however small it is."""
    monkeypatch.setattr(torch_small, "SMALL", 0)
    monkeypatch.setattr(torch_small, "SMALL_IMAGES", 0)
    recall._calls.clear()
    yield
    recall._calls.clear()


def inputs(name: str, last: bool, dtype: torch.dtype):
    shape, call = CALLS[name]
    generator = torch.Generator().manual_seed(0)

    def make(*sizes: int):
        t = torch.randn(sizes, generator=generator).to(dtype)
        return t.movedim(1, -1).contiguous().movedim(-1, 1) if last and len(sizes) > 2 else t

    channels = shape[1]
    parameters = [torch.randn(channels, generator=generator).requires_grad_() for _ in range(2)]
    return call, make(*shape).requires_grad_(), *parameters, make(*shape)


def step(call, x, weight, bias, dy):
    y = call(x, weight, bias)
    wanted = [t for t in (x, weight, bias) if t is not None and t.requires_grad]
    return [y, *torch.autograd.grad(y, wanted, dy, allow_unused=True)]


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert one.dtype is other.dtype
            assert one.stride() == other.stride()
            assert torch.equal(one, other)


LAYOUTS = [(name, last) for name in CALLS for last in ((False, True) if name in LAST else (False,))]


@pytest.mark.parametrize(("name", "last"), LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_the_same_bits_as_the_first_time(name, last, dtype, threads):
    for count in (1, 2):
        threads(count)
        call, x, weight, bias, dy = inputs(name, last, dtype)
        for own in ((weight, bias), (weight.detach(), bias.detach()), (weight.detach(), bias)):
            recall._calls.clear()
            first = step(call, x, *own, dy)
            assert len(recall._calls) == 1
            assert_same(step(call, x, *own, dy), first)
            with torch.no_grad():
                assert torch.equal(call(x, *own), first[0])
                assert torch.equal(call(x, *own), first[0])


@pytest.mark.parametrize("name", CALLS)
def test_a_known_call_is_not_planned_again(name, monkeypatch):
    call, *tensors = inputs(name, False, torch.float32)
    first = step(call, *tensors)

    def never(*_, **__):
        raise AssertionError

    monkeypatch.setattr("steadynorm.functional.sample.choose_sample", never)
    assert_same(step(call, *tensors), first)


@pytest.mark.parametrize("name", CALLS)
def test_a_gradient_in_another_memory_order(name):
    call, x, weight, bias, dy = inputs(name, False, torch.float32)
    first = step(call, x, weight, bias, dy)
    other = dy.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert other.stride() != dy.stride()
    assert_same(step(call, x, weight, bias, other), first)
    y = call(x, weight, bias)
    (dx,) = torch.autograd.grad(y.sum(), x)  # expanded, of strides zero
    assert torch.equal(dx, step(call, x, weight, bias, torch.ones_like(dy))[1])


def test_checks_are_those_of_the_first_time():
    x, weight = torch.randn(400, 70), torch.rand(70)
    functional.layer_norm(x, 70, weight, weight)
    for bad in (
        lambda: functional.layer_norm(x, 35, weight, weight),
        lambda: functional.layer_norm(x, 70, weight[:35], weight),
        lambda: functional.layer_norm(x, 70, weight, weight[:35]),
        lambda: functional.layer_norm(x, 70, weight, weight, -1.0),
        lambda: functional.layer_norm(x, 70, weight, weight, addend=x[:1]),
    ):
        with pytest.raises(InputError):
            bad()
    functional.rms_norm(x, 70, weight)
    with pytest.raises(InputError):
        functional.rms_norm(x, 70, weight, convention="other")
    images = torch.randn(3, 12, 17, 19)
    functional.group_norm(images, 4)
    for bad in (
        lambda: functional.group_norm(images, 5),
        lambda: functional.group_norm(images, 4, activation="other"),
        lambda: functional.group_norm(images, 4, mask=torch.ones(3, 17, 18, dtype=torch.bool)),
        lambda: steadynorm.GroupNorm(4, 16, affine=False)(images),
        lambda: steadynorm.GroupNorm(4, 16)(images),
    ):
        with pytest.raises(InputError):
            bad()


def test_what_the_kernels_cannot_take_is_not_kept():
    x, weight = torch.randn(400, 70), torch.rand(70)
    functional.layer_norm(x.t().contiguous().t(), 70, weight, weight)
    functional.layer_norm(x, 70, weight.half(), weight.half())
    functional.layer_norm(x, 70, torch.rand(140)[::2], weight)
    functional.layer_norm(x[:0], 70, weight, weight)
    functional.layer_norm(x.to("meta"), 70, weight.to("meta"), weight.to("meta"))
    with steadynorm.backend("reference"):
        functional.layer_norm(x, 70, weight, weight)
    functional.layer_norm(x, 70, weight, weight, addend=x)
    assert not recall._calls


def test_a_backend_that_is_asked_for_is_used():
    x, weight = torch.randn(400, 70), torch.rand(70)
    functional.layer_norm(x, 70, weight, weight)
    with steadynorm.backend("reference"):
        asked = functional.layer_norm(x, 70, weight, weight)
    assert not torch.equal(asked, functional.layer_norm(x, 70, weight, weight))


@pytest.mark.parametrize("name", CALLS)
def test_transforms_and_second_derivatives_of_a_known_call(name):
    call, *tensors = inputs(name, False, torch.float32)
    x, weight, bias, dy = tensors
    first = step(call, *tensors)
    assert recall._calls
    (dx,) = torch.func.vjp(lambda x: call(x, weight, bias), x.detach())[1](dy)
    torch.testing.assert_close(dx, first[1], rtol=1e-4, atol=1e-5)
    y = call(x, weight, bias)
    (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
    torch.testing.assert_close(dx, first[1], rtol=1e-4, atol=1e-5)
    (second,) = torch.autograd.grad(dx.square().sum(), x)
    recall._calls.clear()
    y = call(x, weight, bias)
    (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
    torch.testing.assert_close(second, torch.autograd.grad(dx.square().sum(), x)[0])


def test_no_more_calls_are_kept_than_can_be_useful(monkeypatch):
    monkeypatch.setattr(recall, "KEPT", 3)
    for rows in range(300, 310):
        functional.layer_norm(torch.randn(rows, 70), 70)
    assert len(recall._calls) <= 3


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiler_sees_a_known_call_as_one_that_is_not():
    x, norm = torch.randn(400, 70), steadynorm.LayerNorm(70)
    norm(x)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    y = torch.compile(norm, backend=backend, fullgraph=True)(x)
    assert torch.equal(y, norm(x))
    assert len(graphs) == 1


def test_layers_know_their_calls_too(monkeypatch):
    rows, images = torch.randn(400, 70), torch.randn(3, 12, 17, 19)
    layers: list[tuple[nn.Module, torch.Tensor]] = [
        (steadynorm.LayerNorm(70), rows),
        (steadynorm.RMSNorm(70), rows),
        (steadynorm.GroupNorm(4, 12), images),
        (steadynorm.ChannelLayerNorm(12), images),
    ]
    first = [layer(x) for layer, x in layers]

    def never(*_, **__):
        raise AssertionError

    monkeypatch.setattr("steadynorm.functional.sample.choose_sample", never)
    for (layer, x), y in zip(layers, first, strict=True):
        assert torch.equal(layer(x), y)
