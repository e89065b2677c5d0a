"""Derivatives of every order and kind, functional transforms, and activation checkpointing."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vmap
from torch.utils.checkpoint import checkpoint

from steadynorm.layers import BatchNorm1d, BatchNorm2d

# torch loads its own forward-mode formulas with a deprecated function of its own.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")

GUARDS = ("skip", "raise", "propagate")


def double(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("activation", [None, "silu", "gelu"])
@pytest.mark.parametrize("setting", ["training", "evaluation", "frozen", "untracked", "adapting"])
def test_first_and_second_derivatives(setting, activation):
    layer = BatchNorm1d(2, dtype=torch.float64, activation=activation, track_running_stats=setting != "untracked")
    layer(double(9, 2) * 2 + 1)
    layer.train(setting != "evaluation")
    if setting == "frozen":
        layer.freeze_(affine=False)
    if setting == "adapting":
        # The update must not reach what the derivatives are taken at, so one step of it is followed by none.
        layer.normalize_by, layer.momentum = "running", 0.0

    def call(x, residual, weight, bias):
        return functional_call(layer, {"weight": weight, "bias": bias}, (x, residual))

    inputs = [t.requires_grad_() for t in (double(3, 2, 3), double(3, 2, 3), double(2), double(2))]
    assert gradcheck(call, inputs, check_forward_ad=True)
    assert gradgradcheck(call, inputs)


def test_a_gradient_penalty():
    x = double(6, 4, 3, 3).requires_grad_()
    dx = []
    for layer in (BatchNorm2d(4, dtype=torch.float64, activation="relu"), nn.BatchNorm2d(4, dtype=torch.float64)):
        y = layer(x) if isinstance(layer, BatchNorm2d) else layer(x).relu()
        (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad((slope.norm() - 1).square(), x)
        dx.append(second)
    torch.testing.assert_close(*dx, rtol=0, atol=1e-10)


def test_forward_mode_moves_the_running_statistics_as_a_plain_call_does():
    layer, plain, x = BatchNorm1d(3), BatchNorm1d(3), torch.randn(8, 3)
    with forward_ad.dual_level():
        y, dy = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, torch.ones_like(x))))
        assert not forward_ad.unpack_dual(layer.running_mean).tangent
    torch.testing.assert_close(y, plain(x))
    torch.testing.assert_close(dy, torch.zeros_like(dy), rtol=0, atol=1e-5)
    torch.testing.assert_close(layer.running_var, plain.running_var)
    assert layer.num_batches_tracked.item() == 1


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("guard", GUARDS)
@pytest.mark.parametrize("transform", [grad, jacrev, jacfwd, hessian])
def test_transforms_work_in_training_and_remember_nothing(transform, guard, momentum):
    """torch.nn raises here: its in-place update of a buffer from inside a transform is refused."""
    layer = BatchNorm1d(3, dtype=torch.float64, guard=guard, momentum=momentum)
    theirs = nn.BatchNorm1d(3, dtype=torch.float64, track_running_stats=False)
    x, weights = double(5, 3), double(5, 3)
    before = [buffer.clone() for buffer in layer.buffers()]
    torch.testing.assert_close(
        transform(lambda x: (layer(x).pow(3) * weights).sum())(x),
        transform(lambda x: (theirs(x).pow(3) * weights).sum())(x),
    )
    assert all(torch.equal(a, b) for a, b in zip(before, layer.buffers(), strict=True))


@pytest.mark.parametrize("guard", GUARDS)
def test_vmap_gives_every_example_its_own_statistics_and_remembers_nothing(guard):
    layer = BatchNorm1d(3, guard=guard)
    x = torch.randn(4, 6, 3, 5) * torch.arange(1, 5).view(4, 1, 1, 1)
    mask = torch.rand(4, 6, 5) > 0.3
    y = vmap(lambda x, mask: layer(x, mask=mask))(x, mask)
    torch.testing.assert_close(y, torch.stack([BatchNorm1d(3)(a, mask=m) for a, m in zip(x, mask, strict=True)]))
    assert layer.num_batches_tracked.item() == 0


@pytest.mark.parametrize("training", [True, False])
def test_per_sample_gradients(training):
    layer = BatchNorm1d(3).train(training)
    x, cotangent = torch.randn(4, 3, 6), torch.randn(3, 6)
    parameters = dict(layer.named_parameters())

    def loss(parameters, sample):
        return (functional_call(layer, parameters, (sample[None],)) * cotangent).sum()

    found = vmap(grad(loss), (None, 0))(parameters, x)["weight"]
    for sample, gradient in zip(x, found, strict=True):
        torch.testing.assert_close(gradient, grad(loss)(parameters, sample)["weight"])


def test_an_ensemble_of_stacked_layers():
    layers = [BatchNorm1d(3) for _ in range(4)]
    for number, layer in enumerate(layers):
        layer(torch.randn(8, 3) * (number + 1))
    parameters, buffers = stack_module_state(layers)
    x = torch.randn(5, 3)
    # Evaluation first: a training step would move the layers and not the stacked copies.
    for training in (False, True):
        one = layers[0].train(training)
        y = vmap(lambda p, b, one=one: functional_call(one, (p, b), (x,)))(parameters, buffers)
        torch.testing.assert_close(y, torch.stack([layer.train(training)(x) for layer in layers]))


def test_jvp_matches_torch_without_running_statistics():
    x, tangent = double(5, 3), double(5, 3)
    ours = jvp(BatchNorm1d(3, dtype=torch.float64), (x,), (tangent,))
    theirs = jvp(nn.BatchNorm1d(3, dtype=torch.float64, track_running_stats=False), (x,), (tangent,))
    torch.testing.assert_close(ours, theirs)


def test_two_forwards_one_backward():
    """A GAN's discriminator: real and fake through the same layer, then one backward."""
    layer, x = BatchNorm2d(3), torch.randn(4, 3, 2, 2, requires_grad=True)
    (layer(x) * layer(x * 2 + 1)).sum().backward()
    assert layer.num_batches_tracked.item() == 2
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"guard": "raise"}, {"guard": "propagate"}], ids=str)
@pytest.mark.parametrize("is_nested", [False, True])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_counts_a_batch_once(use_reentrant, is_nested, options):
    recomputing, plain = BatchNorm2d(3, **options), BatchNorm2d(3, **options)
    runs = []

    def block(x):
        runs.append(x)
        return recomputing(x).relu()

    def call(x):
        inner = checkpoint(block, x, use_reentrant=use_reentrant) if is_nested else block(x)
        return inner * 2

    for _ in range(2):
        x = torch.randn(4, 3, 5, 5)
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        cotangent = torch.randn(x.shape)
        checkpoint(call, ours, use_reentrant=use_reentrant).backward(cotangent)
        (plain(theirs).relu() * 2).backward(cotangent)
        assert torch.equal(ours.grad, theirs.grad)
    assert len(runs) > 2, "the block was never recomputed"
    for recomputed, expected in zip(recomputing.buffers(), plain.buffers(), strict=True):
        assert torch.equal(recomputed, expected)
