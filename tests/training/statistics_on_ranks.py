"""Statistics that several processes find together, against one process with all the data."""

from __future__ import annotations

import inspect
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import steadynorm
from steadynorm.errors import DistributedError, InputError
from steadynorm.training import adapt_, merge_ranks_, recalibrate_
from tests.processes import on_ranks

SIZES = {2: (13, 50), 3: (7, 0, 56)}
"""Samples of each rank."""


def network():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 5), steadynorm.BatchNorm1d(5)
    )


def data():
    return torch.randn(63, 4, generator=torch.Generator().manual_seed(1)).cumsum(0)  # ranks that differ


def own_batches(rank, world):
    part = data().split(list(SIZES[world]))[rank]
    return list(part.split(6 + rank)) if len(part) else []


def everyones(model):
    """The statistics on all ranks: (ranks, values)."""
    mine = torch.cat([t.double().flatten() for name, t in model.named_buffers() if "running" in name])
    rows = [torch.zeros_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, mine)
    return rows


def assert_identical(model):
    rows = everyones(model)
    assert all(torch.equal(row, rows[0]) for row in rows)


def assert_first_layer(model, x):
    values = model[0](x).detach().double().numpy()
    np.testing.assert_allclose(model[1].running_mean.numpy(), values.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(model[1].running_var.numpy(), values.var(0, ddof=1), rtol=1e-5)


@on_ranks(2, 3)
def uneven_ranks_end_identical(rank, world):
    """https://github.com/facebookresearch/fvcore/issues/152: ranks that end with statistics of their own."""
    for method in ("one_pass", "layer_by_layer"):
        model = network()
        report = recalibrate_(model, own_batches(rank, world), method=method)
        assert_identical(model)
        assert_first_layer(model, data())
        assert report.samples == 63
    # The last of them, behind layers with statistics of all ranks: one process with all the data.
    alone = network()
    recalibrate_(
        alone, data().split(9), method="layer_by_layer", group=dist.new_group([rank], use_local_synchronization=True)
    )
    for one, two in zip(model.buffers(), alone.buffers(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


@on_ranks(2)
def ddp_and_sync_batch_norm_do_not_talk_meanwhile(rank, world):
    plain, theirs, ours = network(), nn.SyncBatchNorm.convert_sync_batchnorm(network()), network()
    ours[1] = steadynorm.layers.SyncBatchNorm(6)
    for model, wrapped in (
        (plain, DistributedDataParallel(plain)),
        (theirs, theirs),  # which DDP takes on a GPU only
        (ours, DistributedDataParallel(ours)),
    ):
        recalibrate_(wrapped, own_batches(rank, world))
        assert_identical(model)
        assert_first_layer(model, data())


@on_ranks(2)
def sharded_models_train_on(rank, world):
    """FSDP2 gathers parameters in every forward pass: as many batches on each rank."""
    model, x = network(), data()[:60]
    weight, bias = (parameter.detach().clone() for parameter in model[0].parameters())
    mesh = init_device_mesh("cpu", (world,))
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    for method in ("one_pass", "layer_by_layer"):
        recalibrate_(model, x[rank::world].split(6), method=method)
    assert_identical(model)
    values = (x @ weight.T + bias).double().numpy()
    np.testing.assert_allclose(model[1].running_mean.numpy(), values.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(model[1].running_var.numpy(), values.var(0, ddof=1), rtol=1e-5)
    assert all(module.training for module in model.modules())
    before = model[0].weight.full_tensor()
    model(x[rank::world]).square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert not torch.equal(model[0].weight.full_tensor(), before)


@on_ranks(2)
def all_ranks_stop_together(rank, world):
    generator = torch.Generator().manual_seed(rank)

    def endless():
        while True:
            yield torch.randn(8 + 4 * rank, 4, generator=generator)

    model = network()
    report = recalibrate_(model, endless, samples=100)
    assert report.samples == 100
    assert_identical(model)
    for method in ("one_pass", "layer_by_layer"):
        report = recalibrate_(model, endless, tolerance=0.1, method=method)
        assert report.stopped == "tolerance"
        assert report.samples > 90
        assert_identical(model)


@on_ranks(2)
def a_loader_that_raises_on_one_rank_changes_no_rank(rank, world):
    model = network()
    before = [buffer.clone() for buffer in model.buffers()]

    def batches():
        yield torch.randn(8, 4)
        if rank == 1:
            raise OSError("the disk is gone")
        for _ in range(20):
            yield torch.randn(8, 4)

    start = time.monotonic()
    error, match = (
        (OSError, "the disk is gone") if rank == 1 else (DistributedError, "process 1 of 2 failed with OSError")
    )
    with pytest.raises(error, match=match):
        recalibrate_(model, batches)
    assert time.monotonic() - start < 10
    for now, then in zip(model.buffers(), before, strict=True):
        assert torch.equal(now, then)


@on_ranks(2)
def no_rank_has_data(rank, world):
    with pytest.raises(InputError, match="batches is empty"):
        recalibrate_(network(), [])


@on_ranks(2)
def adapting_is_of_all_ranks(rank, world):
    model = network()
    adapt_(model, own_batches(rank, world), prior=20.0, method="layer_by_layer")
    assert_identical(model)
    target = model[0](data()).detach().double().numpy()
    mean = 63 * target.mean(0) / 83
    np.testing.assert_allclose(model[1].running_mean.numpy(), mean, rtol=1e-5, atol=1e-6)


def trained(rank, world, momentum=None):
    """A model whose layers keep the cumulative average of this rank's batches, one batch each: its statistics."""
    model = network()
    model[1].momentum = model[5].momentum = momentum
    given = inspect.signature(DistributedDataParallel).parameters
    setting = "forward_sync_buffers" if "forward_sync_buffers" in given else "broadcast_buffers"  # before torch 2.13
    wrapped = DistributedDataParallel(model, **{setting: False})
    part = data().split(list(SIZES[world]))[rank]
    if len(part):
        with torch.no_grad():
            wrapped.train()(part)
    return wrapped, len(part)


@on_ranks(2, 3)
def merged_ranks_have_the_statistics_of_all_values(rank, world):
    """DDP keeps those of one rank: https://github.com/pytorch/pytorch/issues/13711, .../30718."""
    wrapped, count = trained(rank, world)
    model = wrapped.module
    report = merge_ranks_(wrapped, count=count)
    assert_identical(model)
    assert_first_layer(model, data())
    assert f"Merged over {world} processes" in str(report)
    report.undo()
    again, _ = trained(rank, world)
    assert torch.equal(model[1].running_var, again.module[1].running_var)


@on_ranks(3)
def without_a_count_batches_weigh(rank, world):
    """Rank 1 has seen no batch, and does not weigh; the others have one each."""
    model = trained(rank, world)[0].module
    parts = [model[0](part).detach().double().numpy() for part in data().split(list(SIZES[world])) if len(part)]
    merge_ranks_(model)
    assert_identical(model)
    means = np.stack([part.mean(0) for part in parts])
    var = np.mean([part.var(0, ddof=1) for part in parts], axis=0) + means.var(0)
    np.testing.assert_allclose(model[1].running_mean.numpy(), means.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(model[1].running_var.numpy(), var, rtol=1e-5)


@on_ranks(2)
def nothing_to_merge(rank, world):
    with pytest.raises(InputError, match="count is 0 on every process"):
        merge_ranks_(network(), count=0)
    other = network() if rank else nn.Sequential(*network()[:5], nn.BatchNorm1d(4))
    with pytest.raises(InputError, match="not the same layer on all processes"):
        merge_ranks_(other, count=10)
    # Where no layer has counted anything, all count alike.
    model = network()
    model[1].running_mean.fill_(float(rank))
    merge_ranks_(model)
    assert model[1].running_mean.eq(0.5).all()
    assert model[1].running_var.eq(1.25).all()
