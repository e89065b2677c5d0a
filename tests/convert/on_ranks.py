"""Conversions on several processes, for tests/processes.py."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from steadynorm.convert import convert_
from steadynorm.errors import InputError
from tests.processes import on_ranks


@on_ranks(2)
def weights_are_not_set_by_the_batches_of_one_process(rank, world):
    model, x = nn.Sequential(nn.BatchNorm2d(4)), torch.randn(6, 4, 3, 3) + rank
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=r"there are 2: .*method=None"):
        convert_(model, "group", batches=[x])
    assert type(model[0]) is nn.BatchNorm2d
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert convert_(model, "group", batches=[x], method=None).difference.samples == 6
