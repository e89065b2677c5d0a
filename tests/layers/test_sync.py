"""SyncBatchNorm in one process: what it is where nothing is joined. tests/distributed/ has the rest."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import steadynorm
from steadynorm import models
from steadynorm.errors import DegenerateStatisticsError, DistributedError, InputError
from steadynorm.layers import BatchNorm1d, BatchNorm2d, BatchNorm3d, SyncBatchNorm
from steadynorm.layers.batch import BatchNorm
from steadynorm.ranks import REMEMBERED_CALLS, SAME_BATCH, Ranks, _Calls
from tests import cases, oracles
from tests.agree import assert_agrees


def one_process(x, running_mean, running_var, weight, bias, training, momentum, eps, **extras):
    layer = SyncBatchNorm(x.shape[1], eps, momentum, affine=weight is not None, activation=extras.get("activation"))
    tensors = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    return torch.func.functional_call(layer.train(training), given, (x, extras.get("residual"), extras.get("mask")))


@pytest.mark.parametrize("case", cases.ALL[::5], ids=str)
def test_alone_it_agrees_with_the_oracle(case):
    with steadynorm.backend("reference"):
        assert_agrees(one_process, oracles.batch_norm, case)


def same_steps(layer, expected, x):
    for _ in range(2):
        assert torch.equal(layer(x), expected(x))
    for name, buffer in expected.state_dict().items():
        assert torch.equal(layer.state_dict()[name], buffer)


@pytest.mark.parametrize(
    ("other", "shape"),
    [(BatchNorm1d, (5, 3)), (BatchNorm1d, (5, 3, 4)), (BatchNorm2d, (5, 3, 4, 2)), (BatchNorm3d, (5, 3, 4, 2, 3))],
)
def test_without_torch_distributed_it_is_plain_batch_norm(other, shape):
    same_steps(SyncBatchNorm(3, activation="relu"), other(3, activation="relu"), torch.randn(shape))


@pytest.mark.usefixtures("group_of_one")
def test_in_a_world_of_one_it_is_plain_batch_norm():
    same_steps(SyncBatchNorm(3, process_group=dist.group.WORLD), BatchNorm1d(3), torch.randn(5, 3))
    with pytest.raises(DegenerateStatisticsError, match="more than one value per channel"):
        SyncBatchNorm(3)(torch.randn(1, 3))


def test_what_it_is():
    """DistributedDataParallel refuses torch's own on the CPU, and every subclass: it must not be one."""
    layer = SyncBatchNorm(3)
    assert isinstance(layer, BatchNorm)
    assert isinstance(layer, _BatchNorm)
    assert not isinstance(layer, nn.SyncBatchNorm)
    assert models.norm_kind(layer) == "sync"
    assert models.uses_batch_statistics(layer)
    assert steadynorm.SyncBatchNorm is SyncBatchNorm


def test_the_arguments_are_those_of_torch():
    ours, theirs = (
        make(3, 1e-3, 0.2, True, True, None, "cpu", torch.float64, bias=False)
        for make in (SyncBatchNorm, nn.SyncBatchNorm)
    )
    assert ours.extra_repr() == theirs.extra_repr()
    assert ours.bias is None
    assert ours.weight.dtype == torch.float64


def test_a_state_dict_goes_both_ways():
    ours, theirs = SyncBatchNorm(3), nn.SyncBatchNorm(3)
    ours(torch.randn(4, 3))
    theirs.load_state_dict(ours.state_dict())
    back = SyncBatchNorm(3)
    back.load_state_dict(theirs.state_dict())
    x = torch.randn(4, 3)
    assert torch.equal(back.eval()(x), ours.eval()(x))
    torch.testing.assert_close(theirs.eval()(x), ours.eval()(x))


def test_it_can_be_copied_pickled_and_saved():
    layer = SyncBatchNorm(3, activation="relu").freeze_()
    for copied in (copy.deepcopy(layer), copy.copy(layer), pickle.loads(pickle.dumps(layer))):
        assert copied.activation == "relu"
        assert copied.switches() == layer.switches()
        x = torch.randn(4, 3)
        assert torch.equal(copied(x), layer(x))
    file = io.BytesIO()
    torch.save(nn.Sequential(layer), file)
    file.seek(0)
    assert isinstance(torch.load(file, weights_only=False)[0], SyncBatchNorm)


@pytest.mark.usefixtures("group_of_one")
def test_a_group_is_kept_by_copies_and_refused_by_pickle():
    layer = SyncBatchNorm(3, process_group=dist.group.WORLD)
    for copied in (copy.deepcopy(layer), copy.copy(layer)):
        assert copied.process_group is dist.group.WORLD
    with pytest.raises(TypeError, match="pickle"):
        pickle.dumps(layer)


def test_a_class_that_is_set_from_outside():
    layer = nn.SyncBatchNorm(3)
    layer.__class__ = SyncBatchNorm
    same_steps(layer, BatchNorm1d(3), torch.randn(5, 3))


def test_a_group_without_torch_distributed(tmp_path):
    with pytest.raises(InputError, match=r"SyncBatchNorm got a process group, and .* not initialised: call"):
        SyncBatchNorm(3, process_group="world")
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    layer = SyncBatchNorm(3, process_group=dist.group.WORLD)
    dist.destroy_process_group()
    before = copy.copy(layer.state_dict())
    with pytest.raises(InputError, match="not initialised"):
        layer(torch.randn(5, 3))
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
    layer.eval()(torch.randn(5, 3))  # evaluation joins nothing
    for call in (lambda: steadynorm.sync_group(2), lambda: Ranks()):
        with pytest.raises(InputError, match=r"not initialised: call torch\.distributed\.init_process_group"):
            call()


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.randn(3), r"expected \(N, C\) or \(N, C, L\) .*got \(3,\)"),
        (torch.randn(2, 4), "expected 3 channels"),
        (torch.randint(3, (2, 3)), "floating-point"),
    ],
)
def test_input_that_does_not_fit(x, message):
    with pytest.raises(InputError, match=message):
        SyncBatchNorm(3)(x)


def kept(*means):
    """A memory of calls with these means, one channel, variance 1 and 10 values; merged is told apart by its count."""
    calls = _Calls()
    for number, mean in enumerate(means):
        calls.remember(sent(mean), number)
    return calls


def sent(mean, var=1.0, count=10.0):
    return torch.tensor([mean, var, count], dtype=torch.float64)


def test_a_recomputed_call_is_found_by_its_statistics():
    calls = kept(0.5, 0.5 + 1e-6, 0.7)
    assert calls.find(sent(0.7), 1, "it") == 2
    assert calls.find(sent(0.5), 1, "it") == 0
    assert calls.find(sent(0.5 + 1e-6 + 1e-9), 1, "it") == 1  # not the bits of any, and nearest to this


def test_of_equal_calls_the_newest_that_was_not_taken_comes_first():
    calls = kept(0.5, 0.5)
    assert [calls.find(sent(0.5), 1, "it") for _ in range(3)] == [1, 0, 1]
    calls.remember(sent(0.9), 2)  # the next forward pass: what was taken is gone
    assert [call.merged for call in calls._kept] == [2]


def test_statistics_that_are_not_finite_are_found_too():
    calls = kept(float("nan"), 0.5)
    assert calls.find(sent(float("nan")), 1, "it") == 0


@pytest.mark.parametrize(
    "other", [sent(0.5 + 2 * SAME_BATCH), sent(0.5, 1.01), sent(0.5, 1.0, 11.0), sent(float("nan")), sent(float("inf"))]
)
def test_another_batch_is_not_taken_for_the_same(other):
    with pytest.raises(DistributedError, match="it was run again in a backward pass with a batch that none"):
        kept(0.5).find(other, 1, "it")


def test_a_channel_that_hardly_varies_is_as_exact_as_its_mean():
    calls = _Calls()
    calls.remember(sent(100.0, 0.0), "constant")
    assert calls.find(sent(100.0 * (1 + 1e-7), 1e-12), 1, "it") == "constant"
    with pytest.raises(DistributedError):
        calls.find(sent(100.01, 0.0), 1, "it")


def test_no_more_calls_are_kept_than_that():
    calls = kept(*range(REMEMBERED_CALLS + 5))
    assert len(calls._kept) == REMEMBERED_CALLS
    assert calls.find(sent(REMEMBERED_CALLS + 4.0), 1, "it") == REMEMBERED_CALLS + 4
    assert _Calls().find(sent(0.0), 1, "it") is None
