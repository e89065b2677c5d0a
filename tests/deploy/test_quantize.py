"""int8 by PyTorch's own path: how far it is from the model is measured, and what an engine does with it is seen."""

from __future__ import annotations

import copy
import importlib.util

import numpy as np
import pytest
import torch
from torch import nn

from steadynorm import deploy
from steadynorm.deploy import quantize
from steadynorm.errors import DifferenceError, InputError
from tests.deploy.networks import resnet, trained

needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
IMAGES = torch.linspace(-2, 2, 8 * 3 * 8 * 8).sin().mul(3).reshape(8, 3, 8, 8)


@needs_torchao
@pytest.mark.slow
def test_a_linear_layer_is_off_by_no_more_than_its_roundings():
    model = nn.Sequential(nn.Linear(32, 16)).eval()
    x = torch.randn(64, 32)
    made = quantize(model, [x])
    assert made.layers == (1, 1)
    w, given, bias = (t.detach().double().numpy() for t in (model[0].weight, x, model[0].bias))
    scale_w = np.abs(w).max(1) / 127
    scale_x = (given.max() - given.min()) / 255
    # |w x − w' x'| ≤ |w − w'| |x| + |w'| |x − x'|, each value off by half a step.
    bound = np.abs(given).sum(1)[:, None] * scale_w / 2 + (np.abs(w) + scale_w[:, None] / 2).sum(1) * scale_x / 2
    with torch.no_grad():
        found = made.model(x).double().numpy()
    exact = given @ w.T + bias
    off = np.abs(found - exact)
    assert (off <= bound * 1.01).all()
    assert made.outputs[0].absolute == pytest.approx(off.max(), rel=1e-3)
    assert made.noise[""] == pytest.approx(np.sqrt((off**2).sum() / (exact**2).sum()), rel=1e-3)
    assert 1e-4 < made.noise[""] < 0.02


@needs_torchao
@pytest.mark.slow
def test_a_folded_network_becomes_int8_and_an_engine_gives_what_it_gives(tmp_path):
    model = trained(resnet())
    folded = deploy.fold(model, [IMAGES]).model
    before = copy.deepcopy(folded.state_dict())
    made = deploy.quantize(folded, [IMAGES], reduce_range=True)
    assert made.layers == (8, 8)
    assert 0 < made.noise[""] < 0.1
    assert "8 of 8 convolutions and linear layers in int8" in repr(made)
    assert all(torch.equal(before[name], tensor) for name, tensor in folded.state_dict().items())
    exported = deploy.export(made.model, [IMAGES], tmp_path / "int8.onnx", reference=model, tolerance=0.1)
    assert exported.operators["QuantizeLinear"] > 5
    with pytest.raises(DifferenceError, match="int8 differs from the model by more than"):
        deploy.quantize(folded, [IMAGES], tolerance=1e-6)


def test_what_cannot_be_is_refused(monkeypatch):
    with pytest.raises(InputError, match="training mode"):
        deploy.quantize(nn.Sequential(nn.BatchNorm1d(4)), [torch.ones(2, 4)])
    with pytest.raises(InputError, match="no batch"):
        deploy.quantize(nn.Sequential(nn.BatchNorm1d(4)).eval(), [])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install torchao"):
        deploy.quantize(nn.Sequential(nn.BatchNorm1d(4)).eval(), [torch.ones(2, 4)])
