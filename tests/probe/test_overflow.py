"""Norms of other classes in float16, run once more in float32."""

import pytest
import torch
from torch import nn

import steadynorm
from steadynorm.probe.overflow import overflows
from steadynorm.probe.trace import trace
from steadynorm.recipe import call


class Rms(nn.Module):
    def __init__(self, is_wide=False):
        super().__init__()
        self.weight, self.is_wide = nn.Parameter(torch.ones(8)), is_wide

    def forward(self, x):
        y = x.float() if self.is_wide else x
        return self.weight * (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6)).type_as(x)


class HandNorm(Rms):
    pass


class Centring(nn.Module):
    """A variance as the mean of squares less the square of the mean."""

    def forward(self, x):
        mean = x.mean(-1, keepdim=True)
        return (x - mean) * torch.rsqrt(x.square().mean(-1, keepdim=True) - mean.square() + 1e-3)


class CentringNorm(Centring):
    pass


def found(layer, scale, dtype=torch.float16):
    x = scale * torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(layer, nn.Linear(8, 4)).to(dtype)
    calls, _, _ = trace(model, x.to(dtype), call)
    return overflows(model, x.to(dtype), call, calls)


@pytest.mark.parametrize("layer", [HandNorm, CentringNorm])
def test_a_norm_that_overflows_is_found_with_what_it_was_given(layer):
    (one,) = found(layer(), 400)
    assert (one.path, one.class_name) == ("0", layer.__name__)
    assert one.largest > 256
    assert one.change >= 0.5


@pytest.mark.parametrize(
    "layer",
    [
        lambda: HandNorm(is_wide=True),
        lambda: nn.LayerNorm(8),
        lambda: nn.RMSNorm(8),
        lambda: steadynorm.RMSNorm(8),
        Rms,
    ],
)
def test_a_norm_that_computes_in_float32_and_what_is_no_norm_by_name_are_let_be(layer):
    assert found(layer(), 400) == ()


def test_small_values_and_wider_exponents_are_let_be():
    assert found(HandNorm(), 10) == ()
    assert found(HandNorm(), 400, torch.bfloat16) == ()
    assert found(HandNorm(), 400, torch.float32) == ()


def test_the_model_is_left_as_it_was():
    layer = HandNorm()
    found(layer, 400)
    assert layer.weight.dtype == torch.float16
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks


def test_a_norm_that_is_not_given_float16_costs_no_pass():
    class Counts(HandNorm):
        calls = 0

        def forward(self, x):
            Counts.calls += 1
            return super().forward(x)

    assert found(Counts(), 400, torch.bfloat16) == ()
    assert Counts.calls == 1
