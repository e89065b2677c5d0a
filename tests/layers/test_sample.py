"""LayerNorm, ChannelLayerNorm, RMSNorm, GroupNorm and InstanceNorm as layers: in place of torch's, and its tools."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import steadynorm as sn

# The compiler makes an instance of every autograd function that it meets, and torch warns of instances.
compiles = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
SHAPE = (4, 6, 5, 8)
PAIRS = {
    "LayerNorm": ((8,), {}),
    "LayerNorm, no bias": ((8,), {"bias": False}),
    "LayerNorm, two dimensions": (((5, 8),), {"elementwise_affine": False}),
    "RMSNorm": ((8,), {}),
    "RMSNorm, eps": (((5, 8),), {"eps": 1e-3}),
    "GroupNorm": ((3, 6), {}),
    "GroupNorm, plain": ((2, 6), {"affine": False}),
    "InstanceNorm2d": ((6,), {}),
    "InstanceNorm2d, affine": ((6,), {"affine": True}),
    "InstanceNorm2d, tracking": ((6,), {"affine": True, "track_running_stats": True}),
}
OURS = {
    **{name: (name.split(",")[0], *given) for name, given in PAIRS.items()},
    "ChannelLayerNorm": ("ChannelLayerNorm", (6,), {}),
    "RMSNorm, llama": ("RMSNorm", (8,), {"convention": "llama"}),
    "RMSNorm, gemma": ("RMSNorm", (8,), {"convention": "gemma"}),
    "GroupNorm, relu": ("GroupNorm", (3, 6), {"activation": "relu"}),
    "InstanceNorm2d, relu": ("InstanceNorm2d", (6,), {"activation": "relu"}),
}


def make(name, **more):
    kind, args, options = OURS[name]
    return drawn(getattr(sn, kind)(*args, **options, **more))


def drawn(layer):
    for parameter in layer.parameters():
        nn.init.normal_(parameter, 1.0)
    return layer


def pair(name):
    """Ours and torch's with the same parameters, by a state_dict that goes both ways."""
    args, options = PAIRS[name]
    ours, theirs = make(name), drawn(getattr(nn, name.split(",")[0])(*args, **options))
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def step(layer, x, *extras):
    """Output, gradients and buffers after one forward and backward."""
    layer.zero_grad()
    x = x.detach().requires_grad_()
    y = layer(x, *extras)
    outputs = y if isinstance(y, tuple) else (y,)
    sum((each * torch.linspace(-1, 2, each.numel()).reshape(each.shape)).sum() for each in outputs).backward()
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
    buffers = {name: b.clone() for name, b in layer.named_buffers() if not name.endswith("num_batches_tracked")}
    return {"y": outputs, "dx": x.grad, **gradients, **buffers}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", PAIRS)
def test_does_what_torch_does(name, training):
    ours, theirs = pair(name)
    assert repr(ours) == repr(theirs)
    for layer in (ours, theirs):
        layer.train(training)
    for _ in range(2):
        x = torch.randn(SHAPE) * 3 + 1
        torch.testing.assert_close(step(ours, x), step(theirs, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", sorted({name.split(",")[0] for name in PAIRS} | {"InstanceNorm1d", "InstanceNorm3d"}))
def test_the_signature_begins_with_torchs(name):
    ours, theirs = getattr(sn, name), getattr(nn, name)
    assert issubclass(ours, theirs)
    mine = inspect.signature(ours).parameters
    for parameter in inspect.signature(theirs).parameters.values():
        assert mine[parameter.name].default == parameter.default
        assert mine[parameter.name].kind == parameter.kind


@pytest.mark.parametrize("name", PAIRS)
def test_a_layer_of_torch_becomes_ours_by_its_class(name):
    ours, theirs = pair(name)
    theirs.__class__ = type(ours)
    x = torch.randn(SHAPE)
    assert repr(theirs) == repr(ours)
    assert torch.equal(theirs(x), ours(x))


@pytest.mark.parametrize("name", OURS)
def test_pickles_and_copies(name):
    layer, x = make(name), torch.randn(SHAPE)
    for other in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
        assert repr(other) == repr(layer)
        assert torch.equal(other(x), copy.deepcopy(layer)(x))


@pytest.mark.parametrize("name", OURS)
def test_derivatives_to_the_second_order(name):
    layer = make(name, dtype=torch.float64)
    parameters = dict(layer.named_parameters())
    x = torch.randn(2, *SHAPE[1:], dtype=torch.float64, requires_grad=True)

    def call(x, *values):
        return functional_call(layer, dict(zip(parameters, values, strict=True)), (x,))

    with sn.backend("reference"):
        assert gradcheck(call, (x, *parameters.values()), fast_mode=True)
        assert gradgradcheck(call, (x, *parameters.values()), fast_mode=True)


@pytest.mark.parametrize("name", OURS)
def test_transforms(name):
    layer, x = make(name), torch.randn(3, *SHAPE)
    torch.testing.assert_close(torch.vmap(layer)(x), torch.stack([layer(each) for each in x]))
    weights = torch.randn(SHAPE)
    found = torch.func.grad(lambda x: (layer(x) * weights).sum())(x[0])
    leaf = x[0].clone().requires_grad_()
    torch.testing.assert_close(found, torch.autograd.grad((layer(leaf) * weights).sum(), leaf)[0])


EXTRAS = {
    "LayerNorm": {"addend": torch.randn(SHAPE)},
    "RMSNorm, llama": {"addend": torch.randn(SHAPE)},
    "GroupNorm, relu": {"residual": torch.randn(SHAPE), "lengths": torch.tensor([8, 1, 4, 3])},
    "InstanceNorm2d, tracking": {"mask": torch.rand(4, 5, 8) > 0.3},
}

CALLS = [*((name, {}) for name in OURS), *EXTRAS.items()]
CALL_NAMES = [f"{name} {'+'.join(extras)}".strip() for name, extras in CALLS]


@compiles
@pytest.mark.parametrize(("name", "extras"), CALLS, ids=CALL_NAMES)
def test_one_graph(name, extras):
    layer, x = make(name), torch.randn(SHAPE)
    twin = copy.deepcopy(layer)
    torch._dynamo.reset()
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    given = [extras.get(key) for key in ("addend", "residual", "mask", "lengths")]
    given = given[:1] if "addend" in extras else given[1:] if extras else []
    found = step(compiled, x, *given)
    expected = step(layer, x, *given)
    torch.testing.assert_close(list(found.values()), list(expected.values()))


@compiles
def test_another_batch_size_is_not_another_graph():
    graphs = []

    def count(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(sn.GroupNorm(3, 6), fullgraph=True, backend=count)
    for n in (4, 7, 9, 16):
        compiled(torch.randn(n, 6, 5))
    assert len(graphs) <= 2, "one for the first size, one for every size"


@pytest.mark.parametrize("is_strict", [pytest.param(True, marks=pytest.mark.slow), False])
@pytest.mark.parametrize(("name", "extras"), CALLS, ids=CALL_NAMES)
def test_an_exported_graph_needs_nothing_of_ours(name, extras, is_strict):
    """So that converters know it, and that it loads where this package is not installed."""
    layer, x = make(name).eval(), torch.randn(SHAPE)
    exported = torch.export.export(layer, (x,), extras, strict=is_strict)
    called = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert called
    assert not any("steadynorm" in target for target in called)
    if not extras and name not in ("RMSNorm, llama", "RMSNorm, gemma"):
        assert any("norm" in target for target in called), "one operator that converters know"
    torch.testing.assert_close(exported.module()(x, **extras), layer(x, **extras))


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm2d, affine", "ChannelLayerNorm"])
def test_export_with_a_batch_size_left_open(name):
    layer = make(name)
    batch = torch.export.Dim("batch", min=2)
    given = next(iter(inspect.signature(layer.forward).parameters))
    exported = torch.export.export(layer, (torch.randn(SHAPE),), dynamic_shapes={given: {0: batch}}).module()
    x = torch.randn(11, *SHAPE[1:])
    torch.testing.assert_close(exported(x), layer(x))


def test_fx_sees_one_node():
    model = nn.Sequential(*(make(name) for name in OURS))
    graph = torch.fx.symbolic_trace(model)
    assert len([node for node in graph.graph.nodes if node.op == "call_module"]) == len(OURS)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.group = sn.RMSNorm(8), sn.GroupNorm(2, 6)

        def forward(self, x, a):
            y, total = self.norm(x, a)
            return self.group(y, residual=total)

    x, a = torch.randn(SHAPE), torch.randn(SHAPE)
    block = Block()
    torch.testing.assert_close(torch.fx.symbolic_trace(block)(x, a), block(x, a))


@pytest.mark.parametrize("name", [name for name in OURS if "Norm2d" in name or "Group" in name or "Channel" in name])
def test_channels_last_in_channels_last_out(name):
    x = torch.randn(SHAPE).contiguous(memory_format=torch.channels_last).requires_grad_()
    layer = make(name)
    y = layer(x)
    y.backward(torch.randn(SHAPE))
    for tensor in (y, x.grad):
        assert tensor.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, layer(x.detach().contiguous()), rtol=1e-4, atol=1e-5)


def test_rows_of_a_channels_last_tensor_keep_it_too():
    x = torch.randn(SHAPE).contiguous(memory_format=torch.channels_last)
    for layer in (sn.LayerNorm(8), sn.RMSNorm((6, 5, 8))):
        y, total = layer(x, x)
        for tensor in (layer(x), y, total):
            assert tensor.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OURS)
def test_half_input_beside_float32_weights(name, dtype):
    layer, x = make(name), torch.randn(SHAPE).to(dtype).requires_grad_()
    y, expected = layer(x), copy.deepcopy(layer)(x.float())
    # Llama's formula is a product of the two types.
    assert y.dtype == (torch.float32 if "llama" in name else dtype)
    torch.testing.assert_close(y.float(), expected, rtol=2e-2, atol=2e-2)
    y.float().square().mean().backward()
    assert x.grad.dtype == dtype
    assert all(parameter.grad.dtype == torch.float32 for parameter in layer.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm2d, affine"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
def test_autocast_gives_the_dtype_that_torch_gives(name, given, dtype, device):
    """On the CPU a norm keeps the type; elsewhere autocast runs layer, RMS and group norm in float32."""
    ours, theirs = pair(name)
    enabled = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    torch.set_autocast_enabled(device, True)
    torch.set_autocast_dtype(device, dtype)
    try:
        # Shapes and types only: no such device is needed.
        with FakeTensorMode():
            x = torch.empty(SHAPE, dtype=given, device=device)
            parameters = [{k: torch.empty(v.shape, device=device) for k, v in ours.named_parameters()}] * 2
            y, expected = (functional_call(m, p, (x,)) for m, p in zip((ours, theirs), parameters, strict=True))
            assert y.dtype == expected.dtype
            assert y.device == expected.device
    finally:
        torch.set_autocast_enabled(device, enabled[0])
        torch.set_autocast_dtype(device, enabled[1])


@pytest.mark.slow  # four more kernels
def test_autocast_in_a_model():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), sn.GroupNorm(2, 6, activation="relu"), nn.Conv2d(6, 4, 1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(torch.randn(2, 3, 8, 8))
    y.square().mean().backward()
    assert y.dtype == torch.bfloat16
    assert model[1].weight.grad.dtype == torch.float32


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_gives_the_same(reentrant):
    layer, x = make("GroupNorm, relu"), torch.randn(SHAPE, requires_grad=True)
    weights = torch.randn(SHAPE)
    (expected,) = torch.autograd.grad((layer(x) * weights).sum(), x)
    (checkpoint(layer, x, use_reentrant=reentrant) * weights).sum().backward()
    torch.testing.assert_close(x.grad, expected)


def test_the_pattern_of_a_pre_norm_transformer():
    """The sum that is normalised is the sum that goes on."""
    norm, x, branch = drawn(sn.LayerNorm(8)), torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    y, total = norm(x, branch)
    assert torch.equal(total, x + branch)
    torch.testing.assert_close(y, norm(x + branch))
    y, total = norm(x, branch.bfloat16())
    assert total.dtype == y.dtype == torch.float32
    y, total = drawn(sn.RMSNorm(8))(x.bfloat16(), branch)
    assert total.dtype == y.dtype == torch.float32, "as x + addend"


def test_gemma_starts_as_the_identity():
    norm, plain = sn.RMSNorm(8, eps=1e-6, convention="gemma"), sn.RMSNorm(8, eps=1e-6)
    x = torch.randn(3, 8)
    assert (norm.weight == 0).all()
    assert torch.equal(norm(x), plain(x))
    nn.init.normal_(norm.weight)
    norm.reset_parameters()
    assert (norm.weight == 0).all()


def test_channel_layer_norm_is_the_one_of_convnext():
    norm, x = drawn(sn.ChannelLayerNorm(6)), torch.randn(SHAPE)
    mean = x.mean(1, keepdim=True)
    var = (x - mean).square().mean(1, keepdim=True)
    expected = norm.weight[:, None, None] * ((x - mean) / torch.sqrt(var + 1e-6)) + norm.bias[:, None, None]
    torch.testing.assert_close(norm(x), expected)
    plain = nn.LayerNorm(6, eps=1e-6)
    plain.load_state_dict(norm.state_dict(), strict=True)
    torch.testing.assert_close(norm(x[..., 0, 0]), plain(x[..., 0, 0]))
