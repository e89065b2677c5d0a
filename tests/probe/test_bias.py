import pytest
import torch
from torch import nn

from steadynorm.probe import bias, state
from steadynorm.probe.trace import trace
from steadynorm.recipe import call

X = torch.randn(16, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def dead(model, x=X):
    norms = state.look(model)
    calls, *_ = trace(model, x, call)
    return [(found.producer, found.norm) for found in bias.dead(model, x, call, norms, calls)]


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d(4), nn.InstanceNorm2d(4), nn.BatchNorm2d(4, track_running_stats=False)]
)
def test_a_bias_before_a_norm_over_the_channel_is_dead(norm):
    assert dead(nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU())) == [("0", "1")]


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 4), nn.LayerNorm([4, 4, 4]), nn.Identity()])
def test_a_norm_over_several_channels_does_not_cancel_it(norm):
    assert dead(nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU())) == []


def test_transposed_and_dense_layers():
    model = nn.Sequential(
        nn.ConvTranspose2d(3, 4, 2), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(196, 5), nn.BatchNorm1d(5)
    )
    assert dead(model) == [("0", "1"), ("3", "4")]


def test_no_bias_nothing_dead():
    assert dead(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))) == []


def test_something_in_between_keeps_it_alive():
    for between in (nn.ReLU(), nn.ReLU(inplace=True), nn.Dropout(), nn.MaxPool2d(2)):
        assert dead(nn.Sequential(nn.Conv2d(3, 4, 3), between, nn.BatchNorm2d(4))) == []


class ReadTwice(nn.Module):
    """The output of the convolution also goes around the norm."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) + y


def test_a_bias_that_something_else_reads_is_alive():
    assert dead(ReadTwice()) == []


class UsedTwice(ReadTwice):
    def forward(self, x):
        return self.norm(self.conv(x)) + self.conv(x)


def test_a_layer_that_feeds_the_norm_only_sometimes_is_left_alone():
    assert dead(UsedTwice()) == []


def test_a_bias_before_a_frozen_norm_trains_and_is_alive():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model.train()
    model[1].eval()
    assert dead(model) == []


def test_over_another_axis_it_is_alive():
    class Swapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.dense, self.norm = nn.Linear(6, 3), nn.BatchNorm1d(3)

        def forward(self, x):
            return self.norm(self.dense(x))

    # (N, T, F) into a norm that takes T for its channels; as many steps as features, so that nothing else tells.
    assert dead(Swapped(), torch.randn(16, 3, 6)) == []


def test_dead_ones_are_told_from_a_living_one_beside_them():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.twice = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)), ReadTwice()

        def forward(self, x):
            return self.twice(self.block(x))

    assert dead(Both()) == [("block.0", "block.1")]


def test_values_per_statistic_are_those_of_the_smallest_call():
    class Levels(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x):
            return self.norm(x).mean() + self.norm(x[..., :2, :2]).mean()

    model = Levels()
    norms = state.look(model)
    calls, *_ = trace(model, X, call)
    assert bias.values(calls, norms, 16)["norm"].per_sample == 4
