"""What the doctor says on several real processes; run by tests/distributed/test_on_ranks.py."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from steadynorm import SyncBatchNorm, doctor, training
from steadynorm.errors import InputError
from tests.doctor.networks import convolutional, mlp
from tests.processes import on_ranks


def findings(model, size):
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(size, 1, 8, 8, generator=generator) for _ in range(64 // size)]
    result = doctor.examine(model, batches, train_batches=batches, select=["SN601", "SN101", "SN203"])
    return [(f.where, f.severity) for f in result.findings if f.code == "SN601"]


@on_ranks(2)
def check_few_samples_on_each_process(rank, world):
    assert findings(mlp(), 4) == [("2", "warning")]


@on_ranks(2)
def check_enough_samples_on_each_process(rank, world):
    assert findings(mlp(), 32) == []


@on_ranks(2)
def check_statistics_that_are_kept_apart(rank, world):
    apart = DistributedDataParallel(mlp(), forward_sync_buffers=False)
    assert findings(apart, 32) == [("", "note")]
    assert findings(DistributedDataParallel(mlp()), 32) == []


@on_ranks(2)
def check_a_layer_that_was_made_after_the_conversion(rank, world):
    model = nn.SyncBatchNorm.convert_sync_batchnorm(convolutional(nn.BatchNorm2d))
    model[4] = nn.BatchNorm2d(16)
    model.eval()
    batches = [torch.randn(8, 1, 8, 8)]
    found = doctor.examine(model, batches, select=["SN601"]).findings
    assert [(f.where, f.severity) for f in found] == [("4", "warning")]


def apart(model, **options):
    batches = [torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    found = doctor.examine(model, batches, select=["SN601"], across_ranks=True, **options).findings
    return [(f.where, f.severity) for f in found]


@on_ranks(2)
def check_statistics_that_have_parted_are_found_on_every_process(rank, world):
    model = convolutional(nn.BatchNorm2d)
    assert apart(model) == []
    if rank == 1:
        model[4].running_mean += 0.5 * model[4].running_var.sqrt()
        model[1].running_mean += 0.2
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert apart(model) == [("4", "warning")]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    training.merge_ranks_(model)
    assert apart(model) == []


@on_ranks(2)
def check_statistics_that_are_broken_alike_have_not_parted(rank, world):
    model = convolutional(nn.BatchNorm2d)
    model[1].running_mean[2] = torch.nan
    assert apart(model) == []
    if rank == 1:
        model[1].running_mean[3] = torch.nan
    assert apart(model) == [("1", "warning")]


@on_ranks(2)
def check_other_layers_on_another_process_are_refused(rank, world):
    with pytest.raises(InputError, match="other norm layers on other processes"):
        apart(convolutional(nn.BatchNorm2d) if rank else mlp())


def misused(model, **options):
    found = doctor.examine(model, select=["SN602"], **options).findings
    return [(f.where, f.severity, f.confidence) for f in found]


@on_ranks(2)
def check_a_norm_that_was_made_after_the_wrapping_learns_on_its_own(rank, world):
    wrapped = DistributedDataParallel(convolutional(nn.BatchNorm2d))
    assert misused(wrapped) == []
    # Its parameters stay the same tensors, and so do the gradients that are averaged.
    assert misused(nn.SyncBatchNorm.convert_sync_batchnorm(wrapped)) == []
    # Without the option the wrapper waits for the old parameters, and stops in the second step.
    wrapped = DistributedDataParallel(convolutional(nn.BatchNorm2d), find_unused_parameters=True)
    wrapped.module[4] = SyncBatchNorm(16)
    assert misused(wrapped) == [("module.4", "error", "proved")]
    generator = torch.Generator().manual_seed(rank)
    x, cotangent = torch.randn(8, 1, 8, 8, generator=generator), torch.randn(8, 10, generator=generator)
    wrapped(x).backward(cotangent)
    for name, is_averaged in (("1", True), ("4", False)):
        mine = wrapped.module.get_submodule(name).weight.grad
        first = mine.clone()
        dist.broadcast(first, 0)
        assert torch.equal(mine, first) == (is_averaged or rank == 0)


@on_ranks(2)
def check_a_norm_that_a_wrapper_was_told_to_ignore_is_meant(rank, world):
    net = convolutional(nn.BatchNorm2d)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(net, ["4.weight", "4.bias"])
    assert misused(DistributedDataParallel(net)) == []


@on_ranks(2)
def check_a_group_of_one(rank, world):
    alone = [dist.new_group([each]) for each in range(world)][rank]

    def net(group):
        return convolutional(lambda width: SyncBatchNorm(width, process_group=group))

    assert misused(DistributedDataParallel(net(None))) == []
    assert misused(DistributedDataParallel(net(alone))) == [
        ("module.1", "warning", "proved"),
        ("module.4", "warning", "proved"),
    ]
    assert misused(net(alone)) == [("1", "warning", "heuristic"), ("4", "warning", "heuristic")]
    # Each process trains a model of its own.
    assert misused(DistributedDataParallel(net(alone), process_group=alone)) == []


@on_ranks(4)
def check_a_group_larger_than_the_wrappers(rank, world):
    pair = [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2]
    wide = DistributedDataParallel(convolutional(SyncBatchNorm), process_group=pair)
    found = doctor.examine(wide, select=["SN602"]).findings
    assert [(f.where, f.severity) for f in found] == [("module.1", "warning"), ("module.4", "warning")]
    assert ("ranks 2, 3" if rank < 2 else "ranks 0, 1") in found[0].message
    fitting = convolutional(lambda width: SyncBatchNorm(width, process_group=pair))
    assert misused(DistributedDataParallel(fitting, process_group=pair)) == []
    # Parts of the batch that are synchronised, as by machine, are meant.
    assert misused(DistributedDataParallel(fitting)) == []


@on_ranks(2)
def check_a_conversion_on_one_process_only_is_seen_on_every_one(rank, world):
    def found(model):
        return misused(model, across_ranks=True)

    model = convolutional(SyncBatchNorm if rank == 0 else nn.BatchNorm2d)
    assert found(model) == [("1", "error", "proved"), ("4", "error", "proved")]
    assert found(convolutional(SyncBatchNorm)) == []
    assert found(convolutional(lambda width: nn.GroupNorm(4, width))) == []
