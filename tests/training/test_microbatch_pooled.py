"""pooled_statistics: one update a step, by all the micro-batches of it.

https://discuss.pytorch.org/t/what-is-the-running-mean-of-batchnorm-if-gradients-are-accumulated/18870
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from steadynorm.errors import InputError
from steadynorm.layers import BatchNorm1d, DomainBatchNorm1d, StepBatchNorm1d
from steadynorm.training import pooled_statistics


def batches(count=4, size=3):
    """Ordered data: every micro-batch has a mean of its own, which is where an average of variances goes wrong."""
    return [torch.randn(size + i, 5, dtype=torch.float64) + 10 * i for i in range(count)]


@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
@pytest.mark.parametrize("debias", [False, True])
def test_equal_those_of_one_batch(momentum, debias):
    norm = BatchNorm1d(5, momentum=momentum, debias=debias).double()
    whole, oracle = copy.deepcopy(norm), nn.BatchNorm1d(5, momentum=momentum).double()
    for _ in range(3):
        step = batches()
        with pooled_statistics(norm):
            for batch in step:
                norm(batch)
        whole(torch.cat(step))
        oracle(torch.cat(step))
    assert norm.num_batches_tracked == 3
    for expected in (whole,) if debias else (whole, oracle):
        torch.testing.assert_close(norm.running_mean, expected.running_mean, rtol=1e-12, atol=0)
        torch.testing.assert_close(norm.running_var, expected.running_var, rtol=1e-12, atol=0)


def test_plain_accumulation_is_caught():
    norm, whole, step = BatchNorm1d(5, momentum=1.0).double(), nn.BatchNorm1d(5, momentum=1.0).double(), batches()
    for batch in step:
        norm(batch)
    whole(torch.cat(step))
    assert (norm.running_var / whole.running_var).max() < 0.1


def test_output_and_gradients_are_as_ever():
    model = nn.Sequential(BatchNorm1d(5), nn.Linear(5, 5), BatchNorm1d(5)).double()
    plain, dy = copy.deepcopy(model), torch.randn(9, 5, dtype=torch.float64)
    with pooled_statistics(model):
        for batch in batches():
            y = model(batch)
            y.backward(dy[: len(y)])
    for batch in batches():
        expected = plain(batch)
        expected.backward(dy[: len(expected)])
    assert model[2].num_batches_tracked == 1
    assert plain[2].num_batches_tracked == 4
    assert y.shape == expected.shape


def test_a_batch_that_is_not_finite_is_left_out():
    norm, whole, step = BatchNorm1d(5).double(), BatchNorm1d(5).double(), batches()
    bad = step[1].clone()
    bad[0, 2] = torch.nan
    with pooled_statistics(norm):
        for batch in (bad, step[0], bad, step[2]):
            norm(batch)
    whole(torch.cat([step[0], step[2]]))
    torch.testing.assert_close(norm.running_var, whole.running_var, rtol=1e-12, atol=0)
    assert norm.num_batches_tracked == 1
    with pooled_statistics(norm):
        norm(bad)
    assert norm.num_batches_tracked == 1
    norm.guard = "propagate"
    with pooled_statistics(norm):
        norm(bad)
    assert norm.running_mean.isnan().any()


def test_rows_are_pooled_row_by_row():
    steps = StepBatchNorm1d(5, steps=2).double()
    domains = DomainBatchNorm1d(5, num_domains=3).double()
    whole = copy.deepcopy(domains)
    data, ids = torch.randn(12, 5, dtype=torch.float64), torch.tensor([0, 1, 1, 0, 1, 0] * 2)
    with pooled_statistics(nn.ModuleList([steps, domains])):
        for x, domain in zip(data.split(6), ids.split(6), strict=True):
            domains(x, domain)
            for step in range(2):
                steps(x + step, step)
    whole(data, ids)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(domains, name), getattr(whole, name), rtol=1e-12, atol=1e-14)
    assert domains.num_batches_tracked.tolist() == [1, 1, 0]
    assert steps.num_batches_tracked.tolist() == [1, 1]
    torch.testing.assert_close(steps.running_mean[1] - steps.running_mean[0], torch.full((5,), 0.1).double())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_counts_once(use_reentrant):
    norm, step = BatchNorm1d(5).double(), batches()
    with pooled_statistics(norm):
        for batch in step:
            checkpoint(norm, batch.requires_grad_(), use_reentrant=use_reentrant).square().sum().backward()
    whole = BatchNorm1d(5).double()
    whole(torch.cat(step).detach())
    torch.testing.assert_close(norm.running_var, whole.running_var, rtol=1e-12, atol=0)


def test_frozen_layers_and_evaluation_move_nothing():
    model = nn.Sequential(BatchNorm1d(5).freeze_(), BatchNorm1d(5)).double()
    model[1].eval()
    before = copy.deepcopy(model.state_dict())
    with pooled_statistics(model):
        model(batches()[0])
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


def test_an_exception_moves_nothing():
    norm = BatchNorm1d(5).double()
    before = copy.deepcopy(norm.state_dict())

    def fail():
        with pooled_statistics(norm):
            norm(batches()[0])
            raise KeyError("in the loop")

    with pytest.raises(KeyError):
        fail()
    assert all(torch.equal(a, b) for a, b in zip(before.values(), norm.state_dict().values(), strict=True))
    norm(batches()[0])
    assert norm.num_batches_tracked == 1


def test_what_it_cannot_take():
    def enter(model):
        with pooled_statistics(model):
            pass

    with pytest.raises(InputError, match="no batch norm of ours in BatchNorm1d: convert"):
        enter(nn.BatchNorm1d(3))
    with pytest.warns(UserWarning, match="1 of torch.nn will move with every micro-batch"):
        enter(nn.Sequential(BatchNorm1d(3), nn.BatchNorm1d(3)))
    norm = BatchNorm1d(3)
    with pooled_statistics(norm), pytest.raises(InputError, match="inside another one"):
        enter(norm)
