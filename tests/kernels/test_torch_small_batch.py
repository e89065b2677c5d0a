"""Small batches that torch's own kernel normalises, and those that it would lose digits of, which it does not."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import steadynorm as sn
from steadynorm import functional
from steadynorm.errors import InputError
from steadynorm.kernels import numba_cpu, torch_small
from tests.agree import derivatives

SHAPES = pytest.mark.parametrize("shape", [(32, 70), (9, 8, 11), (6, 12, 5, 7)], ids=["rows", "axis", "planes"])
pytestmark = pytest.mark.skipif(bool(numba_cpu.why_not()), reason=numba_cpu.why_not() or "runs")


def made(shape, mean=0.0, scale=1.0):
    x = (scale * torch.randn(shape) + mean).requires_grad_()
    return x, torch.randn(shape[1]).requires_grad_(), torch.randn(shape[1]).requires_grad_()


def step(y, tensors):
    return [y, *torch.autograd.grad(y, tensors, torch.linspace(-1, 2, y.numel()).to(y.dtype).reshape(y.shape))]


def by_batch(x, weight, bias):
    return F.batch_norm(x, None, None, weight, bias, True)


def exactly(tensors):
    """The step in float64, by plain PyTorch."""
    wide = [t.detach().double().requires_grad_() for t in tensors]
    return step(by_batch(*wide), wide)


@SHAPES
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_torchs_bits_where_the_mean_is_small(shape, activation, mean):
    tensors = made(shape, mean)
    y, moments = functional.normalize_batch(*tensors, activation=activation)
    expected = by_batch(*tensors)
    if activation is not None:
        expected = getattr(F, activation)(expected)
    for found, wanted in zip(step(y, tensors), step(expected, tensors), strict=True):
        assert torch.equal(found, wanted)
    x = tensors[0].detach().double().transpose(0, 1).flatten(1)
    assert moments.count == x.shape[1]
    for found, wanted in ((moments.mean, x.mean(1)), (moments.var, x.var(1, correction=0))):
        assert found.dtype == torch.float64
        assert not found.requires_grad
        torch.testing.assert_close(found, wanted, rtol=5e-7, atol=2e-7)


@SHAPES
@pytest.mark.parametrize("has", [(False, True), (True, False), (False, False)])
def test_a_bias_without_a_weight_and_the_other_way_round(shape, has):
    x, *affine = made(shape)
    weight, bias = (t if there else None for t, there in zip(affine, has, strict=True))
    leaves = [t for t in (x, weight, bias) if t is not None]
    is_odd = weight is None and bias is not None
    assert (torch_small.batch(x, weight, bias, 1e-5) is None) == is_odd
    found = step(functional.normalize_batch(x, weight, bias)[0], leaves)
    with sn.backend("reference"):
        expected = step(functional.normalize_batch(x, weight, bias)[0], leaves)
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


@SHAPES
@pytest.mark.parametrize(("mean", "scale"), [(30.0, 1.0), (1e4, 1.0), (-1e4, 1.0), (0.0, 1e-6)])
def test_a_large_mean_and_a_variance_below_eps_cost_no_digits(shape, mean, scale):
    tensors = made(shape, mean, scale)
    assert torch_small.batch(*tensors, 1e-5) is None
    y, moments = functional.normalize_batch(*tensors)
    for found, expected in zip(step(y, tensors), exactly(tensors), strict=True):
        assert (found - expected).abs().max() < 2e-6 * expected.abs().max()
    wide = tensors[0].detach().double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(moments.var, wide.var(1, correction=0), rtol=1e-5, atol=0)


@SHAPES
def test_one_channel_that_is_far_is_enough(shape):
    x, weight, bias = made(shape)
    with torch.no_grad():
        x[:, -1] += 1e4
    exact = exactly((x, weight, bias))[0]
    assert (functional.normalize_batch(x, weight, bias)[0] - exact).abs().max() < 1e-5
    assert (by_batch(x, weight, bias) - exact).abs().max() > 1e-5  # which is why


@SHAPES
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_channel_that_is_not_finite_is_left_out_and_leaves_the_others_alone(shape, bad):
    x, _, _ = made(shape)
    sound = functional.normalize_batch(x)[0]
    with torch.no_grad():
        x[0, 1] = bad
    y, moments = functional.normalize_batch(x)
    others = [c for c in range(shape[1]) if c != 1]
    assert y[:, 1].isnan().all()
    assert torch.equal(y[:, others], sound[:, others])
    assert not moments.var[1].isfinite()
    layer = {2: sn.BatchNorm1d, 3: sn.BatchNorm1d, 4: sn.BatchNorm2d}[len(shape)](shape[1])
    layer(x)
    assert layer.running_mean.eq(0).all()
    assert layer.num_batches_tracked == 0


@SHAPES
def test_the_layer_remembers_what_torchs_does(shape):
    ours = {2: sn.BatchNorm1d, 3: sn.BatchNorm1d, 4: sn.BatchNorm2d}[len(shape)](shape[1])
    theirs = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[len(shape)](shape[1])
    for _ in range(3):
        x = torch.randn(shape) + 0.5
        assert torch.equal(ours(x), theirs(x))
    for name, buffer in theirs.named_buffers():
        torch.testing.assert_close(ours.get_buffer(name), buffer, rtol=3e-7, atol=3e-7)
    assert torch.equal(ours.eval()(x), F.batch_norm(x, *ours._running()[:2], ours.weight, ours.bias))


@SHAPES
@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_given_statistics(shape, mean):
    """torch's bits where they are near zero, and no digits lost where they are not."""
    tensors = made(shape, mean)
    x, weight, bias = tensors
    statistics = torch.rand(shape[1]) - 0.5 + mean, torch.rand(shape[1]) + 0.5
    found = step(functional.normalize_running(x, *statistics, weight, bias), tensors)
    theirs = step(F.batch_norm(x, *statistics, weight, bias), tensors)
    wide = [t.detach().double().requires_grad_() for t in tensors]
    exact = step(F.batch_norm(wide[0], *(t.double() for t in statistics), *wide[1:]), wide)
    assert all(torch.equal(*pair) for pair in zip(found, theirs, strict=True)) == (mean == 0)
    for one, two in zip(found, exact, strict=True):
        assert (one - two).abs().max() < 2e-6 * two.abs().max()


def test_the_backward_pass_reads_the_statistics_of_its_forward_pass():
    """Kernels of ours move running statistics where autograd does not see it."""
    x, weight, bias = made((32, 70))
    mean, var = torch.zeros(70), torch.ones(70)
    expected = step(functional.normalize_running(x, mean, var, weight, bias), (x, weight, bias))
    y = functional.normalize_running(x, mean, var, weight, bias)
    moments = functional.moments(3 * x.detach() + 1)
    functional.update_running_(mean, var, moments, 0.9, num_batches_tracked=torch.tensor(0))
    assert mean.ne(0).all()
    for found, wanted in zip(step(y, (x, weight, bias)), expected, strict=True):
        assert torch.equal(found, wanted)


def test_what_else_is_ours():
    images, rows, weight = torch.randn(6, 12, 5, 7), torch.randn(32, 12), torch.ones(12)
    statistics = torch.zeros(12), torch.ones(12)

    def are_torchs(x, weight=weight, statistics=statistics, eps=1e-5):
        by_batch = torch_small.batch(x, weight, None, eps)
        by_given = torch_small.given(x, *statistics, weight, None, eps)
        return by_batch is not None, by_given is not None

    assert are_torchs(images) == are_torchs(rows) == (True, True)
    neither = (False, False)
    last = images.contiguous(memory_format=torch.channels_last)
    for x in (images.double(), images.bfloat16(), last, rows[:, ::2], rows[:0], torch.randn(12), images.to("meta")):
        assert are_torchs(x) == neither
    assert are_torchs(torch.randn(torch_small.SMALL // 12 + 1, 12)) == neither
    assert are_torchs(torch.randn(torch_small.SMALL_PLANES // 12 // 7 + 1, 12, 7)) == (False, True)
    for other in (torch.ones(11), torch.ones(1), torch.ones(24)[::2]):
        assert are_torchs(images, weight=other) == neither
    assert are_torchs(images, weight=weight.double()) == neither
    for eps in (-1.0, math.nan):
        assert are_torchs(images, eps=eps) == neither
    for mean in (torch.zeros(1), torch.zeros(13), torch.zeros(12).double(), torch.zeros(24)[::2], torch.full((12,), 9)):
        assert are_torchs(images, statistics=(mean, torch.ones(12))) == (True, False)
    assert are_torchs(images, statistics=(torch.zeros(12), torch.zeros(12) - 1)) == (True, False)
    with sn.backend("numba"):
        assert are_torchs(images) == neither


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_who_looks_at_a_call_gets_ours():
    x, found = torch.randn(32, 12), []

    def look(x):
        found.append(torch_small.batch(x, None, None, 1e-5))
        found.append(torch_small.given(x, torch.zeros(12), torch.ones(12), None, None, 1e-5))
        return x

    torch.func.vmap(look)(x[None])
    torch.func.grad(lambda x: look(x).sum())(x)
    torch.func.functionalize(look)(x)
    with forward_ad.dual_level():
        look(forward_ad.make_dual(x, x))
    make_fx(look)(x)
    assert found == [None] * 10


@pytest.mark.parametrize("far", [0, 100])
@pytest.mark.parametrize("training", [True, False])
def test_a_trace_does_not_depend_on_the_data(far, training):
    mean, var = torch.zeros(16), torch.ones(16)
    graph = make_fx(lambda x: functional.batch_norm(x, mean, var, training=training))(torch.randn(4, 16) + far).graph
    called = {str(node.target) for node in graph.nodes if node.op == "call_function"}
    assert not any("native" in name for name in called)


@pytest.mark.parametrize("size", [1, 7, 9, 12])
def test_sizes_that_torch_does_not_look_at_are_refused_in_our_words(size):
    """Its kernel reads past the end of a vector that is too short."""
    for shape in ((4, 8), (2, 8, 3, 3)):
        x, other, ok = torch.randn(shape), torch.ones(size), torch.ones(8)
        for call in (
            lambda x=x, other=other: functional.normalize_batch(x, other),
            lambda x=x, other=other: functional.normalize_batch(x, None, other),
            lambda x=x, other=other, ok=ok: functional.normalize_running(x, other, ok),
            lambda x=x, other=other, ok=ok: functional.normalize_running(x, ok, other),
        ):
            with pytest.raises(InputError, match=rf"got shape \({size},\), expected \(8,\)"):
                call()


@pytest.mark.parametrize("eps", [0.0, 1e-5])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_channel_without_a_variance(eps, value):
    x, mean, var = torch.randn(8, 4), torch.zeros(4), torch.ones(4)
    x[:, 0] = value
    y, moments = functional.normalize_batch(x, eps=eps)
    assert moments.var[0] == 0
    assert y[:, 1:].isfinite().all()
    functional.batch_norm(x, mean, var, training=True, eps=eps)
    assert var[0] == pytest.approx(0.9)


def test_squares_that_float32_cannot_hold_are_ours():
    x, mean, var = torch.randn(1000, 16) * 1e18, torch.zeros(16), torch.ones(16)
    y = functional.batch_norm(x, mean, var, training=True)
    torch.testing.assert_close(y.std(0), torch.ones(16), rtol=1e-3, atol=0)
    torch.testing.assert_close(var, 0.9 + 0.1 * x.double().var(0).float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("shape", "strides"), [((4, 8, 1, 1), (8, 1, 8, 8)), ((6, 1, 5, 7), (35, 1, 7, 1))])
def test_the_output_has_the_strides_of_the_input(shape, strides):
    """One place per image, or one channel: both orders in one, and the next layer goes by the strides."""
    x = torch.randn(shape).as_strided(shape, strides).requires_grad_()
    assert functional.normalize_batch(x)[0].stride() == x.stride()
    assert functional.normalize_running(x, torch.zeros(shape[1]), torch.ones(shape[1])).stride() == x.stride()


class Sub(torch.Tensor):
    """Somebody's own kind of tensor."""


@pytest.mark.parametrize("place", range(4))
def test_somebodys_own_kind_of_vector_is_ours(place):
    x, vectors = torch.randn(4, 8), [torch.zeros(8), torch.ones(8), torch.ones(8), torch.ones(8)]
    vectors[place] = vectors[place].as_subclass(Sub)
    mean, var, weight, bias = vectors
    assert torch_small.given(x, mean, var, weight, bias, 1e-5) is None
    if place > 1:
        assert torch_small.batch(x, weight, bias, 1e-5) is None


@SHAPES
@pytest.mark.parametrize("is_given", [False, True])
@pytest.mark.parametrize("activation", [None, *functional.ACTIVATIONS])
def test_an_output_may_be_changed_in_place(shape, is_given, activation):
    tensors = made(shape)
    statistics = torch.zeros(shape[1]), torch.ones(shape[1])

    def normalized():
        if is_given:
            return functional.normalize_running(tensors[0], *statistics, *tensors[1:], activation=activation)
        return functional.normalize_batch(*tensors, activation=activation)[0]

    expected = step(normalized(), tensors)
    changed = step(F.dropout(normalized(), 0.0, inplace=True).add_(1), tensors)
    for found, wanted in zip(changed[1:], expected[1:], strict=True):
        assert torch.equal(found, wanted)


def test_relu_keeps_what_is_not_a_number():
    x = torch.randn(8, 4)
    x[0, 1] = math.nan
    assert functional.normalize_batch(x, activation="relu")[0][:, 1].isnan().all()


@SHAPES
@pytest.mark.parametrize("has", [(True, True), (False, True), (False, False)])
@pytest.mark.parametrize("is_given", [False, True])
@pytest.mark.parametrize("order", [2, 3])
def test_higher_derivatives(shape, has, is_given, order):
    """torch's own are wrong from the third on."""
    x, *affine = made(shape)
    weight, bias = (t if there else None for t, there in zip(affine, has, strict=True))
    leaves = [t for t in (x, weight, bias) if t is not None]
    statistics = torch.zeros(shape[1]), torch.ones(shape[1])

    def call():
        if is_given:
            return functional.normalize_running(x, *statistics, weight, bias, activation="silu")
        return functional.normalize_batch(x, weight, bias, activation="silu")[0]

    found = derivatives(call, leaves, order)
    with sn.backend("reference"):
        for one, two in zip(found, derivatives(call, leaves, order), strict=True):
            assert (one - two).abs().max() < 1e-4 * two.abs().max()


def test_a_checkpoint_finds_the_same_kernels_whatever_has_become_of_the_statistics():
    layer = sn.BatchNorm1d(16)
    layer.normalize_by, layer.update_running = "running", True
    for _ in range(20):
        x = (5 + torch.randn(64, 16)).requires_grad_()
        checkpoint(layer, x, use_reentrant=False).sum().backward()
        assert x.grad.isfinite().all()


class Once:
    """Hands a saved tensor out once, as a checkpoint does."""

    def __init__(self, tensor):
        self.tensor = tensor

    def unpack(self):
        if self.tensor is None:
            raise RuntimeError("handed out already")
        tensor, self.tensor = self.tensor, None
        return tensor


@pytest.mark.parametrize("norm", ["batch", "layer", "far batch", "far layer"])
@pytest.mark.parametrize("way", ["checkpoint", "once"])
def test_higher_derivatives_where_a_saved_tensor_is_handed_out_once(norm, way):
    """By torch's kernels, and by ours."""
    x, weight, bias = made((6, 8), mean=100 * norm.startswith("far"))
    dy = torch.randn(6, 8)

    def call(x):
        if norm.endswith("layer"):
            return functional.layer_norm(x, 8, weight, bias)
        return functional.normalize_batch(x, weight, bias)[0]

    def call_kept(x):
        if way == "checkpoint":
            return checkpoint(call, x, use_reentrant=False)
        with saved_tensors_hooks(Once, Once.unpack):
            return call(x)

    def third(call):
        # Of a cotangent that depends on y, torch itself would ask again.
        (dx,) = torch.autograd.grad(call(x), x, dy, create_graph=True)
        (dx,) = torch.autograd.grad(dx.square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), (x, weight, bias), allow_unused=True)

    for found, expected in zip(third(call_kept), third(call), strict=True):
        torch.testing.assert_close(found, expected)


def test_what_was_changed_since_is_not_differentiated():
    x, weight, bias = made((6, 8))
    base = x * 1
    with saved_tensors_hooks(Once, Once.unpack):
        y = functional.normalize_batch(base, weight, bias)[0]
    with torch.no_grad():
        base.mul_(2)
    with pytest.raises(RuntimeError, match="handed out already"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


@pytest.mark.parametrize("kind", [nn.Parameter, lambda x: x])
def test_running_statistics_that_are_no_buffers(kind):
    layer, x = sn.BatchNorm1d(4), torch.randn(8, 4)
    expected = layer.eval()(x)
    for name in ("running_mean", "running_var"):
        value = getattr(layer, name)
        delattr(layer, name)
        setattr(layer, name, kind(value))
    assert torch.equal(layer(x), expected)


@pytest.mark.filterwarnings("ignore:`torch.jit.*is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_trace_of_torch_jit_holds_no_memory_that_was_never_written():
    layer = sn.BatchNorm1d(4)
    with pytest.raises(TypeError):
        torch.jit.trace(layer, torch.randn(64, 4), check_trace=False)
