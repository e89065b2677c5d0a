"""Micro-batches on several processes; run by tests/distributed/test_on_ranks.py."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from steadynorm.errors import InputError
from steadynorm.layers import BatchNorm2d, SyncBatchNorm
from steadynorm.training import microbatch
from steadynorm.training.microbatch import KINDS
from tests.processes import on_ranks

DOUBLE = torch.float64


class Block(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 3, bias=False), nn.Conv2d(6, 6, 1, bias=False)
        self.norm1, self.norm2 = norm(6), norm(6)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        x = self.norm1(self.conv1(x)).relu()
        x = self.norm2(self.conv2(x), residual=x)
        return self.head(self.norm2(x).mean((2, 3)))


def models():
    """One with statistics over all ranks, and the same for a whole batch in one process."""
    synced, whole = Block(SyncBatchNorm).to(DOUBLE), Block(BatchNorm2d).to(DOUBLE)
    whole.load_state_dict(synced.state_dict())
    return synced, whole


def sizes(world):
    return [5, 3][:world]


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def check_equal(model, forward, whole, rank, world, divide=1):
    x, dy = torch.randn(sum(sizes(world)), 3, 7, 7, dtype=DOUBLE), torch.randn(sum(sizes(world)), 5, dtype=DOUBLE)
    own, dy_own = (t.split(sizes(world))[rank].clone() for t in (x, dy))
    x, own = x.requires_grad_(), own.requires_grad_()
    y, expected = forward(own), whole(x)
    close(y, expected.split(sizes(world))[rank])
    y.backward(dy_own)
    expected.backward(dy)
    close(own.grad, x.grad.split(sizes(world))[rank])
    for (name, parameter), one in zip(model.named_parameters(), whole.parameters(), strict=True):
        gradient = parameter.grad.clone()
        if divide == 1:
            dist.all_reduce(gradient)
        torch.testing.assert_close(gradient * divide, one.grad, rtol=1e-10, atol=1e-11, msg=name)
    for found, one in zip(model.buffers(), whole.buffers(), strict=True):
        close(found, one)


@on_ranks(2)
def micro_batches_and_ranks_are_one_batch(rank, world):
    for memory in KINDS:
        model, whole = models()
        check_equal(model, microbatch(model, 2, memory=memory), whole, rank, world)


@on_ranks(2)
def under_ddp(rank, world):
    """DDP takes the mean over ranks of gradients that each has summed over its micro-batches, once."""
    for memory in ("keep", "offload"):
        model, whole = models()
        parallel = DistributedDataParallel(model)
        exact = microbatch(parallel, 2, memory=memory)
        check_equal(model, exact, whole, rank, world, divide=world)
        for parameter in model.parameters():
            parameter.grad = None
        fresh = copy.deepcopy(model)
        whole.load_state_dict(fresh.state_dict())
        whole.zero_grad()
        check_equal(model, exact, whole, rank, world, divide=world)
    with pytest.raises(InputError, match="DistributedDataParallel does not expect"):
        microbatch(parallel, 2, memory="recompute")


@on_ranks(2)
def ranks_with_other_numbers_of_micro_batches(rank, world):
    """They meet at every layer, however many are behind each."""
    model, whole = models()
    check_equal(model, microbatch(model, [[1, 1, 1, 2], 2][rank]), whole, rank, world)


@on_ranks(2)
def one_value_per_rank(rank, world):
    norm, whole = SyncBatchNorm(3).to(DOUBLE), BatchNorm2d(3).to(DOUBLE)
    x = torch.randn(4, 3, 1, 1, dtype=DOUBLE)
    close(microbatch(norm, 1)(x[2 * rank : 2 * rank + 2]), whole(x)[2 * rank : 2 * rank + 2])
    close(norm.running_var, whole.running_var)


@on_ranks(2)
def under_fully_shard(rank, world):
    """Sharded blocks, gathered until all micro-batches have left them."""
    for memory in KINDS:
        model, whole = models()
        fully_shard(model.conv2, reshard_after_forward=False)
        exact = microbatch(fully_shard(model, reshard_after_forward=False), 2, memory=memory)
        x, dy = torch.randn(8, 3, 7, 7, dtype=DOUBLE), torch.randn(8, 5, dtype=DOUBLE)
        own = slice(4 * rank, 4 * rank + 4)
        y, expected = exact(x[own]), whole(x)
        close(y, expected[own])
        y.backward(dy[own])
        expected.backward(dy)
        for parameter, one in zip(model.parameters(), whole.parameters(), strict=True):
            gradient = parameter.grad.full_tensor() * world
            torch.testing.assert_close(gradient, one.grad, rtol=1e-10, atol=1e-11)


@on_ranks(2)
def blocks_that_are_sharded_behind_the_first_micro_batch(rank, world):
    """torch says so, before anything is computed with a shard."""
    block = nn.Sequential(nn.Conv2d(3, 3, 1), SyncBatchNorm(3), nn.Conv2d(3, 3, 1)).to(DOUBLE)
    model = nn.Sequential(fully_shard(block, reshard_after_forward=True), nn.Conv2d(3, 3, 1).to(DOUBLE))
    with pytest.raises(RuntimeError, match=r"mixed torch\.Tensor and DTensor"):
        microbatch(fully_shard(model), 1)(torch.randn(2, 3, 4, 4, dtype=DOUBLE))
    assert block[1].num_batches_tracked == 0
