"""Spectral norm: against a singular value decomposition and torch, after averaging, in half types."""

from __future__ import annotations

import copy
import functools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from steadynorm.errors import InputError
from steadynorm.layers import spectral_norm
from tests import oracles
from tests.layers.weight.comparison import assert_weight_agrees

LAYERS = {
    "Linear": lambda: nn.Linear(7, 5),
    "Conv1d": lambda: nn.Conv1d(4, 6, 3),
    "Conv2d, grouped": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "Conv3d": lambda: nn.Conv3d(2, 3, (1, 2, 3)),
    "ConvTranspose1d": lambda: nn.ConvTranspose1d(4, 6, 3),
    "ConvTranspose2d": lambda: nn.ConvTranspose2d(4, 6, 3),
    "ConvTranspose3d": lambda: nn.ConvTranspose3d(3, 2, 2),
}


def steps(layer):
    return layer.parametrizations.weight[0]


def converged(layer):
    """Power iterations until nothing moves any more."""
    step = steps(layer)
    step._iterate(step._matrix(layer.parametrizations.weight.original.detach()), 1500)
    return layer


def stretch(layer):
    """The largest singular value of the weight that a layer uses."""
    dim = steps(layer).dim
    return np.linalg.svd(layer.weight.detach().double().movedim(dim, 0).flatten(1).numpy())[1][0]


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_agrees_with_a_singular_value_decomposition(make, mode):
    step = steps(converged(spectral_norm(make().double()))).train(mode)
    dim = int("Transpose" in make().__class__.__name__)
    assert step.dim == dim
    v = make().weight.detach().double()
    step._iterate(step._matrix(v), 1500)
    # u and v have settled to some thousand roundings where the two largest singular values are close.
    assert_weight_agrees(step, functools.partial(oracles.spectral_norm, dim=dim), [v], roundings=1e4)


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_gives_the_bits_of_torch_in_training_and_its_state_dict_goes_both_ways(make):
    layer = make()
    theirs = parametrizations.spectral_norm(copy.deepcopy(layer), n_power_iterations=2)
    ours = spectral_norm(layer, n_power_iterations=2)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for _ in range(3):
        assert torch.equal(ours.weight, theirs.weight)
    torch.testing.assert_close(ours.eval().weight, theirs.eval().weight)


def test_the_older_spelling_is_read():
    older = torch.nn.utils.spectral_norm(nn.Conv2d(3, 4, 3))
    for _ in range(300):
        older(torch.randn(1, 3, 5, 5))
    ours = spectral_norm(nn.Conv2d(3, 4, 3))
    ours.load_state_dict(older.state_dict(), strict=True)
    older.eval()(torch.randn(1, 3, 5, 5))
    torch.testing.assert_close(ours.eval().weight, older.weight)


def trained(make, apply, seeds=5):
    """Copies of one layer that went different ways: what averaging meets."""
    torch.manual_seed(0)
    layer = make()
    copies = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        one = apply(copy.deepcopy(layer))
        optimizer = torch.optim.SGD(one.parameters(), lr=0.2)
        for _ in range(10):
            optimizer.zero_grad()
            x = torch.randn(16, *({2: (7,), 4: (4, 6, 6)}[layer.weight.dim()]))
            (one(x) - torch.randn(())).square().mean().backward()
            optimizer.step()
        copies.append(one)
    return copies


@pytest.mark.parametrize("make", [LAYERS["Linear"], LAYERS["ConvTranspose2d"]])
def test_averaged_vectors_are_made_whole(make):
    copies = trained(make, spectral_norm)
    # Signs and directions that differ from copy to copy, as they do between runs: u and −u serve equally.
    steps(copies[1])._u.neg_()
    steps(copies[1])._v.neg_()
    averaged = AveragedModel(copies[0], use_buffers=True)
    for one in copies:
        averaged.update_parameters(one)
    ours = averaged.module.eval()
    assert steps(ours)._u.norm() < 0.95, "averaging has to shorten the vector for this to say anything"
    theirs = parametrizations.spectral_norm(make()).eval()
    theirs.load_state_dict(ours.state_dict())
    assert stretch(ours) < 1.25
    # What the vectors say if they are taken as they are stored.
    theirs_as_ours = theirs.weight.detach().double().movedim(steps(ours).dim, 0).flatten(1)
    assert torch.linalg.matrix_norm(theirs_as_ours, 2) > 1.3
    # Training takes over where averaging left off.
    ours.train()
    for _ in range(60):
        assert ours.weight.isfinite().all()
    torch.testing.assert_close(steps(ours)._u.norm(), torch.ones(()))
    assert stretch(ours.eval()) == pytest.approx(1, abs=1e-3)


def test_evaluation_does_not_depend_on_the_length_of_the_vectors():
    layer = spectral_norm(nn.Linear(7, 5)).eval()
    before = layer.weight.detach().clone()
    steps(layer)._u.mul_(0.3)
    steps(layer)._v.zero_()
    torch.testing.assert_close(layer.weight, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", ["cast", "made", "loaded"])
def test_half_types_iterate_in_float32(how, dtype):
    layer = nn.Linear(64, 48)
    with torch.no_grad():
        layer.weight.mul_(1e-3)
    whole = spectral_norm(layer)
    half = spectral_norm(nn.Linear(64, 48).to(dtype)) if how == "made" else copy.deepcopy(whole).to(dtype)
    if how == "loaded":
        half.load_state_dict({name: value.to(dtype) for name, value in whole.state_dict().items()}, assign=True)
    assert steps(half)._u.dtype == steps(half)._v.dtype == torch.float32
    for _ in range(300):
        weight = half.weight
    assert weight.dtype == dtype
    assert stretch(half) == pytest.approx(1, abs=0.01)
    half(torch.randn(3, 64).to(dtype)).sum().backward()
    assert half.parametrizations.weight.original.grad.dtype == dtype


def test_double_stays_double():
    layer = spectral_norm(nn.Linear(7, 5)).double()
    assert steps(layer)._u.dtype == layer.weight.dtype == torch.float64


def test_under_autocast_the_bits_are_those_of_float32():
    layer = spectral_norm(nn.Linear(64, 48)).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer.weight, layer.weight.float())
        weight = layer.weight
    assert torch.equal(weight, layer.weight)


def test_zeros_give_zeros_and_recover():
    layer = nn.Linear(4, 3)
    nn.init.zeros_(layer.weight)
    spectral_norm(layer)
    layer(torch.randn(5, 4)).sum().backward()
    parts = layer.parametrizations.weight
    assert (layer.weight == 0).all()
    assert parts.original.grad.isfinite().all()
    with torch.no_grad():
        parts.original.copy_(torch.randn(3, 4))
    assert stretch(converged(layer)) == pytest.approx(1, abs=1e-5)


def test_two_forwards_and_one_backward():
    layer = spectral_norm(nn.Linear(4, 3))
    (layer(torch.randn(5, 4)) - layer(torch.randn(5, 4))).sum().backward()
    assert layer.parametrizations.weight.original.grad.isfinite().all()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_recomputes_the_same_weight(reentrant):
    torch.manual_seed(0)
    x = torch.randn(5, 4, requires_grad=True)
    layer = nn.Sequential(spectral_norm(nn.Linear(4, 3)), nn.Tanh())
    twin = copy.deepcopy(layer)
    # Vectors far from where they settle, so that one step more would show.
    for one in (layer, twin):
        steps(one[0])._u.copy_(torch.tensor([1.0, 0, 0]))
        steps(one[0])._v.copy_(torch.tensor([1.0, 0, 0, 0]))
    checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
    twin(x).square().sum().backward()
    for a, b in zip(layer.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    assert torch.equal(steps(layer[0])._u, steps(twin[0])._u)


def test_compiles_and_exports():
    layer = spectral_norm(nn.Linear(6, 4))
    twin, x = copy.deepcopy(layer), torch.randn(5, 6)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        torch.testing.assert_close(compiled(x), twin(x))
    torch.testing.assert_close(steps(layer)._u, steps(twin)._u)
    layer.eval()
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), layer(x))


@pytest.mark.parametrize(
    ("make", "options", "match"),
    [
        (nn.ReLU, {}, "ReLU has no tensor named 'weight'"),
        (lambda: nn.BatchNorm1d(3), {}, r"weight has shape \(3,\), expected a matrix or more"),
        (lambda: nn.Linear(3, 2), {"n_power_iterations": 0}, "n_power_iterations must be at least 1, got 0"),
        (lambda: nn.Linear(3, 2), {"dim": 4}, "dim must be from 0 to 1"),
        (lambda: nn.Linear(3, 2), {"eps": 0.0}, "eps must be positive"),
        (lambda: spectral_norm(nn.Linear(3, 2)), {}, "has spectral norm already"),
    ],
)
def test_refusals(make, options, match):
    layer = make()
    before = list(layer.state_dict())
    with pytest.raises(InputError, match=match):
        spectral_norm(layer, **options)
    assert list(layer.state_dict()) == before
