"""torch.compile in one graph and torch.export, in training and evaluation, with every option."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.utils.checkpoint import checkpoint

from steadynorm.errors import NonFiniteStatisticsError
from steadynorm.layers import BatchNorm1d, BatchNorm2d

# The compiler makes an instance of every autograd function that it meets, and torch warns of instances.
# The default compiler uses deprecated parts of torch itself.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated:DeprecationWarning"),
]

OPTIONS = [
    {},
    {"momentum": None},
    {"activation": "relu"},
    {"activation": "gelu"},
    {"guard": "raise"},
    {"guard": "propagate"},
    {"track_running_stats": False},
    {"affine": False},
    {"bias": False},
    {"single_value": "running"},
]
SWITCHES = [
    {"normalize_by": "running", "update_running": False, "train_affine": False},
    {"normalize_by": "running", "update_running": True},
    {"normalize_by": "batch", "update_running": False},
]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def steps(layer: nn.Module, call: nn.Module, extras: dict[str, Tensor], count: int = 2) -> list[Tensor]:
    """Everything that `count` training steps show: outputs, gradients, buffers."""
    generator = torch.Generator().manual_seed(7)
    seen = []
    for _ in range(count):
        x, cotangent = (torch.randn(6, 3, 4, 5, generator=generator) for _ in range(2))
        x.requires_grad_()
        y = call(x, **extras)
        if y.requires_grad:
            y.backward(cotangent)
        seen += [y.detach(), x.grad]
    gradients = [p.grad if p.grad is not None else torch.zeros(()) for p in layer.parameters()]
    return [*seen, *gradients, *(buffer.clone() for buffer in layer.buffers())]


def assert_compiled_equals_eager(layer: nn.Module, extras: dict[str, Tensor], backend: str = "aot_eager") -> None:
    twin = copy.deepcopy(layer)
    compiled = torch.compile(twin, fullgraph=True, backend=backend)
    for ours, expected in zip(steps(twin, compiled, extras), steps(layer, layer, extras), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("training", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_one_graph_with_every_option(options, training):
    assert_compiled_equals_eager(BatchNorm2d(3, **options).train(training), {})


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "extras",
    [
        {"residual": torch.randn(6, 3, 4, 5)},
        {"mask": torch.rand(6, 4, 5) > 0.4},
        {"lengths": torch.tensor([5, 1, 0, 3, 2, 4])},
    ],
    ids=lambda extras: next(iter(extras)),
)
def test_one_graph_with_all_that_comes_with_the_input(extras, training):
    assert_compiled_equals_eager(BatchNorm2d(3, activation="silu", guard="raise").train(training), extras)


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_one_graph_with_switches(switches):
    layer = BatchNorm2d(3)
    for switch, value in switches.items():
        setattr(layer, switch, value)
    assert_compiled_equals_eager(layer, {})


def test_frozen_is_frozen_when_compiled():
    layer = BatchNorm2d(3)
    layer(torch.randn(6, 3, 4, 5))
    layer.freeze_()
    before = [tensor.clone() for tensor in layer.state_dict().values()]
    steps(layer, torch.compile(layer, fullgraph=True, backend="aot_eager"), {})
    assert all(torch.equal(a, b) for a, b in zip(before, layer.state_dict().values(), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"guard": "raise", "activation": "relu"}], ids=str)
def test_one_graph_with_the_default_compiler(options):
    assert_compiled_equals_eager(BatchNorm2d(3, **options), {}, backend="inductor")


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_raise_names_the_layer_from_inside_a_graph(backend):
    model = nn.Sequential(nn.ReLU(), BatchNorm2d(3, guard="raise"))
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    x = torch.ones(2, 3, 4, 4)
    x[0, 2, 0, 0] = math.nan
    with pytest.raises(NonFiniteStatisticsError, match=r"BatchNorm2d at 1 got .* in channel 2 \("):
        compiled(x)
    assert torch.equal(model[1].running_mean, torch.zeros(3))
    assert model[1].num_batches_tracked.item() == 0


def test_one_value_per_channel_says_why_when_compiled_too():
    compiled = torch.compile(nn.Sequential(BatchNorm2d(3)), fullgraph=True, backend="aot_eager")
    with pytest.raises(
        torch._dynamo.exc.Unsupported, match="BatchNorm2d at 0 expected more than one value per channel"
    ):
        compiled(torch.randn(1, 3, 1, 1))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_checkpointing_inside_a_graph_counts_a_batch_once(backend):
    layer, plain = BatchNorm2d(3), BatchNorm2d(3)
    graph = torch.compile(
        lambda x: checkpoint(lambda x: layer(x).sin(), x, use_reentrant=False), fullgraph=True, backend=backend
    )
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    graph(x).sum().backward()
    plain(x)
    for ours, expected in zip(layer.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_around_a_graph_counts_a_batch_once(use_reentrant):
    layer = BatchNorm2d(3)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    checkpoint(compiled, x, use_reentrant=use_reentrant).sum().backward()
    assert layer.num_batches_tracked.item() == 1


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_export(options, training):
    x = torch.randn(6, 3, 5)
    layer = BatchNorm1d(3, **options).train(training)
    eager = copy.deepcopy(layer)
    exported = torch.export.export(layer, (x,)).module()
    torch.testing.assert_close(exported(x), eager(x))
    for name, buffer in eager.named_buffers():
        torch.testing.assert_close(exported.get_buffer(name), buffer)


@pytest.mark.parametrize("is_strict", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_an_exported_evaluation_needs_nothing_of_ours(dtype, is_strict):
    """So that converters know it, and that it loads where this package is not installed."""
    layer = BatchNorm2d(3, activation="relu").to(dtype).eval()
    x, residual = torch.randn(4, 3, 5, 5, dtype=dtype), torch.randn(4, 3, 5, 5, dtype=dtype)
    mask = torch.rand(4, 5, 5) > 0.5
    exported = torch.export.export(layer, (x, residual, mask), strict=is_strict)
    called = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert "aten.batch_norm.default" in called
    assert not any("steadynorm" in target or "clone" in target for target in called)
    spoiled = torch.where(mask[:, None], x, math.nan)
    torch.testing.assert_close(exported.module()(spoiled, residual, mask), layer(x, residual, mask))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("extra", [None, "lengths", "mask"])
def test_export_with_a_batch_size_left_open(extra, training):
    layer = BatchNorm1d(3, activation="relu").train(training)

    def inputs(n: int) -> tuple[tuple[Tensor], dict[str, Tensor]]:
        extras = {"lengths": torch.arange(n) % 6, "mask": torch.rand(n, 5) > 0.3}
        return (torch.randn(n, 3, 5),), {} if extra is None else {extra: extras[extra]}

    args, kwargs = inputs(6)
    smallest = 2 if training else 1
    batch = torch.export.Dim("batch", min=smallest)
    dynamic = {"input": {0: batch}} | ({} if extra is None else {extra: {0: batch}})
    exported = torch.export.export(copy.deepcopy(layer), args, kwargs, dynamic_shapes=dynamic).module()
    for n in (smallest, 11):
        args, kwargs = inputs(n)
        torch.testing.assert_close(exported(*args, **kwargs), layer(*args, **kwargs))


def test_another_batch_size_is_not_another_graph():
    graphs = []

    def count(graph: torch.fx.GraphModule, _inputs: list[Tensor]):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(BatchNorm1d(3), fullgraph=True, backend=count)
    for n in (4, 7, 9, 16, 33):
        compiled(torch.randn(n, 3))
    assert len(graphs) <= 2, "one for the first size, one for every size"


@pytest.mark.parametrize("transform", [grad, lambda function: vmap(function)], ids=["grad", "vmap"])
def test_transforms_inside_a_graph_remember_nothing(transform):
    layer, weights = BatchNorm1d(3), torch.randn(4, 3)

    def call(x: Tensor) -> Tensor:
        return (layer(x) * weights).sum()

    x = torch.randn(4, 3) if transform is grad else torch.randn(5, 4, 3)
    compiled = torch.compile(transform(call), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), transform(call)(x))
    assert layer.num_batches_tracked.item() == 0
