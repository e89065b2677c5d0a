import math

import numpy as np
import pytest
import torch
from torch import nn

import steadynorm
from steadynorm import models
from steadynorm.probe import drift, observe, state
from steadynorm.probe.facts import Drift
from steadynorm.recipe import call


def data(count, *shape, mean=3.0, deviation=2.0):
    return torch.randn(count, *shape) * deviation + mean


@pytest.mark.parametrize("splits", [(60,), (30, 30), (7, 1, 52), (1,) * 60])
def test_recalibration_does_not_depend_on_how_the_data_was_batched(splits):
    x = data(60, 3, 4, 4)
    model = nn.Sequential(nn.BatchNorm2d(3)).eval()
    found = drift.recalibrate(model, list(x.split(splits)), call, ["0"]).pooled("0")
    values = x.double().numpy()
    np.testing.assert_allclose(found.mean.numpy(), values.mean((0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(found.var.numpy(), values.var((0, 2, 3)), rtol=1e-5)
    assert int(found.count) == 60 * 16


def test_the_two_halves_are_of_different_data():
    x = data(40, 3)
    for batches in ([x], [x[:20], x[20:]]):
        found = drift.recalibrate(nn.Sequential(nn.BatchNorm1d(3)).eval(), batches, call, ["0"])
        a, b = found.halves["0"]
        assert int(a.count) == int(b.count) == 20
        assert not torch.allclose(a.mean, b.mean)


def test_a_layer_sees_inputs_that_were_normalised_by_their_batch():
    """The stale layer in front does not make the next one look stale."""
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Tanh(), nn.BatchNorm1d(3))
    x = data(512, 3)
    for _ in range(60):
        model(x)
    model[0].reset_running_stats()
    model.eval()
    stored = drift.Stored(model, ["0", "2"])
    found = drift.drifts(drift.recalibrate(model, [x[:256], x[256:]], call, ["0", "2"]), stored, state.look(model))
    assert found["0"].is_beyond_chance
    assert not found["2"].is_beyond_chance
    assert found["0"].mean_shift == pytest.approx(1.5, rel=0.2)
    assert found["0"].variance_ratio == pytest.approx(0.25, rel=0.2)


def test_padding_is_left_out():
    x = data(8, 3, 10)
    lengths = torch.tensor([4, 10, 7, 1, 10, 2, 3, 9])
    mask = torch.arange(10) < lengths[:, None]
    x = torch.where(mask[:, None], x, 1e6)
    valid = x.movedim(1, -1)[mask].double()
    layer = steadynorm.BatchNorm1d(3).eval()
    for extra in ({"mask": mask}, {"lengths": lengths}):
        found = drift.recalibrate(layer, [{"input": x, **extra}], call, [""]).pooled("")
        torch.testing.assert_close(found.mean, valid.mean(0))
        torch.testing.assert_close(found.var, valid.var(0, unbiased=False))


def test_divergence_is_that_of_two_normal_distributions():
    """Against the integral of (p − q) log(p / q), on a fine grid."""
    grid = np.linspace(-60, 60, 400_001)

    def log_density(mean, var):
        return -((grid - mean) ** 2) / (2 * var) - np.log(2 * np.pi * var) / 2

    a, b = (1.0, 4.0), (-0.5, 2.5)
    p, q = log_density(*a), log_density(*b)
    expected = ((np.exp(p) - np.exp(q)) * (p - q)).sum() * (grid[1] - grid[0])
    tensors = [tuple(torch.tensor([value], dtype=torch.float64) for value in pair) for pair in (a, b)]
    assert drift.divergence(*tensors, eps=0.0) == pytest.approx(expected, rel=1e-6)
    assert drift.divergence(*reversed(tensors), eps=0.0) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("broken", [(torch.nan, 1.0), (0.0, torch.inf), (0.0, -1.0), (0.0, torch.nan)])
def test_broken_statistics_are_infinitely_far(broken):
    stored = tuple(torch.tensor([value]) for value in broken)
    healthy = (torch.zeros(1), torch.ones(1))
    assert drift.divergence(stored, healthy, 1e-5) == math.inf
    assert Drift("x", math.inf, 0.0, 0.0, 1.0).is_beyond_chance
    assert Drift("x", math.nan, 0.0, 0.0, 1.0).is_beyond_chance


def test_statistics_are_put_in_place_and_back_in_place():
    layer = nn.BatchNorm1d(2)
    mean, _ = models.running_statistics(layer)
    stored = drift.Stored(layer, [""])
    stored.put({"": (torch.full((2,), 5.0), torch.full((2,), 6.0))})
    assert layer.running_mean is mean
    assert mean.tolist() == [5, 5]
    stored.put()
    assert mean.tolist() == [0, 0]
    assert layer.running_var.tolist() == [1, 1]


def test_values_that_are_alike_count_less():
    """Constant images: each is worth one value; noise: each pixel counts."""
    levels = torch.randn(256, 1, 1, 1)
    for x, expected in ((levels.expand(256, 1, 4, 4).contiguous(), 1), (torch.randn(256, 1, 4, 4), 16)):
        values = drift.recalibrate(nn.BatchNorm2d(1).eval(), [x[:128], x[128:]], call, [""]).values("")
        assert values.per_sample == 16
        assert values.independent_per_sample == pytest.approx(expected, rel=0.15)


def test_only_the_named_layers_train():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout(), nn.BatchNorm1d(2)).eval()
    with drift.training_mode(model, ["0"]):
        assert [module.training for module in model] == [True, False, False]
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("fewest", [1, 64])
def test_of_many_stale_layers_each_is_judged_on_few_samples_or_on_a_whole_batch(fewest):
    def loss(output, batch):
        assert len(output) >= fewest, "this loss knows its batch size"
        return output.square().mean()

    blocks = [layer for _ in range(14) for layer in (nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2))]
    batches = [data(64, 2, 5, 5) for _ in range(4)]
    facts = observe(nn.Sequential(*blocks).eval(), batches, forward=call, loss=loss, parts={"drift"})
    assert "drift" not in facts.skipped
    stale = [found.effect for found in facts.drift.values() if found.is_beyond_chance]
    # Three passes over 256 samples, shared out; whole batches are the least that this loss can judge.
    assert len(stale) > 12
    assert {effect.samples for effect in stale} == {64 if fewest == 64 else 3 * 256 // len(stale)}
    assert facts.drift_together.samples == 256
