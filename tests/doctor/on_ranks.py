"""What the doctor says on several real processes; run by tests/doctor/test_ranks.py."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from steadynorm import doctor
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
