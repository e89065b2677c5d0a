from __future__ import annotations

import pytest
import torch

from steadynorm import kernels
from steadynorm.functional import batch_norm, normalize_batch, normalize_running


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_vmap_is_a_loop(backend, activation):
    x, residual, weight = torch.randn(3, 4, 5, 6), torch.randn(3, 4, 5, 6), torch.randn(3, 5)

    def call(x, residual, weight):
        return normalize_batch(x, weight, residual=residual, activation=activation)[0]

    expected = torch.stack([call(*each) for each in zip(x, residual, weight, strict=True)])
    torch.testing.assert_close(torch.vmap(call)(x, residual, weight), expected)
    torch.testing.assert_close(
        torch.vmap(call, in_dims=(1, 1, 0))(x.movedim(0, 1), residual.movedim(0, 1), weight), expected
    )


def test_vmap_in_evaluation():
    x, mean, var = torch.randn(3, 4, 5, 6), torch.randn(5), torch.rand(5) + 0.5
    expected = torch.stack([normalize_running(each, mean, var) for each in x])
    torch.testing.assert_close(torch.vmap(lambda x: normalize_running(x, mean, var))(x), expected)


def test_gradients_of_every_sample(backend):
    """In evaluation the samples are independent: vmap(grad) is the loop over samples."""
    x, weight, mean, var = torch.randn(6, 5, 4), torch.randn(5), torch.randn(5), torch.rand(5) + 0.5

    def loss(weight, x):
        return normalize_running(x[None], mean, var, weight, activation="relu").square().sum()

    found = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(weight, x)
    expected = torch.stack([torch.autograd.grad(loss(w := weight.clone().requires_grad_(), each), w)[0] for each in x])
    torch.testing.assert_close(found, expected)


def test_func_grad_is_autograd(backend):
    x, weight, dy = torch.randn(4, 5, 6), torch.randn(5), torch.randn(4, 5, 6)

    def loss(x, weight):
        return (normalize_batch(x, weight, activation="silu")[0] * dy).sum()

    leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
    expected = torch.autograd.grad(loss(*leaves), leaves)
    for found, wanted in zip(torch.func.grad(loss, argnums=(0, 1))(x, weight), expected, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_jacrev_and_jacfwd_are_the_jacobian():
    x = torch.randn(3, 2, 2, dtype=torch.float64)

    def call(x):
        return normalize_batch(x, activation="gelu")[0]

    with kernels.backend("reference"):
        expected = torch.autograd.functional.jacobian(call, x)
    torch.testing.assert_close(torch.func.jacrev(call)(x), expected)
    torch.testing.assert_close(torch.func.jacfwd(call)(x), expected)


def test_running_statistics_stay_outside_a_transform():
    running = torch.zeros(5), torch.ones(5)
    x = torch.randn(3, 4, 5, 6)
    torch.vmap(lambda x: batch_norm(x, *running, training=True))(x)
    torch.func.grad(lambda x: batch_norm(x, *running, training=True)[0].sum())(x[0])
    assert running[0].eq(0).all()
    assert running[1].eq(1).all()
