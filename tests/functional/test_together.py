from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from steadynorm import kernels
from steadynorm.errors import InputError
from steadynorm.functional import Part, batch_norm, normalize_batch, normalize_together, update_running_
from tests import cases, oracles
from tests.agree import assert_agrees


def cut(x, count):
    """`count` uneven parts; of four, two are empty and one is a single sample."""
    n = len(x)
    return x.split({1: [n], 2: [(n + 2) // 3, n - (n + 2) // 3], 4: [0, min(1, n), 0, n - min(1, n)]}[count])


def in_parts(count):
    """Batch normalization of a tensor that is cut into parts and put together again."""

    def candidate(
        x,
        running_mean,
        running_var,
        weight,
        bias,
        training,
        momentum,
        eps,
        *,
        residual=None,
        activation=None,
        mask=None,
    ):
        split = [[None] * count if t is None else cut(t, count) for t in (x, residual, mask)]
        parts = [Part(*tensors) for tensors in zip(*split, strict=True)]
        ys, moments = normalize_together(parts, weight, bias, eps=eps, activation=activation)
        update_running_(running_mean, running_var, moments, momentum)
        return torch.cat(ys) if count > 1 else ys[0]

    return candidate


# Putting parts together again loses their memory order; `test_memory_order_is_kept` looks at the parts.
IN_PARTS = [case for case in cases.ALL if case.training and case.layout == "plain" and not case.cotangent_layout]


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("case", IN_PARTS, ids=str)
def test_agrees_with_the_oracle(backend, case, count):
    if backend.name == "numba" and (count == 4 or len(case.inputs().x) < 2):
        pytest.skip("it takes no empty tensors")
    backend.needs(case.inputs().x)
    assert_agrees(in_parts(count), oracles.batch_norm, case)


@pytest.mark.parametrize("case", [case for case in cases.ALL if case.training], ids=str)
def test_one_part_agrees_with_the_oracle(backend, case):
    backend.needs(case.inputs().x)
    assert_agrees(in_parts(1), oracles.batch_norm, case)


def test_memory_order_is_kept(backend):
    parts = [torch.randn(n, 8, 5, 6).to(memory_format=torch.channels_last).requires_grad_() for n in (2, 3)]
    ys, _ = normalize_together([Part(x) for x in parts])
    torch.autograd.backward(ys, [torch.randn(y.shape) for y in ys])
    for x, y in zip(parts, ys, strict=True):
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert x.grad.is_contiguous(memory_format=torch.channels_last)


def inputs(activation, has_residual, is_masked):
    torch.manual_seed(0)
    xs = [torch.randn(n, 2, 3, dtype=torch.float64) for n in (2, 3)]
    residuals = [torch.randn_like(x) if has_residual else None for x in xs]
    masks = [torch.rand(x.shape[0], 3) > 0.3 if is_masked else None for x in xs]
    weight, bias = torch.randn(2, 2, dtype=torch.float64)

    def call(weight, bias, *tensors):
        parts = [Part(x, tensors[2 + i] if has_residual else None, masks[i]) for i, x in enumerate(tensors[:2])]
        return tuple(normalize_together(parts, weight, bias, activation=activation)[0])

    leaves = [weight, bias, *xs, *(r for r in residuals if r is not None)]
    return call, [t.requires_grad_() for t in leaves]


@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_gradcheck(activation, has_residual, is_masked):
    call, leaves = inputs(activation, has_residual, is_masked)
    assert gradcheck(call, leaves)
    assert gradgradcheck(call, leaves)


@pytest.mark.parametrize("activation", [None, "relu"])
def test_second_order_is_that_of_one_batch(activation):
    xs = [torch.randn(n, 3, 4, dtype=torch.float64, requires_grad=True) for n in (2, 3)]
    residuals = [torch.randn_like(x, requires_grad=True) for x in xs]
    v = torch.randn(5, 3, 4, dtype=torch.float64)

    def second_order(ys):
        leaves = [*xs, *residuals]
        first = torch.autograd.grad((torch.cat(ys) * v).square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum((g * g).sum() for g in first), leaves)

    with kernels.backend("reference"):  # a backward pass that is recorded runs on it anyway
        parts = [Part(*p) for p in zip(xs, residuals, strict=True)]
        found = second_order(normalize_together(parts, activation=activation)[0])
        whole = normalize_batch(torch.cat(xs), residual=torch.cat(residuals), activation=activation)[0]
        wanted = second_order([whole])
    for gradient, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, expected)


def test_the_gradient_of_a_part_that_no_loss_uses():
    """Its values moved the statistics, so it has one."""
    a, b = (torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    dy = torch.randn(4, 3, dtype=torch.float64)
    (y, _), _ = normalize_together([Part(a), Part(b)])
    found = torch.autograd.grad((y * dy).sum(), [a, b])
    whole = batch_norm(torch.cat([a, b]), training=True)
    for gradient, expected in zip(found, torch.autograd.grad((whole[:4] * dy).sum(), [a, b]), strict=True):
        torch.testing.assert_close(gradient, expected)
    assert found[1].abs().max() > 0


def test_under_functional_transforms():
    a, b = torch.randn(4, 3), torch.randn(2, 3)

    def loss(a, b):
        return sum(y.square().mul(torch.arange(3)).sum() for y in normalize_together([Part(a), Part(b)])[0])

    found = torch.func.grad(loss, argnums=(0, 1))(a, b)
    leaves = a.clone().requires_grad_(), b.clone().requires_grad_()
    for gradient, expected in zip(found, torch.autograd.grad(loss(*leaves), leaves), strict=True):
        torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_is_one_graph_for_the_compiler():
    def call(a, b, weight):
        (y, z), moments = normalize_together([Part(a), Part(b)], weight, activation="relu")
        return y, z, moments.mean

    leaves = [torch.randn(4, 3, 5, requires_grad=True), torch.randn(2, 3, 5, requires_grad=True), torch.randn(3)]
    found = torch.compile(call, fullgraph=True, backend="aot_eager")(*leaves)
    expected = call(*leaves)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(y.square().sum() + z.exp().sum(), leaves[:2]) for y, z, _ in (found, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "no parts"),
        ([Part(torch.randn(2, 3)), Part(torch.randn(2, 4))], "same channels"),
        ([Part(torch.randn(2, 3)), Part(torch.randn(2, 3).double())], "same channels and dtype"),
        ([Part(torch.randn(2, 3), torch.randn(1, 3))], "residual got shape"),
        ([Part(torch.randn(2, 3, 4), None, torch.ones(2, 3))], "mask got shape"),
    ],
)
def test_parts_that_do_not_fit(parts, message):
    with pytest.raises(InputError, match=message):
        normalize_together(parts)
