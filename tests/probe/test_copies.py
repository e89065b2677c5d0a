"""Copies of a network whose statistics are not those of the original."""

import copy

import pytest
import torch
from torch import nn

from steadynorm import doctor
from steadynorm.probe.copies import stale
from steadynorm.recipes import digits
from tests.doctor.networks import convolutional, mlp


def learned():
    torch.manual_seed(0)
    model = convolutional(nn.BatchNorm2d)
    nn.init.uniform_(model[1].bias)
    for x, _ in digits.batches("train", 64, 0):
        model.train()(3 * x)
    return model.eval()


def reset(model):
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.reset_running_stats()
    return model


def lagging(model):
    """A hundredth of its length away, with statistics that lag as well."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.99)
        model[1].running_mean.mul_(1.5)
    return model


def test_statistics_that_were_not_copied_are_found_by_their_layer():
    original = learned()
    found = stale(reset(copy.deepcopy(original)), [mlp(), original])
    assert set(found) == {"1", "4"}
    assert all(one.is_initial and one.divergence > 0.01 for one in found.values())
    found = stale(reset(lagging(copy.deepcopy(original))), [original])
    assert set(found) == {"1", "4"}


def test_other_statistics_under_the_same_parameters_are_found():
    original = learned()
    twin = copy.deepcopy(original)
    twin[4].running_var.mul_(2)
    (path,) = found = stale(twin, [original])
    assert (path, found[path].is_initial) == ("4", False)


@pytest.mark.parametrize("change", [copy.deepcopy, lambda m: lagging(copy.deepcopy(m)), lambda m: m])
def test_a_copy_with_its_buffers_and_one_that_lags_are_let_be(change):
    original = learned()
    assert stale(change(original), [original]) == {}


def test_a_copy_of_the_start_follows_nothing():
    torch.manual_seed(0)
    start = convolutional(nn.BatchNorm2d)
    original = lagging(copy.deepcopy(start))
    nn.init.constant_(original[1].bias, 0.01)
    assert stale(start, [original]) == {}


def test_a_network_of_its_own_and_one_that_shares_parameters_are_let_be():
    original = learned()
    torch.manual_seed(1)
    assert stale(convolutional(nn.BatchNorm2d), [original]) == {}
    sharing = reset(copy.deepcopy(original))
    sharing[0].weight = original[0].weight
    assert stale(sharing, [original]) == {}


def test_a_copy_inside_a_wrapper_is_found_at_its_path_in_the_wrapper():
    class Average(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, x):
            return self.module(x)

    original = learned()
    average = Average(reset(copy.deepcopy(original))).requires_grad_(False).eval()

    def loss(output, batch):
        return (output - average(batch)).square().mean()

    batches = [x for x, _ in digits.batches("test", 32, 0)]
    found = doctor.examine(original, batches, loss=loss, select=["SN204"]).findings
    assert [f.where for f in found] == ["Average.module.1", "Average.module.4"]
