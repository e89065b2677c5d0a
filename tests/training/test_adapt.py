"""Adapted statistics against those of source and target together, in NumPy float64."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import steadynorm
from steadynorm.errors import DegenerateStatisticsError, InputError
from steadynorm.recipes import digits as recipe
from steadynorm.training import adapt_, adapted, recalibrate_


def network():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(4, 2, 3), steadynorm.BatchNorm2d(2)
    )


def source_and_target(count=40, target=9):
    return torch.randn(count, 3, 8, 8), 3 + 2 * torch.randn(target, 3, 8, 8)


def assert_layer(layer, x, rtol=1e-5):
    values = np.moveaxis(x.detach().double().numpy(), 1, -1).reshape(-1, x.shape[1])
    np.testing.assert_allclose(layer.running_mean.numpy(), values.mean(0), rtol=rtol, atol=rtol)
    np.testing.assert_allclose(layer.running_var.numpy(), values.var(0, ddof=1), rtol=rtol)


@pytest.mark.parametrize("target", [1, 9, 100])
@pytest.mark.parametrize("method", ["one_pass", "layer_by_layer"])
def test_a_prior_of_the_source_samples_gives_the_statistics_of_both(target, method):
    model, (here, there) = network(), source_and_target(target=target)
    recalibrate_(model, here.split(7), method="layer_by_layer")
    report = adapt_(model, there.split(4), prior=len(here), method=method)
    assert_layer(model[1], model[0](torch.cat([here, there])))
    assert report.samples == target


def by_hand(source, target, n, m):
    """The formula of the docstring, long-hand: (mean, biased var) of each with its count."""
    mean = (n * source[0] + m * target[0]) / (n + m)
    var = (n * source[1] + m * target[1]) / (n + m) + n * m / (n + m) ** 2 * (source[0] - target[0]) ** 2
    return mean, var


@pytest.mark.parametrize("prior", [0.25, 1.0, 16.0, 1e6])
def test_the_formula(prior):
    layer, x = nn.BatchNorm1d(3), 4 + torch.randn(5, 3, 7)
    layer.running_mean.copy_(torch.tensor([0.0, 1.0, -2.0]))
    layer.running_var.copy_(torch.tensor([1.0, 2.0, 0.5]))
    n, m = prior * 7, 5 * 7
    source = (layer.running_mean.double().numpy().copy(), layer.running_var.double().numpy() * max(n - 1, 1) / n)
    values = np.moveaxis(x.double().numpy(), 1, -1).reshape(-1, 3)
    mean, var = by_hand(source, (values.mean(0), values.var(0)), n, m)
    adapt_(layer, [x], prior=prior)
    np.testing.assert_allclose(layer.running_mean.numpy(), mean, rtol=1e-5)
    np.testing.assert_allclose(layer.running_var.numpy(), var * (n + m) / (n + m - 1), rtol=1e-5)


def test_without_the_variance_between_it_would_be_caught():
    """Schneider et al.'s eq. 1 mixes mean and variance each: the variance of the mixture is larger."""
    layer, x = nn.BatchNorm1d(1), 5 + torch.randn(500, 1)
    adapt_(layer, [x], prior=500)
    assert float(layer.running_var) == pytest.approx(1 + 25 / 4, rel=0.1)
    mixed = (1 + float(x.var())) / 2
    assert abs(mixed / float(layer.running_var) - 1) > 0.5


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1)])
def test_one_value_is_enough(shape):
    """https://github.com/phillipi/pix2pix/issues/176: in training mode one value has no variance."""
    layer = steadynorm.BatchNorm1d(3)
    x = torch.randn(shape) + 2
    with pytest.raises(DegenerateStatisticsError):
        copy.deepcopy(layer).train()(x)
    before = layer.eval()(x)
    adapt_(layer, [x], prior=16)
    after = layer(x)
    assert torch.isfinite(after).all()
    assert bool(((after / before > 0.5) & (after / before < 1)).all())
    mean = x.flatten().double().numpy() / 17
    np.testing.assert_allclose(layer.running_mean.numpy(), mean, rtol=1e-5)


def test_no_prior_forgets_the_source():
    model, (_, there) = network(), source_and_target(target=50)
    model[1].running_mean.fill_(1e3)
    adapt_(model, [there], prior=0)
    assert_layer(model[1], model[0](there))
    with pytest.raises(InputError, match="fewer than two values"):
        adapt_(nn.BatchNorm1d(3), [torch.randn(1, 3)], prior=0)


def test_layers_run_behind_adapted_ones():
    """One batch, one pass: what reaches the second layer is what evaluation sends it."""
    model, (here, there) = network(), source_and_target(target=30)
    recalibrate_(model, [here], method="layer_by_layer")
    mean, var = model[5].running_mean.double().numpy().copy(), model[5].running_var.double().numpy().copy()
    passed = copy.deepcopy(model)
    adapt_(model, [there], prior=10)
    reached = model.eval()[:5](there).detach().double().numpy()
    values = np.moveaxis(reached, 1, -1).reshape(-1, 2)
    n, m = 10 * 16, len(values)
    mean, var = by_hand((mean, var * (n - 1) / n), (values.mean(0), values.var(0)), n, m)
    np.testing.assert_allclose(model[5].running_mean.numpy(), mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(model[5].running_var.numpy(), var * (n + m) / (n + m - 1), rtol=1e-4)
    adapt_(passed, there.split(3), prior=10, method="layer_by_layer")
    torch.testing.assert_close(passed[5].running_var, model[5].running_var, rtol=1e-4, atol=1e-5)


def test_it_goes_back_bit_for_bit():
    """https://github.com/DequanWang/tent/issues/7: adapted on and on, a model collapses. Here each call starts anew."""
    model, (here, there) = network(), source_and_target()
    recalibrate_(model, [here])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with adapted(model, [there], prior=4) as report:
        assert not torch.equal(model[1].running_mean, before["1.running_mean"])
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    with pytest.raises(ZeroDivisionError), adapted(model, [there], prior=4):
        raise ZeroDivisionError
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert "Adapted (prior of 4 samples, one pass): 2 layers from 9 samples in 1 batch" in str(report)
    assert report.layers["1"].mean_shift > 0.5


def test_frozen_layers_keep_their_statistics():
    model = nn.Sequential(steadynorm.BatchNorm1d(3).freeze_(), nn.BatchNorm1d(3))
    report = adapt_(model, [5 + torch.randn(8, 3)], prior=4)
    assert model[0].running_mean.tolist() == [0, 0, 0]
    assert list(report.layers) == ["1"]


def test_a_failure_leaves_the_model_as_it_was():
    model, (_, there) = network(), source_and_target()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for batches in ([], [there, torch.zeros(2, 5, 8, 8)], [there * torch.nan]):
        with pytest.raises((InputError, RuntimeError, ArithmeticError)):
            adapt_(model, batches, prior=4)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("prior", [-1, float("nan"), float("inf")])
def test_bad_priors(prior):
    with pytest.raises(InputError, match="prior must be a number of samples"):
        adapt_(network(), [source_and_target()[0]], prior=prior)


@pytest.fixture(scope="module")
def digits():
    """A network that reads digits, and images that it was not trained on."""
    torch.manual_seed(0)
    model = recipe.model()
    optimizer = recipe.optimizer(model.parameters())
    for seed in range(3):
        for batch in recipe.batches("train", 32, seed):
            optimizer.zero_grad()
            recipe.loss(model(batch[0]), batch).backward()
            optimizer.step()
    images, labels = recipe.data()["test"]
    order = torch.randperm(len(images))
    return model.eval(), images[order], labels[order]


def accuracy(model, images, labels, batch_size, prior):
    right = 0
    for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True):
        with adapted(model, [x], prior=prior), torch.no_grad():
            right += int((model(x).argmax(1) == y).sum())
    return right / len(images)


@pytest.mark.parametrize(("batch_size", "count"), [pytest.param(1, 60, marks=pytest.mark.slow), (16, 360), (200, 360)])
def test_it_helps_where_data_has_shifted_and_costs_nothing_where_not(digits, batch_size, count):
    """https://github.com/DequanWang/tent/issues/4: adaptation that ruins what worked. Here it never costs much."""
    model, images, labels = digits
    images, labels = images[:count], labels[:count]
    gains = {}
    for name, x in {"none": images, "brighter": images + 0.5, "darker": images * 0.4}.items():
        with torch.no_grad():
            source = float((model(x).argmax(1) == labels).float().mean())
        gains[name] = accuracy(model, x, labels, batch_size, prior=16) - source
    assert min(gains.values()) > -0.02
    if batch_size > 1:
        assert gains["brighter"] > 0.2
