from __future__ import annotations

import pytest
import torch

from steadynorm import grouping as grouping_
from steadynorm.kernels import reference
from tests import cases
from tests.agree import array
from tests.kernels.contract import assert_keeps_contract
from tests.oracles import KINKS, activate, activation_derivative


@pytest.mark.parametrize("case", cases.ALL, ids=str)
def test_keeps_the_contract(case):
    assert_keeps_contract(reference, case)


@pytest.mark.parametrize("name", sorted(reference.ACTIVATIONS))
def test_activations_are_those_of_the_oracle(name):
    z = torch.cat([torch.linspace(-8, 8, 1001), torch.tensor([-60.0, 60.0, *KINKS[name]])]).double().requires_grad_()
    y = reference.ACTIVATIONS[name](z)
    torch.testing.assert_close(y.detach(), torch.from_numpy(activate(array(z), name)), rtol=1e-12, atol=1e-14)
    (slope,) = torch.autograd.grad(y.sum(), z)
    expected = torch.from_numpy(activation_derivative(array(z), name))
    torch.testing.assert_close(slope, expected, rtol=1e-12, atol=1e-13)


def test_every_activation_has_cases():
    assert set(cases.ACTIVATIONS) == set(reference.ACTIVATIONS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_of_statistics_and_arithmetic(dtype):
    x = torch.ones(2, 3, dtype=dtype)
    assert reference.statistics_dtype(x) == torch.float64
    assert reference.compute_dtype(x) == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_a_channel_whose_variance_is_zero_has_no_noise():
    """Float32 cannot hold the mean of 12345.678 exactly; what is left of it would be blown up by 1/sqrt(eps)."""
    x = torch.full((32, 2, 7, 7), 12345.678)
    x, grouping = grouping_.batch(x)
    y, _, var = reference.forward(x, grouping)
    assert var.eq(0).all()
    assert y.abs().max() < 1e-3
