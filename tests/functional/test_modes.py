from __future__ import annotations

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from steadynorm.functional import batch_norm, normalize_batch
from tests import cases


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_backward_under_a_dispatch_mode(backend, activation):
    """Flop counters, selective checkpointing and debuggers run ops below autograd."""
    x = torch.randn(4, 5, 6, requires_grad=True)
    with FlopCounterMode(display=False):
        y, _ = normalize_batch(x, residual=torch.randn(4, 5, 6), activation=activation)
        y.backward(torch.randn(4, 5, 6))
    assert x.grad is not None


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_counts_a_batch_once(backend, use_reentrant):
    running = torch.zeros(5), torch.ones(5)
    x, weight = torch.randn(4, 5, 6, requires_grad=True), torch.randn(5, requires_grad=True)

    def layer(x):
        return batch_norm(x, *running, weight, training=True, activation="relu")

    dy = torch.randn(4, 5, 6)
    expected = torch.autograd.grad(layer(x), (x, weight), dy)
    after_one = [t.clone() for t in running]
    for statistic, start in zip(running, (0, 1), strict=True):
        statistic.fill_(start)
    checkpoint(layer, x, use_reentrant=use_reentrant).backward(dy)
    for now, once in zip(running, after_one, strict=True):
        assert torch.equal(now, once)
    for leaf, wanted in zip((x, weight), expected, strict=True):
        assert torch.equal(leaf.grad, wanted)


def dynamo_warns(test):
    """Lets pass what torch warns of in its own code: how Dynamo traces a function, TorchScript in inductor."""
    for message in (".*should not be instantiated", "`torch.jit.script"):
        test = pytest.mark.filterwarnings(f"ignore:{message}:DeprecationWarning")(test)
    return test


class Recorder:
    """A torch.compile backend that runs the graph as it is and remembers which of our ops are in it."""

    def __init__(self):
        self.ops: list[str] = []

    def __call__(self, graph, example_inputs):
        def remember(module, inputs):
            # An op that writes to its inputs stands as the first argument of a functional wrapper.
            called = [str(what) for node in module.graph.nodes for what in (node.target, *node.args)]
            self.ops += [name for name in called if name.startswith("steadynorm.")]
            return make_boxed_func(module.forward)

        return aot_autograd(fw_compiler=remember, bw_compiler=remember)(graph, example_inputs)


def step(x, running_mean, running_var, weight, bias, residual):
    y = batch_norm(x, running_mean, running_var, weight, bias, True, residual=residual, activation="relu")
    return (y * torch.arange(y.numel(), device=y.device).view(y.shape).cos()).sum()


def compiled_and_eager(compiler, shape=(4, 5, 6, 3), layout="plain", dtype=torch.float32, dynamic=None):
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=compiler, dynamic=dynamic)
    tensors = [
        cases.laid_out(torch.randn(shape), layout).to(dtype),
        torch.zeros(shape[1]),
        torch.ones(shape[1]),
        torch.randn(shape[1]),
        torch.randn(shape[1]),
        cases.laid_out(torch.randn(shape), layout).to(dtype),
    ]
    for function in (step, compiled):
        x, mean, var, weight, bias, residual = (t.clone() for t in tensors)
        leaves = [t.requires_grad_() for t in (x, weight, bias, residual)]
        loss = function(x, mean, var, weight, bias, residual)
        yield [loss.detach(), *torch.autograd.grad(loss, leaves), mean, var]
    torch._dynamo.reset()


def assert_same_results(results):
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-4)
        assert compiled.stride() == eager.stride()


@dynamo_warns
def test_compiles_to_one_node_forward_and_one_backward():
    recorder = Recorder()
    assert_same_results([*compiled_and_eager(recorder)])
    names = sorted(name.split(".")[1] for name in recorder.ops)
    assert names == ["backward", "forward", "update_running_"]


@dynamo_warns
@pytest.mark.parametrize(
    ("shape", "layout"), [((4, 5, 6, 3), "plain"), ((4, 5, 6, 3), "channels_last"), ((8, 5), "plain")], ids=str
)
def test_compiles_whole(shape, layout):
    assert_same_results([*compiled_and_eager("aot_eager", shape, layout)])


@dynamo_warns
def test_compiles_with_sizes_unknown():
    assert_same_results([*compiled_and_eager("aot_eager", dynamic=True)])


@dynamo_warns
def test_compiles_with_inductor():
    assert_same_results([*compiled_and_eager("inductor")])


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.5, -1.0]))
        self.register_buffer("var", torch.tensor([1.5, 0.1]))

    def forward(self, x):
        return batch_norm(x, self.mean, self.var, training=self.training, activation="relu")


@dynamo_warns
@pytest.mark.parametrize("training", [True, False])
def test_exports(training):
    layer, x = Layer().train(training), torch.randn(3, 2, 4)
    program = torch.export.export(layer, (x,))
    layer_again = Layer().train(training)
    exported = program.module()
    torch.testing.assert_close(exported(x), layer_again(x))
    torch.testing.assert_close(exported.mean, layer_again.mean)
    torch.testing.assert_close(exported.var, layer_again.var)
