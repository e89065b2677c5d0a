"""The comparison of weights must reject what is wrong."""

from __future__ import annotations

import functools

import pytest
import torch

from tests import oracles
from tests.layers.weight.comparison import assert_weight_agrees


def length_is_a_constant(g, v):
    return g * v / v.norm(dim=1, keepdim=True).detach()


def eps_is_added(g, v):
    return g * v / (v.norm(dim=1, keepdim=True) + 1e-5)


def one_length_for_all(g, v):
    return g * v / v.norm()


def zeros_give_nan(g, v):
    return g * v / v.norm(dim=1, keepdim=True)


def zeros_explode(g, v):
    return g * v / v.norm(dim=1, keepdim=True).clamp(min=1e-12)


def computed_in_half(g, v):
    return (g.bfloat16() * v.bfloat16() / v.bfloat16().norm(dim=1, keepdim=True)).to(v.dtype)


@pytest.mark.parametrize(
    ("saboteur", "reason"),
    [
        (length_is_a_constant, "gradient of the second is off"),
        (eps_is_added, "weight is off"),
        (one_length_for_all, "weight is off"),
        (computed_in_half, "weight is off"),
    ],
)
def test_rejects_as_weight_norm(saboteur, reason):
    with pytest.raises(AssertionError, match=reason):
        assert_weight_agrees(saboteur, oracles.weight_norm, [torch.randn(5, 1), torch.randn(5, 7)])


@pytest.mark.parametrize(
    ("saboteur", "reason"), [(zeros_give_nan, "not finite"), (zeros_explode, "gradient of the second")]
)
def test_rejects_beside_a_row_of_zeros(saboteur, reason):
    v = torch.randn(5, 7)
    v[1] = 0
    with pytest.raises(AssertionError, match=reason):
        assert_weight_agrees(saboteur, oracles.weight_norm, [torch.randn(5, 1), v])


def unbiased(v):
    return (v - v.mean(1, keepdim=True)) * (v.var(1, keepdim=True) + 1e-6).rsqrt()


def eps_outside_the_root(v):
    return (v - v.mean(1, keepdim=True)) / (v.var(1, keepdim=True, correction=0).sqrt() + 1e-3)


def not_centred(v):
    return v * (v.var(1, keepdim=True, correction=0) + 1e-6).rsqrt()


def per_input(v):
    return (v - v.mean(0)) * (v.var(0, correction=0) + 1e-6).rsqrt()


def moments_are_constants(v):
    return (v - v.mean(1, keepdim=True).detach()) * (v.var(1, keepdim=True, correction=0) + 1e-6).rsqrt().detach()


@pytest.mark.parametrize(
    ("saboteur", "reason"),
    [
        (unbiased, "weight is off"),
        (eps_outside_the_root, "weight is off"),
        (not_centred, "weight is off"),
        (per_input, "weight is off"),
        (moments_are_constants, "gradient of the first is off"),
    ],
)
def test_rejects_as_weight_standardization(saboteur, reason):
    with pytest.raises(AssertionError, match=reason):
        assert_weight_agrees(saboteur, oracles.weight_standardization, [0.1 * torch.randn(5, 7)])


def frobenius(v):
    return v / v.norm()


def sigma_is_a_constant(v):
    return v / torch.linalg.matrix_norm(v.movedim(1, 0).flatten(1), 2).detach()


def of_the_wrong_dim(v):
    return v / torch.linalg.matrix_norm(v.flatten(1), 2)


@pytest.mark.parametrize(
    ("saboteur", "reason"),
    [
        (frobenius, "weight is off"),
        (sigma_is_a_constant, "gradient of the first is off"),
        (of_the_wrong_dim, "weight is off"),
    ],
)
def test_rejects_as_spectral_norm(saboteur, reason):
    oracle = functools.partial(oracles.spectral_norm, dim=1)
    with pytest.raises(AssertionError, match=reason):
        assert_weight_agrees(saboteur, oracle, [torch.randn(4, 6, 3)])
