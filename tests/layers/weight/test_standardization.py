"""Weight standardization, plain and scaled: against the oracle and formulas of others, and what it is for."""

from __future__ import annotations

import copy
import functools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from steadynorm.errors import InputError
from steadynorm.functional import ACTIVATIONS
from steadynorm.layers import weight_standardization
from steadynorm.layers.weight.standardization import WeightStandardization, activation_constant
from tests import oracles
from tests.layers.weight.comparison import assert_weight_agrees

LAYERS = {
    "Linear": lambda: nn.Linear(9, 5),
    "Conv1d": lambda: nn.Conv1d(4, 6, 3),
    "Conv2d, grouped": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "Conv3d": lambda: nn.Conv3d(2, 3, 2),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_agrees_with_the_oracle(make, dtype):
    v = make().weight.detach().to(dtype) + 0.1
    assert_weight_agrees(WeightStandardization(v, 1e-6, None), oracles.weight_standardization, [v])
    step, gain = WeightStandardization(v, 1e-6, 1.7), torch.randn(v.shape[0]).to(dtype)

    def scaled(v, gain):
        return torch.func.functional_call(step, {"gain": gain}, (v,))

    assert_weight_agrees(scaled, functools.partial(oracles.weight_standardization, constant=1.7), [v, gain])


def test_gradients_of_every_order():
    v = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    step = WeightStandardization(v.detach(), 1e-3, 1.3)
    assert torch.autograd.gradcheck(step, v)
    assert torch.autograd.gradgradcheck(step, v)


def test_agrees_with_batch_norm_over_the_rows():
    """How others write it: F.batch_norm over (1, outputs, fan_in)."""
    v = torch.randn(8, 3, 5, 5, dtype=torch.float64)
    rows = F.batch_norm(v.view(1, 8, -1), None, None, training=True, momentum=0.0, eps=1e-6)
    torch.testing.assert_close(WeightStandardization(v, 1e-6, None)(v), rows.view_as(v))
    gain = v.new_full((8,), 1.7 / math.sqrt(75))
    rows = F.batch_norm(v.view(1, 8, -1), None, None, weight=gain, training=True, momentum=0.0, eps=1e-6)
    torch.testing.assert_close(WeightStandardization(v, 1e-6, 1.7)(v), rows.view_as(v))


def test_constants_are_those_that_are_published():
    """Of the authors' code, where they were found with a million random numbers."""
    published = {"relu": 1.7139588594436646, "leaky_relu": 1.70590341091156, "relu6": 1.7131484746932983}
    published |= {"gelu": 1.7015043497085571, "silu": 1.7881293296813965, "elu": 1.2716004848480225, None: 1.0}
    for name, value in published.items():
        assert activation_constant(name) == pytest.approx(value, rel=2e-3)
    assert activation_constant("relu") == pytest.approx(math.sqrt(2 / (1 - 1 / math.pi)), rel=1e-7)
    z = torch.randn(400_000, dtype=torch.float64)
    for name, act in ACTIVATIONS.items():
        assert activation_constant(name) * act(z).std().item() == pytest.approx(1, abs=0.01)


def test_scaled_keeps_the_variance_of_the_signal():
    torch.manual_seed(0)
    y = torch.randn(512, 256)
    plain = y
    for _ in range(8):
        layer = weight_standardization(nn.Linear(256, 256, bias=False), scaled=True, activation="relu")
        y, plain = layer(y.relu()), nn.Linear(256, 256, bias=False)(plain.relu())
    assert y.var(0).mean().item() == pytest.approx(1, abs=0.25)
    assert plain.var(0).mean().item() < 1e-3


def test_the_gain_trains_and_is_saved():
    layer = weight_standardization(nn.Conv2d(3, 4, 3), scaled=True)
    assert layer.parametrizations.weight[0].gain.shape == (4,)
    layer(torch.randn(2, 3, 5, 5)).square().sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.parametrizations.weight[0].gain.mul_(2)
    layer.load_state_dict(twin.state_dict(), strict=True)
    assert torch.equal(layer.weight, twin.weight)


def test_a_constant_row_gives_zeros():
    layer = nn.Linear(7, 3)
    with torch.no_grad():
        layer.weight[1] = 0.3
    weight_standardization(layer)
    layer(torch.randn(4, 7)).sum().backward()
    torch.testing.assert_close(layer.weight[1], torch.zeros(7), atol=1e-4, rtol=0)
    assert layer.parametrizations.weight.original.grad.isfinite().all()


def test_compiles_and_exports():
    layer = weight_standardization(nn.Conv1d(3, 4, 3), scaled=True, activation="silu")
    x = torch.randn(2, 3, 9)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
    torch.testing.assert_close(torch.export.export(layer.eval(), (x,)).module()(x), layer(x))


@pytest.mark.parametrize(
    ("make", "options", "match"),
    [
        (
            lambda: nn.ConvTranspose2d(3, 4, 3),
            {},
            "expected one of Linear, Conv1d, Conv2d, Conv3d, got ConvTranspose2d",
        ),
        (lambda: nn.Embedding(3, 4), {}, "got Embedding"),
        (lambda: nn.Conv2d(4, 4, 1, groups=4), {}, r"shape \(4, 1, 1, 1\), one weight per output: less its mean"),
        (lambda: nn.Linear(3, 4), {"eps": -1.0}, "eps must be positive, got -1.0"),
        (lambda: nn.Linear(3, 4), {"scaled": True, "activation": "swish"}, "activation got 'swish', expected None or"),
        (lambda: nn.Linear(3, 4), {"activation": "relu"}, "activation= is for scaled=True"),
        (lambda: weight_standardization(nn.Linear(3, 4)), {}, "has weight standardization already"),
    ],
)
def test_refusals(make, options, match):
    layer = make()
    before = list(layer.state_dict())
    with pytest.raises(InputError, match=match):
        weight_standardization(layer, **options)
    assert list(layer.state_dict()) == before
