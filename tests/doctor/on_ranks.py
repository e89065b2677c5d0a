"""What the doctor says on several real processes; run by tests/distributed/test_on_ranks.py."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from steadynorm import doctor, training
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
