"""What every relative over the batch keeps: derivatives, compilers, copies, half types, memory order, one update."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint

from steadynorm.errors import InputError
from tests.layers.relatives import RELATIVES, Relative

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated:DeprecationWarning"),
]
ALL = pytest.mark.parametrize("relative", RELATIVES.values(), ids=list(RELATIVES))
MOVING = pytest.mark.parametrize(
    "relative", [r for r in RELATIVES.values() if r.is_moving], ids=[n for n, r in RELATIVES.items() if r.is_moving]
)
IMAGES = pytest.mark.parametrize(
    "relative", [r for r in RELATIVES.values() if r.images], ids=[n for n, r in RELATIVES.items() if r.images]
)
MODES = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
# What takes long, and in evaluation is that of a batch norm but for the statistics.
LONG_MODES = pytest.mark.parametrize(
    "training", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["training", "evaluation"]
)


def trained(relative: Relative, kind: str = "rows", **options) -> nn.Module:
    """A layer that has seen two batches, with a weight and bias that are nobody's default."""
    layer = relative.make(kind, **options)
    for scale in (1.0, 2.0):
        x = torch.randn(8, 3, 4, 4) if kind == "images" else torch.randn(8, 3, 5)
        x = x.to(next(t for t in layer.state_dict().values() if t.is_floating_point()).dtype)
        layer(x * scale + 1, **relative.extra(x))
    with torch.no_grad():
        for name in ("weight", "bias"):
            getattr(layer, name).add_(torch.rand_like(getattr(layer, name)))
    return layer


@ALL
@LONG_MODES
def test_first_and_second_derivatives(relative, training):
    layer = trained(relative, dtype=torch.float64, activation="silu").train(training)
    relative.settle(layer)
    layer.momentum = 0.0  # the derivatives are taken where nothing moves between two calls

    def call(x, residual, *affine):
        given = dict(zip(("weight", "bias"), affine, strict=False))
        return functional_call(layer, given, (x,), {"residual": residual, **relative.extra(x)})

    inputs = [torch.randn(6, 3, 2, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    inputs += [p.detach().clone().requires_grad_() for p in layer.parameters()]
    assert gradcheck(call, inputs)
    assert gradgradcheck(call, inputs)


@ALL
@LONG_MODES
def test_one_graph_gives_what_eager_gives(relative, training):
    torch._dynamo.reset()
    eager = trained(relative, "images" if relative.images else "rows", activation="relu").train(training)
    twin = copy.deepcopy(eager)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    shape = (6, 3, 4, 5) if relative.images else (6, 3, 5)
    for _ in range(2):
        x, dy = torch.randn(shape), torch.randn(shape)
        results = []
        for call in (eager, compiled):
            leaf = x.clone().requires_grad_()
            y = call(leaf, residual=dy, **relative.extra(x))
            y.backward(dy)
            results.append([y.detach(), leaf.grad])
        for ours, expected in zip(*results, strict=True):
            torch.testing.assert_close(ours, expected)
    for ours, expected in zip(twin.state_dict().values(), eager.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, expected)
    for ours, expected in zip(twin.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad)


@ALL
@MODES
def test_export(relative, training):
    layer = trained(relative, activation="relu").train(training)
    eager, x = copy.deepcopy(layer), torch.randn(6, 3, 5)
    exported = torch.export.export(layer, (x,), relative.extra(x)).module()
    torch.testing.assert_close(exported(x, **relative.extra(x)), eager(x, **relative.extra(x)))


@ALL
@pytest.mark.parametrize("way", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["copy", "file"])
def test_copies_are_whole_and_apart(relative, way):
    layer = trained(relative, activation="gelu").bfloat16()
    back = way(layer)
    assert repr(back) == repr(layer)
    before, x = copy.deepcopy(layer.state_dict()), torch.randn(6, 3, 5).bfloat16() + 3
    assert torch.equal(back(x, **relative.extra(x)), copy.deepcopy(layer)(x, **relative.extra(x)))
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key])
    assert any(not torch.equal(a, b) for a, b in zip(before.values(), back.state_dict().values(), strict=True)) == (
        relative.is_moving
    )


@ALL
def test_a_state_dict_is_all_there_is(relative):
    layer, fresh = trained(relative), relative.make()
    fresh.load_state_dict(layer.state_dict(), strict=True)
    x = torch.randn(6, 3, 5)
    for training in (True, False):
        assert torch.equal(layer.train(training)(x, **relative.extra(x)), fresh.train(training)(x, **relative.extra(x)))


@ALL
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_keep_float32_statistics(relative, dtype):
    layer = trained(relative)
    wide = copy.deepcopy(layer)
    layer.to(dtype)
    assert layer.running_mean.dtype == layer.running_var.dtype == torch.float32
    x = torch.randn(16, 3, 8).to(dtype)
    y = layer(x, **relative.extra(x))
    assert y.dtype == dtype
    torch.testing.assert_close(y, wide(x.float(), **relative.extra(x)).to(dtype), rtol=0.02, atol=0.02)
    torch.testing.assert_close(layer.running_var, wide.running_var, rtol=1e-5, atol=1e-5)


@ALL
def test_autocast(relative):
    layer = trained(relative)
    x = torch.randn(16, 3, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer((x @ torch.eye(8)).requires_grad_(), **relative.extra(x))
    assert y.dtype == torch.bfloat16
    y.backward(torch.randn_like(y))
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())


@IMAGES
@MODES
def test_channels_last_in_channels_last_out(relative, training):
    layer = trained(relative, "images").train(training)
    plain = copy.deepcopy(layer)
    x = torch.randn(7, 3, 6, 5)
    last = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    y = layer(last, **relative.extra(x))
    dy = torch.randn_like(x)
    y.backward(dy)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert last.grad.is_contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    expected = plain(x, **relative.extra(x))
    expected.backward(dy)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(last.grad, x.grad)
    torch.testing.assert_close(layer.running_var, plain.running_var)


@ALL
@MODES
def test_vmap_gives_every_example_its_own_statistics_and_remembers_nothing(relative, training):
    layer = trained(relative).train(training)
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(4, 6, 3, 5) * torch.arange(1, 5).view(4, 1, 1, 1)
    y = vmap(lambda x: layer(x, **relative.extra(x)))(x)
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key])
    for ours, one in zip(y, x, strict=True):
        torch.testing.assert_close(ours, copy.deepcopy(layer)(one, **relative.extra(one)))


@ALL
def test_a_functional_gradient_is_the_gradient(relative):
    layer = trained(relative)
    x, dy = torch.randn(6, 3, 5), torch.randn(6, 3, 5)
    found = grad(lambda x: (layer(x, **relative.extra(x)) * dy).sum())(x)
    leaf = x.clone().requires_grad_()
    layer(leaf, **relative.extra(x)).backward(dy)
    torch.testing.assert_close(found, leaf.grad)


@MOVING
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_counts_a_batch_once(relative, use_reentrant):
    layer = trained(relative)
    plain = copy.deepcopy(layer)
    x, dy = torch.randn(6, 3, 5), torch.randn(6, 3, 5)
    leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    extra = relative.extra(x)
    checkpoint(lambda x: layer(x, **extra).sin(), leaf, use_reentrant=use_reentrant).backward(dy)
    plain(other, **extra).sin().backward(dy)
    for ours, expected in zip(layer.buffers(), plain.buffers(), strict=True):
        assert torch.equal(ours, expected)
    torch.testing.assert_close(leaf.grad, other.grad)


@MOVING
def test_a_batch_that_is_not_finite_does_not_enter(relative):
    layer = trained(relative)
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(6, 3, 5)
    x[:, 1, 2] = torch.nan
    layer(x, **relative.extra(x))
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key])


@MOVING
def test_frozen_means_frozen(relative):
    layer = trained(relative).freeze_()
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(6, 3, 5, requires_grad=True)
    y = layer(x, **relative.extra(x))
    assert torch.equal(y, layer.eval()(x, **relative.extra(x)))
    y.sum().backward()
    assert all(p.grad is None for p in layer.parameters())
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key])
    assert "update_running=False" in repr(layer)
    back = relative.make()
    back.load_state_dict(before)
    assert back.update_running is False


@ALL
@MODES
def test_padding_enters_nothing_and_is_zero(relative, training):
    layer = trained(relative, activation="silu").train(training)
    twin = copy.deepcopy(layer)
    lengths = torch.tensor([5, 2, 4, 3, 5, 1])
    x = torch.randn(6, 3, 5)
    mask = torch.arange(5) < lengths[:, None]
    spoiled = torch.where(mask[:, None], x, torch.nan)
    y = layer(spoiled, lengths=lengths, **relative.extra(x))
    assert (y.movedim(1, -1)[~mask] == 0).all()
    torch.testing.assert_close(y, twin(x, mask=mask, **relative.extra(x)), rtol=0, atol=0)
    for ours, expected in zip(layer.buffers(), twin.buffers(), strict=True):
        assert torch.equal(ours, expected)


@ALL
def test_fx_sees_one_node(relative):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = trained(relative).eval()
            self.extra = relative.extra(torch.randn(6, 3, 5))

        def forward(self, x):
            return self.norm(x, **self.extra)

    block, x = Block(), torch.randn(6, 3, 5)
    graph = torch.fx.symbolic_trace(block)
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["norm"]
    torch.testing.assert_close(graph(x), block(x))


@ALL
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": -1e-5}, "eps must be positive.* got -1e-05"),
        ({"activation": "tanh"}, "activation must be one of None, 'relu', .* got 'tanh'"),
        ({"momentum": 1.5}, r"momentum must be in \[0, 1\].* got 1.5"),
        ({"guard": "ignore"}, "guard must be one of 'skip'.* got 'ignore'"),
    ],
    ids=str,
)
def test_wrong_options_are_refused(relative, options, message):
    if not relative.is_moving and not {"eps", "activation"} & options.keys():
        pytest.skip("nothing moves")
    with pytest.raises(InputError, match=message):
        relative.make(**options)


@ALL
def test_wrong_inputs_are_refused_with_the_path_and_change_nothing(relative):
    layer = trained(relative)
    before = copy.deepcopy(layer.state_dict())
    model = nn.ModuleDict({"stem": layer})
    kind = type(layer).__name__
    model.forward = lambda x, **extra: model["stem"](x, **extra)
    for x, message in (
        (torch.randn(6, 3, 2, 2), rf"{kind}.* expected \(N, C\) or \(N, C, L\), got \(6, 3, 2, 2\): use "),
        (torch.randn(6, 4, 5), rf"{kind}.* expected 3 channels in dimension 1, got shape \(6, 4, 5\)"),
        (torch.ones(6, 3, 5, dtype=torch.int64), rf"{kind}.* expected a floating-point tensor, got torch.int64"),
    ):
        with pytest.raises(InputError, match=message):
            model(x, **relative.extra(x))
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key])
