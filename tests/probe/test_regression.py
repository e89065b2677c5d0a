"""How far a norm at the end lets the output vary."""

import pytest
import torch
from torch import nn

from steadynorm import probe
from steadynorm.recipe import call


def facts(model, target, x=None):
    x = torch.randn(64, 8) if x is None else x
    return probe.observe(model, [(x, target)], forward=call, parts=("state", "forward")).regression


def test_no_output_of_this_deviation_misses_less():
    """The bound against the best of many outputs: targets themselves, at the deviation of the output."""
    target = 50 * torch.randn(64, 1)
    found = facts(nn.Sequential(nn.Linear(8, 1), nn.BatchNorm1d(1)), target)
    assert (found.norm, found.reach) == ("1", 1.0)
    best = (target - target.mean()) / target.std(correction=0) + target.mean()
    missed = (best - target).square().mean() / target.var(correction=0)
    assert found.out_of_reach == pytest.approx(float(missed), rel=1e-4)


def test_a_weight_that_has_grown_reaches_it():
    model = nn.Sequential(nn.Linear(8, 1), nn.BatchNorm1d(1))
    nn.init.constant_(model[1].weight, -40.0)
    assert facts(model, 40 * torch.randn(64, 1)).out_of_reach < 0.1


@pytest.mark.parametrize(
    ("last", "target"),
    [
        (nn.Identity(), torch.randn(64, 4)),  # ends in no norm
        (nn.BatchNorm1d(4), torch.zeros(64, dtype=torch.long)),  # classes
        (nn.BatchNorm1d(4), torch.randn(64, 3)),  # something else
        (nn.Sequential(nn.BatchNorm1d(4), nn.ReLU()), torch.randn(64, 4)),
    ],
)
def test_nothing_is_said_where_there_is_no_such_norm_or_target(last, target):
    assert facts(nn.Sequential(nn.Linear(8, 4), last), target) is None


def test_a_norm_inside_a_container_is_found():
    assert facts(nn.Sequential(nn.Linear(8, 4), nn.Sequential(nn.LayerNorm(4))), torch.randn(64, 4)).norm == "1.0"
