"""Weight norm from data: mean 0 and deviation 1 behind every layer, and nothing changed where the batch raises."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from steadynorm.errors import DegenerateStatisticsError, InputError
from steadynorm.layers import initialize_weight_norm_, weight_norm


def by_channel(layer, y):
    return y.flatten(0, -2) if isinstance(layer, nn.Linear) else y.movedim(1, -1).flatten(0, -2)


MODELS = {
    "Linear": (lambda: [weight_norm(nn.Linear(7, 5))], (64, 7)),
    "Linear over time": (lambda: [weight_norm(nn.Linear(7, 5))], (8, 6, 7)),
    "Conv1d": (lambda: [weight_norm(nn.Conv1d(3, 6, 3, padding=1))], (8, 3, 20)),
    "Conv2d, grouped": (lambda: [weight_norm(nn.Conv2d(4, 6, 3, groups=2))], (8, 4, 9, 9)),
    "Conv3d": (lambda: [weight_norm(nn.Conv3d(2, 3, 2))], (4, 2, 5, 5, 5)),
    "ConvTranspose2d": (lambda: [weight_norm(nn.ConvTranspose2d(4, 6, 3), dim=1)], (8, 4, 9, 9)),
    "deep": (
        lambda: [
            weight_norm(nn.Conv2d(3, 8, 3)),
            nn.ReLU(),
            weight_norm(nn.Conv2d(8, 8, 3)),
            nn.ReLU(),
            nn.Flatten(),
            weight_norm(nn.Linear(8 * 25, 4)),
        ],
        (32, 3, 9, 9),
    ),
}


@pytest.mark.parametrize(("make", "shape"), MODELS.values(), ids=MODELS)
def test_every_output_has_mean_0_and_deviation_1(make, shape):
    model = nn.Sequential(*make()).double()
    x = 3 + 2 * torch.randn(shape, dtype=torch.float64)
    directions = {n: p.clone() for n, p in model.named_parameters() if n.endswith("original1")}
    done = initialize_weight_norm_(model, x)
    assert done == [name for name, module in model.named_children() if hasattr(module, "parametrizations")]
    seen = []
    for name in done:
        layer = model.get_submodule(name)
        layer.register_forward_hook(lambda layer, args, y: seen.append(by_channel(layer, y)))
    model(x)
    assert len(seen) == len(done)
    for values in seen:
        torch.testing.assert_close(values.mean(0), torch.zeros_like(values[0]), atol=1e-12, rtol=0)
        torch.testing.assert_close(values.std(0, correction=0), torch.ones_like(values[0]), atol=1e-12, rtol=0)
    for name, value in directions.items():
        assert torch.equal(model.get_parameter(name), value)


def test_the_papers_formula():
    """g = 1 / deviation[t] and bias = −mean[t] / deviation[t], whatever g and the bias were before."""
    layer = weight_norm(nn.Linear(5, 4)).double()
    x = torch.randn(50, 5, dtype=torch.float64)
    v = layer.parametrizations.weight.original1.detach()
    t = x @ (v / v.norm(dim=1, keepdim=True)).T
    initialize_weight_norm_(layer, x)
    torch.testing.assert_close(layer.parametrizations.weight.original0.flatten(), 1 / t.std(0, correction=0))
    torch.testing.assert_close(layer.bias, -t.mean(0) / t.std(0, correction=0))


def test_without_a_bias_the_mean_stays():
    layer = weight_norm(nn.Linear(5, 4, bias=False))
    x = 1 + torch.randn(500, 5)
    initialize_weight_norm_(layer, x)
    torch.testing.assert_close(layer(x).std(0, correction=0), torch.ones(4))
    assert layer.bias is None


def test_a_row_of_zeros_keeps_its_length_and_is_centred():
    layer = nn.Linear(5, 4)
    with torch.no_grad():
        layer.weight[1] = 0
        layer.bias[1] = 7
    weight_norm(layer)
    initialize_weight_norm_(layer, torch.randn(50, 5))
    assert layer.parametrizations.weight.original0[1] == 0
    assert layer.bias[1] == 0
    assert layer.weight.isfinite().all()


def test_buffers_stay_and_a_second_call_of_a_layer_counts_for_nothing():
    shared = weight_norm(nn.Linear(4, 4))
    model = nn.Sequential(shared, nn.BatchNorm1d(4), shared)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert initialize_weight_norm_(model, torch.randn(20, 4)) == ["0"]
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name])


def test_one_sample_without_a_batch_dimension():
    layer = weight_norm(nn.Conv1d(3, 4, 3))
    x = torch.randn(3, 50)
    initialize_weight_norm_(layer, x)
    torch.testing.assert_close(layer(x).mean(1), torch.zeros(4), atol=1e-6, rtol=0)


class Raises(nn.Module):
    def forward(self, x):
        raise KeyError("the model's own")


def refused(model, error, match, *inputs):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error, match=match):
        initialize_weight_norm_(model, *inputs)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not any(module._forward_hooks for module in model.modules())


def test_nothing_changes_where_the_batch_raises():
    model = nn.Sequential(weight_norm(nn.Linear(4, 3)), nn.BatchNorm1d(3), Raises())
    refused(model, KeyError, "own", torch.randn(9, 4))
    model = nn.Sequential(weight_norm(nn.Linear(4, 3)), weight_norm(nn.Linear(3, 2)))
    x = torch.randn(9, 4)
    refused(model, DegenerateStatisticsError, "Linear at 0 expected a batch .* got one value per output", x[:1])
    x[3, 1] = math.nan
    refused(model, DegenerateStatisticsError, "Linear at 0 expected a batch .* not finite", x)


def test_refusals():
    refused(nn.Sequential(nn.Linear(4, 3)), InputError, "Sequential has no layer with weight norm", torch.randn(9, 4))
    whole = nn.Sequential(weight_norm(nn.Linear(4, 3), dim=None))
    refused(
        whole,
        InputError,
        "0 expected one length per output, got weight norm with dim=None and 1 lengths",
        torch.ones(9, 4),
    )
    transposed = nn.Sequential(weight_norm(nn.ConvTranspose1d(4, 6, 3)))
    refused(transposed, InputError, r"dim=0 and 4 lengths for 6 outputs: use dim=1", torch.ones(9, 4, 5))
    recurrent = nn.Sequential(weight_norm(nn.LSTM(4, 3), "weight_hh_l0"))
    refused(recurrent, InputError, "got .*LSTM with weight_hh_l0: initialise it by hand", torch.ones(9, 4))
