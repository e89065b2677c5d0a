"""The layers on a CUDA device: `pytest -m gpu`. The kernels are held to their contract elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steadynorm
from steadynorm import functional, kernels
from steadynorm.kernels import triton_gpu
from tests import cases, oracles
from tests.agree import assert_agrees
from tests.layers.test_device import LAYERS, MASKED

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated:DeprecationWarning"),
]
DEVICE = "cuda"
# More values than 31 bits count, in the half type that takes the least memory: 4.3 GB each of x, y, dy and dx.
MANY = (3, 7, 1 << 27)


@pytest.fixture
def no_wait() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def on_device(x: Tensor, running_mean: Tensor, running_var: Tensor, *args: Any, **extras: Any) -> Tensor:
    """batch_norm on the device, for tensors of the host."""
    moved = [t.to(DEVICE) if isinstance(t, Tensor) else t for t in (x, running_mean, running_var, *args)]
    extras = {name: t.to(DEVICE) if isinstance(t, Tensor) else t for name, t in extras.items()}
    assert kernels.choose(moved[0]) is triton_gpu or moved[0].numel() == 0
    y = functional.batch_norm(*moved, **extras)
    for host, device in zip((running_mean, running_var), moved[1:3], strict=True):
        host.copy_(device)
    return y.cpu()


@pytest.mark.parametrize("case", cases.ALL, ids=str)
def test_agrees_with_the_oracle(case):
    assert_agrees(on_device, oracles.batch_norm, case)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.usefixtures("no_wait")
def test_a_step_waits_for_nothing(name):
    layer = LAYERS[name]().to(DEVICE, non_blocking=True)
    x = torch.randn(8, 8, 4, 4, device=DEVICE, requires_grad=True)
    extras = {"mask": torch.rand(8, 4, 4, device=DEVICE) < 0.7} if name in MASKED else {}
    for given in ({}, extras):
        y = layer(x, **given)
        y.backward(torch.ones_like(y))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_captured_graph_trains_as_the_layer_does(layout):
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Conv2d(3, 16, 3), steadynorm.BatchNorm2d(16, activation="relu")) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    captured, plain = (layer.to(DEVICE, memory_format=layout) for layer in layers)
    batches = [torch.randn(8, 3, 34, 34, device=DEVICE).to(memory_format=layout) for _ in range(4)]
    x = batches[0].clone()

    def step(layer: nn.Module, x: Tensor) -> None:
        layer(x).square().sum().backward()

    stream = torch.cuda.Stream()
    before = {name: t.clone() for name, t in captured.state_dict().items()}
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(captured, x)
    torch.cuda.current_stream().wait_stream(stream)
    captured.load_state_dict(before)
    graph = torch.cuda.CUDAGraph()
    captured.zero_grad(set_to_none=False)
    with torch.cuda.graph(graph):
        step(captured, x)
    captured.load_state_dict(before)
    captured.zero_grad(set_to_none=False)
    for batch in batches:
        x.copy_(batch)
        graph.replay()
        step(plain, batch)
    for (name, one), two in zip(captured.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(one, two, msg=name)
    for one, two in zip(captured.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("name", ["BatchNorm2d", "frozen", "layer", "rms", "group"])
def test_compiles_to_one_graph(name):
    layer = LAYERS[name]().to(DEVICE)
    twin = LAYERS[name]().to(DEVICE)
    twin.load_state_dict(layer.state_dict())
    x, dy = torch.randn(2, 8, 8, 4, 4, device=DEVICE)
    found = []
    for run in (twin, torch.compile(layer, fullgraph=True)):
        leaf = x.clone().requires_grad_()
        y = run(leaf)
        y.backward(dy)
        found.append((y, leaf.grad))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two)
    for one, two in zip(layer.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_under_autocast(dtype):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), steadynorm.BatchNorm2d(8, activation="relu")).to(DEVICE)
    with torch.autocast(DEVICE, dtype):
        y = model(torch.randn(4, 3, 10, 10, device=DEVICE))
    assert y.dtype == dtype
    y.float().sum().backward()
    assert model[1].running_mean.dtype == torch.float32
    assert model[0].weight.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(70_001, 3), (64, 70_001), (70_001, 2, 3), (1, 3, 70_001)])
def test_more_than_65535_of_each(shape):
    """A dimension of a grid ends there."""
    case = cases.Case("many", shape, activation="relu", has_residual=True)
    assert_agrees(on_device, oracles.batch_norm, case)


def test_more_than_two_to_the_31_values():
    x = torch.empty(MANY, dtype=torch.bfloat16, device=DEVICE).normal_()
    x[:, 3] += 5
    y, moments = functional.normalize_batch(x.requires_grad_())
    assert moments.count == MANY[0] * MANY[2]
    expected = torch.tensor([0, 0, 0, 5, 0, 0, 0], dtype=torch.float64, device=DEVICE)
    torch.testing.assert_close(moments.mean, expected, atol=1e-3, rtol=0)
    torch.testing.assert_close(moments.var, torch.ones_like(expected), atol=2e-3, rtol=0)
    # The very last values, which an offset of 31 bits does not reach.
    last = ((x[-1, -1, -1000:].double() - moments.mean[-1]) * moments.invstd(1e-5)[-1]).to(torch.bfloat16)
    torch.testing.assert_close(y[-1, -1, -1000:], last, atol=0.02, rtol=0.01)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert dx[-1, -1, -1000:].abs().max() < 1e-2


def test_the_same_bits_every_time():
    x = torch.randn(64, 256, 28, 28, device=DEVICE)
    found = []
    for _ in range(3):
        leaf = x.clone().requires_grad_()
        y, moments = functional.normalize_batch(leaf, activation="silu")
        y.backward(x)
        found.append((y, moments.mean, moments.var, leaf.grad))
    for again in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], again, strict=True))


def test_the_backend_is_said():
    line = {line.name: line for line in kernels.status()}["triton"]
    assert line.is_available
    assert "CUDA" in line.reason
