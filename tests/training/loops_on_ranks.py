"""Conversion, freezing and transactions in a loop on several processes, against one process with the whole batch."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel

import steadynorm
from steadynorm import convert_
from steadynorm.errors import InputError
from steadynorm.training import freeze_, transaction
from tests.processes import on_ranks

STEPS, BAD = 6, 2


def network() -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)
    ).double()


def data(step: int, world: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The whole batch of a step, 6 samples for each rank; that of step BAD is far away."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(6 * world, 3, generator=generator, dtype=torch.float64).cumsum(0) + (50 if step == BAD else 0)
    return x, torch.randn(6 * world, 2, generator=generator, dtype=torch.float64)


def train(model: nn.Module, steps, world: int, rank: int | None, *, overflows_on: int | None = None) -> None:
    """Plain AMP loop on this rank's part, or on the whole batch; in step BAD the gradients of one rank overflow."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scaler = GradScaler("cpu", init_scale=2.0**8)
    for step in steps:
        x, target = data(step, world)
        if rank is not None:
            x, target = x[6 * rank : 6 * rank + 6], target[6 * rank : 6 * rank + 6]
        with transaction(model, scaler):
            loss = (model(x) - target).square().mean()
            overflows = step == BAD and overflows_on is not None and overflows_on == rank
            scaler.scale(loss * torch.inf if overflows else loss).backward()
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()


def assert_same(model: nn.Module, expected: nn.Module, rtol: float = 1e-10) -> None:
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=rtol, atol=1e-12, msg=lambda m, n=name: n + m)


@on_ranks(2)
def converted_to_sync_and_back_is_one_process_with_the_whole_batch(rank, world):
    """An overflow on one rank skips the step on all, and the statistics of all go back.

    https://github.com/pytorch/pytorch/issues/78081, https://github.com/pytorch/pytorch/issues/41081
    """
    model, whole = network(), network()
    convert_(model, "sync", process_group=dist.group.WORLD)
    assert {type(layer) for layer in model if hasattr(layer, "running_mean")} == {steadynorm.SyncBatchNorm}
    train(DistributedDataParallel(model), range(STEPS), world, rank, overflows_on=world - 1)
    train(whole, [step for step in range(STEPS) if step != BAD], world, None)
    convert_(model, "batch")
    assert [type(layer) for layer in model] == [type(layer) for layer in whole]
    assert_same(model, whole)


@on_ranks(2)
def frozen_layers_do_not_move_on_any_rank(rank, world):
    model = network()
    convert_(model, "sync")
    freeze_(model, "1")
    before = copy.deepcopy(model[1].state_dict())
    ddp = DistributedDataParallel(model)
    for _ in range(2):
        train(ddp.train(), range(STEPS), world, rank)
    for name, value in model[1].state_dict().items():
        assert torch.equal(value, before[name])
    assert int(model[4].num_batches_tracked) == 2 * STEPS
    sums = torch.stack([p.detach().sum() for p in model.parameters()])
    others = [torch.empty_like(sums) for _ in range(world)]
    dist.all_gather(others, sums)
    assert torch.equal(others[0], others[1])


@on_ranks(2)
def a_group_is_kept_and_another_is_taken(rank, world):
    alone = [dist.new_group([number]) for number in range(world)][rank]
    model, single = network(), network()
    convert_(model, "sync")
    change = convert_(model, "sync", process_group=alone)
    assert len(change.log) == 2
    assert model[1].process_group is alone
    assert convert_(model, "sync").log == ()
    train(model, range(STEPS), world, rank)
    train(single, range(STEPS), world, rank)
    assert_same(model, single, rtol=1e-6)
    copy.deepcopy(model)
    with pytest.raises(InputError, match=r"must be a torch\.distributed\.ProcessGroup"):
        convert_(model, "sync", process_group="node")


@on_ranks(2)
def torchs_sync_layers_become_ours_with_their_group(rank, world):
    model, whole = network(), network()
    group = dist.new_group([0, 1])
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model, group)
    convert_(model, "steadynorm")
    assert model[1].process_group is group
    train(DistributedDataParallel(model), range(STEPS), world, rank)
    train(whole, range(STEPS), world, None)
    assert_same(model, whole)
    convert_(model, "torch")
    assert type(model[1]) is nn.SyncBatchNorm
    assert model[1].process_group is group
    convert_(model, "batch", dims=1)
    assert type(model[1]) is nn.BatchNorm1d
