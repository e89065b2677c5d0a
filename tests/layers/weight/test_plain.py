"""make_plain: the same bits as a parameter of its own, and nothing of ours left behind."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from steadynorm.layers import make_plain, spectral_norm, weight_norm, weight_standardization


def older_weight_norm(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return torch.nn.utils.weight_norm(layer)


KINDS = {
    "weight norm": weight_norm,
    "standardization": weight_standardization,
    "scaled": lambda layer: weight_standardization(layer, scaled=True, activation="relu"),
    "spectral norm": spectral_norm,
    "standardization, then spectral norm": lambda layer: spectral_norm(weight_standardization(layer)),
    "torch's weight norm": parametrizations.weight_norm,
    "torch's spectral norm": parametrizations.spectral_norm,
    "torch's older weight norm": older_weight_norm,
    "torch's older spectral norm": torch.nn.utils.spectral_norm,
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("apply", KINDS.values(), ids=KINDS)
def test_the_same_bits_as_a_plain_parameter(apply, trains, training):
    model = nn.Sequential(apply(nn.Conv2d(3, 4, 3)), nn.ReLU(), nn.Flatten(), apply(nn.Linear(36, 5)))
    model.requires_grad_(trains)
    x = torch.randn(2, 3, 5, 5)
    model(x)
    before = model.eval()(x)
    weights = [layer.weight.detach().clone() for layer in (model[0], model[3])]
    model.train(training)
    assert make_plain(model) is model
    assert model.training is training
    assert type(model[0]) is nn.Conv2d
    assert type(model[3]) is nn.Linear
    assert torch.equal(model.eval()(x), before)
    for layer, weight in zip((model[0], model[3]), weights, strict=True):
        assert torch.equal(layer.weight, weight)
        assert isinstance(layer.weight, nn.Parameter)
        assert layer.weight.requires_grad is trains
        assert sorted(layer.state_dict()) == ["bias", "weight"]
        assert not list(layer.buffers())
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5))
    plain.load_state_dict(model.state_dict(), strict=True)
    assert b"steadynorm" not in pickle.dumps(model)
    assert torch.equal(copy.deepcopy(model)(x), before)


def test_saved_whole_it_loads_without_this_package():
    model = make_plain(nn.Sequential(weight_norm(nn.Linear(3, 2))))
    torch.save(model, file := io.BytesIO())
    assert b"steadynorm" not in file.getvalue()


def test_an_optimizer_keeps_a_weight_of_one_part():
    layer = spectral_norm(nn.Linear(3, 2))
    original = layer.parametrizations.weight.original
    layer(torch.randn(4, 3)).sum().backward()
    make_plain(layer)
    assert layer.weight is original
    assert layer.weight.grad is None


def test_a_model_without_any_is_left_alone():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    make_plain(model)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


class Broken(nn.Module):
    def forward(self, weight):
        raise ValueError("broken")


def test_one_that_cannot_be_computed_leaves_all_as_they_were():
    model = nn.Sequential(weight_norm(nn.Linear(3, 2)), nn.Linear(2, 2)).train()
    torch.nn.utils.parametrize.register_parametrization(model[1], "weight", Broken(), unsafe=True)
    before = list(model.state_dict())
    with pytest.raises(ValueError, match="broken"):
        make_plain(model)
    assert list(model.state_dict()) == before
    assert all(module.training for module in model.modules())


def test_a_weight_shared_by_two_paths_is_made_plain_once():
    shared = weight_norm(nn.Linear(3, 3))
    model = nn.Sequential(shared, shared)
    x = torch.randn(2, 3)
    before = model(x)
    assert torch.equal(make_plain(model)(x), before)
    assert model[0] is model[1]


@pytest.mark.parametrize(
    "apply", [weight_norm, spectral_norm, weight_standardization, torch.nn.utils.parametrizations.weight_norm]
)
def test_a_plain_copy_leaves_the_original_as_it_was(apply):
    """copy.deepcopy gives both one class."""
    model = nn.Sequential(apply(nn.Linear(3, 4))).eval()
    x = torch.randn(2, 3)
    before = model(x)
    plain = make_plain(copy.deepcopy(model))
    assert torch.equal(plain(x), before)
    assert torch.equal(model(x), before)
    assert torch.equal(make_plain(model)(x), before)
