"""Averages against NumPy float64, and against torch where torch is right."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import swa_utils

import steadynorm
from steadynorm.errors import InputError
from steadynorm.training import AveragedModel


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.norm = nn.BatchNorm1d(3)
        self.frozen = steadynorm.BatchNorm1d(3).freeze_()
        self.register_buffer("scale", torch.ones(3))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        return self.frozen(self.norm(self.linear(x))) * self.scale


def trajectory(updates=6, seed=0):
    """A model at the end of each epoch: its weights move, and with them the statistics."""
    generator = torch.Generator().manual_seed(seed)
    model, states = Model(), []
    for _ in range(updates):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator))
            for _ in range(3):
                model.train()(torch.randn(16, 4, generator=generator))
            model.scale.mul_(1.1)
            model.steps.add_(1)
        states.append(copy.deepcopy(model))
    return states


def numbers(models, name):
    return np.stack([model.state_dict()[name].double().numpy() for model in models])


def weights_of(count, decay):
    """The weight of each of `count` models in their average."""
    if decay is None:
        return np.full(count, 1 / count)
    weights = [decay ** (count - 1)] + [(1 - decay) * decay ** (count - 1 - i) for i in range(1, count)]
    return np.array(weights)


def averaged(models, **options):
    average = AveragedModel(models[0], **options)
    for model in models:
        average.update_parameters(model)
    return average


WAYS = [
    ({}, None),
    ({"decay": 0.7}, 0.7),
    ({"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.7)}, 0.7),
    ({"avg_fn": swa_utils.get_ema_avg_fn(0.7)}, 0.7),
    ({"multi_avg_fn": swa_utils.get_swa_multi_avg_fn()}, None),
]


@pytest.mark.parametrize(("options", "decay"), WAYS)
def test_parameters_are_averaged_as_by_torch(options, decay):
    models = trajectory()
    average = averaged(models, **options)
    expected = np.tensordot(weights_of(6, decay), numbers(models, "linear.weight"), 1)
    np.testing.assert_allclose(average.module.linear.weight.detach().numpy(), expected, rtol=1e-5, atol=1e-6)
    theirs = swa_utils.AveragedModel(
        models[0], **({"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.7)} if "decay" in options else options)
    )
    for model in models:
        theirs.update_parameters(model)
    for ours, of_torch in zip(average.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(ours, of_torch)


def assert_moments(average, models, decay):
    """Mean and variance of the mixture of all models' statistics."""
    weights = weights_of(len(models), decay)
    means, variances = numbers(models, "norm.running_mean"), numbers(models, "norm.running_var")
    mean = np.tensordot(weights, means, 1)
    var = np.tensordot(weights, variances + (means - mean) ** 2, 1)
    np.testing.assert_allclose(average.module.norm.running_mean.numpy(), mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(average.module.norm.running_var.numpy(), var, rtol=1e-5)


@pytest.mark.parametrize(("options", "decay"), WAYS)
def test_statistics_are_averaged_as_moments(options, decay):
    models = trajectory()
    assert_moments(averaged(models, statistics="average", **options), models, decay)


def test_torchs_average_of_variances_would_be_caught():
    models = trajectory()
    theirs = swa_utils.AveragedModel(models[0], use_buffers=True)
    for model in models:
        theirs.update_parameters(model)
    with pytest.raises(AssertionError):
        assert_moments(theirs, models, None)
    # The counter is averaged too: https://github.com/Lightning-AI/pytorch-lightning/issues/8811
    assert theirs.module.norm.num_batches_tracked.item() != models[-1].norm.num_batches_tracked.item()


@pytest.mark.parametrize("options", [{}, {"use_buffers": True}, {"statistics": "average", "buffers": {"*": "average"}}])
def test_counters_and_other_integers_are_copied(options):
    models = trajectory()
    average = averaged(models, **options)
    assert average.module.norm.num_batches_tracked.item() == models[-1].norm.num_batches_tracked.item() == 18
    assert average.module.steps.item() == 6


def test_buffers_are_copied_unless_told_otherwise():
    models = trajectory()
    average = averaged(models)
    for name, buffer in average.module.named_buffers():
        assert torch.equal(buffer, dict(models[-1].named_buffers())[name])


def test_other_buffers_by_pattern():
    models = trajectory()
    kept = averaged(models, buffers={"scale": "keep"})
    assert torch.equal(kept.module.scale, models[0].scale)
    mean = averaged(models, buffers={"sc*": "average"})
    np.testing.assert_allclose(mean.module.scale.numpy(), numbers(models, "scale").mean(0), rtol=1e-6)


def test_the_plan_is_explicit():
    average = AveragedModel(Model(), statistics="average", buffers={"sc*": "average"})
    assert average.plan == {
        "scale": "average",
        "steps": "copy",
        "norm.running_mean": "moments",
        "norm.running_var": "moments",
        "norm.num_batches_tracked": "copy",
        "frozen.running_mean": "copy",
        "frozen.running_var": "copy",
        "frozen.num_batches_tracked": "copy",
    }
    others = nn.ModuleDict(
        {
            "instance": nn.InstanceNorm1d(3, track_running_stats=True),
            "domain": steadynorm.DomainBatchNorm1d(3, num_domains=2),
            "constant": steadynorm.FrozenBatchNorm1d(3),
        }
    )
    plan = AveragedModel(others, statistics="average").plan
    assert plan["instance.running_var"] == "average"
    assert plan["domain.running_var"] == "moments"
    assert plan["constant.running_var"] == "copy"
    plan = AveragedModel(others, statistics="recalibrate").plan
    assert plan["instance.running_var"] == plan["domain.running_var"] == "copy"


def test_recalibrated_averages_hold_the_statistics_of_their_own_weights():
    """https://github.com/huggingface/pytorch-image-models/issues/102, https://github.com/lucidrains/ema-pytorch/issues/29

    An SWA with the statistics of anything else is worth little.
    """
    models, x = trajectory(), torch.randn(200, 4)
    average = averaged(models, statistics="recalibrate")
    average.eval()
    with pytest.raises(InputError, match="newer than its running statistics"):
        average(x)
    report = average.recalibrate_(x.split(32))
    values = average.module.linear(x).detach().double().numpy()
    np.testing.assert_allclose(average.module.norm.running_mean.numpy(), values.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(average.module.norm.running_var.numpy(), values.var(0, ddof=1), rtol=1e-5)
    assert average.module.frozen.running_var.eq(1).all()
    assert list(report.layers) == ["norm"]
    assert torch.isfinite(average(x)).all()
    average.update_parameters(models[0])
    with pytest.raises(InputError, match="recalibrate_"):
        average(x)
    # Neither copying nor averaging would have done.
    for way in ("copy", "average"):
        other = averaged(models, statistics=way)
        assert not np.allclose(other.module.norm.running_var.numpy(), values.var(0, ddof=1), rtol=0.3)


def test_training_goes_on_as_ever():
    """In training mode the average runs without statistics of its own, as a teacher does."""
    average = averaged(trajectory(), statistics="recalibrate").train()
    assert torch.isfinite(average(torch.randn(8, 4))).all()


def test_freezing_after_the_start_is_followed():
    model = nn.Sequential(steadynorm.BatchNorm1d(3), steadynorm.BatchNorm1d(3))
    average = AveragedModel(model)
    model[0].freeze_()
    average.update_parameters(model)
    report = average.recalibrate_([torch.randn(16, 3)])
    assert list(report.layers) == ["1"]


def test_a_checkpoint_goes_both_ways_with_torch():
    models = trajectory()
    average, theirs = averaged(models, statistics="average"), swa_utils.AveragedModel(models[0])
    theirs.load_state_dict(average.state_dict())
    again = AveragedModel(models[0], statistics="average")
    again.load_state_dict(theirs.state_dict())
    assert int(again.n_averaged) == 6
    for one, two in zip(again.state_dict().values(), average.state_dict().values(), strict=True):
        assert torch.equal(one, two)
    assert isinstance(average, swa_utils.AveragedModel)


def test_half_precision_statistics_average_in_full():
    models = [copy.deepcopy(model) for model in trajectory()]
    for model in models:
        model.norm.bfloat16()
    average = averaged(models, statistics="average")
    assert average.module.norm.running_var.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"statistics": "mean"}, "'copy', 'recalibrate', 'average', got 'mean'"),
        ({"decay": 1.5}, "decay must be in"),
        ({"decay": 0.5, "avg_fn": swa_utils.get_ema_avg_fn(0.7)}, "without avg_fn"),
        ({"buffers": {"scale": "median"}}, "must be one of 'copy', 'average', 'keep'"),
        ({"buffers": {"scales": "keep"}}, "expected a pattern for the name of a buffer"),
    ],
)
def test_bad_options(options, match):
    with pytest.raises(InputError, match=match):
        AveragedModel(Model(), **options)


def test_another_model_is_refused():
    average = AveragedModel(Model())
    before = {name: tensor.clone() for name, tensor in average.state_dict().items()}
    with pytest.raises(InputError, match="different buffers"):
        average.update_parameters(nn.Linear(4, 3))
    for name, tensor in average.state_dict().items():
        assert torch.equal(tensor, before[name])
