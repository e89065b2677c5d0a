"""Moments taken first, and given to the normalization afterwards."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from steadynorm import functional
from steadynorm.errors import InputError
from steadynorm.functional import normalize_batch, update_running_
from steadynorm.moments import Moments
from tests import agree, cases, oracles
from tests.agree import assert_agrees

NAMES = ["plain", "channels last", "rows", "bfloat16", "offset 1e4", "add, relu", "silu", "lengths"]


def in_two_steps(
    x, running_mean, running_var, weight, bias, training, momentum, eps, *, mask=None, residual=None, activation=None
):
    assert training
    moments = functional.moments(x, mask)
    options = {"eps": eps, "residual": residual, "activation": activation, "mask": mask}
    y, returned = normalize_batch(x, weight, bias, moments=moments, **options)
    assert torch.equal(returned.mean, moments.mean)
    assert torch.equal(returned.var, moments.var)
    update_running_(running_mean, running_var, returned, momentum)
    return y


@pytest.mark.parametrize("name", NAMES)
def test_two_steps_agree_with_the_oracle(backend, name):
    case = cases.BY_NAME[name]
    backend.needs(case.inputs().x)
    assert_agrees(in_two_steps, oracles.batch_norm, case)


@pytest.mark.parametrize("name", NAMES)
def test_moments_are_those_of_the_batch(backend, name):
    case = cases.BY_NAME[name]
    backend.needs(case.inputs().x)
    inputs = case.inputs()
    found = functional.moments(inputs.x.requires_grad_(), inputs.mask)
    mean, var, count = oracles.moments(agree.array(inputs.x), agree.array(inputs.mask))
    for tensor, expected in ((found.mean, mean), (found.var, var)):
        assert tensor.dtype == torch.float64
        assert not tensor.requires_grad
        np.testing.assert_allclose(tensor.numpy(), expected, rtol=1e-6, atol=1e-6)
    assert int(found.count) == count


@pytest.mark.parametrize("shape", [(5, 3), (3, 2, 4)])
def test_derivatives_of_any_order_see_through_given_moments(shape):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(shape[1], dtype=torch.float64, requires_grad=True)

    def call(x, weight):
        return normalize_batch(x, weight, activation="silu", moments=functional.moments(x))[0]

    gradcheck(call, (x, weight))
    gradgradcheck(call, (x, weight))
    (expected,) = torch.autograd.grad(call(x, weight).square().sum(), x)
    found = torch.func.grad(lambda x: call(x, weight.detach()).square().sum())(x.detach())
    torch.testing.assert_close(found, expected)


def test_given_moments_are_not_taken_again(backend):
    x = torch.randn(6, 4, 5)
    backend.needs(x)
    own = functional.moments(x)
    y, _ = normalize_batch(x, moments=Moments(own.mean + 1, own.var, own.count), eps=1e-5)
    expected, _ = normalize_batch(x, eps=1e-5)
    torch.testing.assert_close(y, expected - own.invstd(1e-5).float()[:, None])


def test_moments_of_other_channels_are_refused():
    x = torch.randn(6, 4, 5)
    with pytest.raises(InputError, match=r"moments got shapes \(3,\) and \(3,\), expected \(4,\) for both"):
        normalize_batch(x, moments=functional.moments(x[:, :3]))
    with pytest.raises(InputError, match=r"torch\.bool: True is valid"):
        functional.moments(x, torch.ones(6, 5))
