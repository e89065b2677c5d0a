"""StepBatchNorm1d: each time step remembers for itself, and later ones share the last."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import steadynorm
from steadynorm.errors import DegenerateStatisticsError, InputError
from steadynorm.layers import BatchNorm1d, StepBatchNorm1d
from tests import cases, oracles
from tests.agree import assert_agrees

CASES = [case for case in cases.ALL if len(case.shape) <= 3]


def at_step(step, *, wrong=""):
    """The layer as the function that `assert_agrees` calls, on one row of its statistics."""

    def call(x, mean, var, weight, bias, training, momentum, eps, *, activation=None, residual=None, mask=None):
        layer = StepBatchNorm1d(x.shape[1], eps, momentum, affine=weight is not None, activation=activation, steps=3)
        layer.train(training).to(mean.dtype)
        row = min(step, 2)
        for name, given in (("running_mean", mean), ("running_var", var)):
            getattr(layer, name)[row] = given
        for name, given in (("weight", weight), ("bias", bias)):
            if given is not None:
                layer._parameters[name] = given
        others = [getattr(layer, name)[torch.arange(3) != row].clone() for name in ("running_mean", "running_var")]
        y = layer(x, 0 if wrong == "the first step's" else step, residual, mask)
        if training:
            mean.copy_(layer.running_mean[row]), var.copy_(layer.running_var[row])
        kept = [getattr(layer, name)[torch.arange(3) != row] for name in ("running_mean", "running_var")]
        assert wrong or all(torch.equal(a, b) for a, b in zip(others, kept, strict=True)), "another step moved"
        return y

    return call


@pytest.mark.parametrize("step", [0, 1, 7])
@pytest.mark.parametrize("case", CASES[::3], ids=str)
def test_agrees_with_the_formulas(case, step):
    assert_agrees(at_step(step), oracles.batch_norm, case)


@pytest.mark.parametrize("case", ["rows", "rows, evaluation"])
def test_the_comparison_rejects_the_statistics_of_another_step(case):
    reason = "y is off" if "evaluation" in case else "running_mean is off"
    with pytest.raises(AssertionError, match=reason):
        assert_agrees(at_step(1, wrong="the first step's"), oracles.batch_norm, cases.BY_NAME[case])


@pytest.mark.parametrize("momentum", [0.1, None])
def test_every_step_is_a_batch_norm_of_its_own(momentum):
    layer = StepBatchNorm1d(3, momentum=momentum, steps=3, initial_weight=1.0)
    plains = [BatchNorm1d(3, momentum=momentum) for _ in range(3)]
    for _ in range(2):
        for step in range(5):
            x = torch.randn(6, 3) * (step + 1)
            assert torch.equal(layer(x, step), plains[min(step, 2)](x))
    assert layer.num_batches_tracked.tolist() == [2, 2, 6]
    for row, plain in enumerate(plains):
        assert torch.equal(layer.running_mean[row], plain.running_mean)
        assert torch.equal(layer.running_var[row], plain.running_var)
        x = torch.randn(1, 3)
        assert torch.equal(layer.eval()(x, row), plain.eval()(x))
        layer.train()


def test_a_recurrence_trains_through_time():
    cell, norm = nn.Linear(4, 4, bias=False), StepBatchNorm1d(4, steps=5, activation=None)
    x, h = torch.randn(7, 8, 4), torch.zeros(8, 4)
    for step in range(7):
        h = torch.tanh(norm(cell(h) + x[step], step))
    h.square().sum().backward()
    assert cell.weight.grad.abs().max() > 0
    assert norm.weight.grad.isfinite().all()
    assert norm.num_batches_tracked.tolist() == [1, 1, 1, 1, 3]


def test_the_weight_starts_small_and_is_reset_so():
    layer = StepBatchNorm1d(3, steps=2)
    assert layer.weight.tolist() == pytest.approx([0.1] * 3)
    nn.init.ones_(layer.weight)
    layer(torch.randn(4, 3), 1)
    layer.reset_parameters()
    assert layer.weight.tolist() == pytest.approx([0.1] * 3)
    assert layer.num_batches_tracked.tolist() == [0, 0]
    assert StepBatchNorm1d(3, steps=2, affine=False).weight is None


def test_a_plain_batch_norm_is_where_every_step_starts():
    plain = nn.BatchNorm1d(3)
    plain(torch.randn(16, 3) + 2)
    layer = StepBatchNorm1d(3, steps=2)
    layer.load_state_dict(plain.state_dict(), strict=True)
    x = torch.randn(4, 3)
    for step in range(3):
        torch.testing.assert_close(layer.eval()(x, step), plain.eval()(x))
    layer.train()(x, 0)
    assert not torch.equal(layer.running_mean[0], layer.running_mean[1])


@pytest.mark.parametrize("step", [-1, 1.0, True, None, torch.tensor(1)], ids=str)
def test_a_step_that_is_none_is_refused_and_changes_nothing(step):
    layer = StepBatchNorm1d(3, steps=2)
    with pytest.raises(InputError, match=r"^StepBatchNorm1d expected a step, an integer from 0 on, got"):
        layer(torch.randn(4, 3), step)
    assert layer.num_batches_tracked.tolist() == [0, 0]


@pytest.mark.parametrize("steps", [0, -1, 2.0, True])
def test_steps_that_are_none_are_refused(steps):
    with pytest.raises(InputError, match="StepBatchNorm1d: steps must be a positive integer"):
        StepBatchNorm1d(3, steps=steps)


def test_one_value_per_channel():
    layer = StepBatchNorm1d(3, steps=2)
    with pytest.raises(DegenerateStatisticsError, match="StepBatchNorm1d expected more than one value per channel"):
        layer(torch.randn(1, 3), 0)
    layer.single_value = "running"
    layer(torch.randn(1, 3), 0)
    assert layer.num_batches_tracked.tolist() == [0, 0]


def test_another_rank_gets_advice_that_exists():
    with pytest.raises(InputError, match=r"got \(4, 3, 2, 2\): use BatchNorm2d for \(N, C, H, W\)"):
        StepBatchNorm1d(3, steps=2)(torch.randn(4, 3, 2, 2), 0)


def test_it_is_not_taken_for_a_layer_with_one_set_of_statistics():
    layer = steadynorm.StepBatchNorm1d(3, steps=4)
    assert not isinstance(layer, nn.modules.batchnorm._BatchNorm)
    assert "steps=4" in repr(layer)
