"""Ranks that end, or do not come, in the middle of a step; run by tests/distributed/test_on_ranks.py.

The last of the ranks is killed for good, so each of these checks has one rank less than the one before.
"""

from __future__ import annotations

import os
import signal
import time
import warnings
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn

from steadynorm.errors import DistributedError
from steadynorm.layers import SyncBatchNorm
from tests.distributed.behaviour import batch
from tests.distributed.frameworks import Network
from tests.processes import GROUP_TIMEOUT, on_ranks

MESSAGE = r"SyncBatchNorm at {path} waited for the other ranks of its group in its {phase} pass, and a rank is gone"


class Dies(nn.Module):
    """Kills its process where the first or the last pass comes through it."""

    def __init__(self, phase: str):
        super().__init__()
        self.phase = phase

    def forward(self, x):
        if self.phase == "forward":
            os.kill(os.getpid(), signal.SIGKILL)
        y = x.clone()
        y.register_hook(lambda _: os.kill(os.getpid(), signal.SIGKILL))
        return y


def fails_on_the_others(rank, world, phase, path):
    """A step in which the last rank is killed between two norms: the others name the norm, within the timeout."""
    model = Network(SyncBatchNorm)
    x = torch.randn(4, 2, 5, 5, dtype=torch.float64)
    model(x).sum().backward()  # a step before, in which nobody dies
    if rank == world - 1:
        model.second = nn.Sequential(Dies(phase), model.second)
    before = [buffer.clone() for buffer in model.norms[1].buffers()]
    start = time.monotonic()
    with pytest.raises(DistributedError, match=MESSAGE.format(path=path, phase=phase)):
        model(x).square().sum().backward()
    assert time.monotonic() - start < GROUP_TIMEOUT.total_seconds()
    if phase == "forward":
        assert all(torch.equal(a, b) for a, b in zip(before, model.norms[1].buffers(), strict=True))


@on_ranks(4, dies=3)
def killed_in_a_forward_pass(rank, world):
    fails_on_the_others(rank, world, "forward", r"norms\.1")


@on_ranks(3, dies=2)
def killed_in_a_backward_pass(rank, world):
    fails_on_the_others(rank, world, "backward", r"norms\.0")


@on_ranks(2)
def a_rank_that_does_not_come(rank, world):
    """It calls the layer once less: https://github.com/pytorch/pytorch/issues/48988"""
    group = dist.new_group([0, 1], timeout=timedelta(seconds=5))
    model = nn.Sequential(SyncBatchNorm(4, process_group=group))
    _, part = batch(rank, world)
    dist.barrier()
    model(part)
    if rank == 0:
        start = time.monotonic()
        with pytest.raises(DistributedError, match=r"SyncBatchNorm at 0 waited .*did not come within the timeout"):
            model(part)
        assert time.monotonic() - start < 20
    dist.barrier()


@on_ranks(2, dies=1)
def killed_while_the_other_is_in_a_compiled_graph(rank, world):
    warnings.simplefilter("ignore", DeprecationWarning)
    _, part = batch(rank, world)
    model = nn.Sequential(SyncBatchNorm(4))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(part)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(DistributedError, match=r"SyncBatchNorm at 0 waited .* forward pass"):
        compiled(part)
