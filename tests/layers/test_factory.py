"""norm_layer: what it gives, where it goes, what it refuses."""

import pickle

import pytest
import torch
from torch import nn

import steadynorm
from steadynorm.errors import InputError
from steadynorm.layers import factory

NEEDS = {"ghost": {"ghost_size": 2}}


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("name", factory.NAMES)
def test_every_name_gives_a_layer_that_runs(name, dims):
    make = pickle.loads(pickle.dumps(steadynorm.norm_layer(name, dims=dims, **NEEDS.get(name, {}))))
    layer = make(12)
    x = torch.randn(4, 12, *(5,) * dims)
    if name in ("layer", "rms"):
        x = x.movedim(1, -1)
    y = layer(x)
    assert y.shape == x.shape
    assert torch.equal(y, x) == (name in ("none",)) or name == "frozen"


@pytest.mark.parametrize(
    ("name", "dims", "cls"),
    [
        ("batch", 1, steadynorm.BatchNorm1d),
        ("batch", 2, nn.BatchNorm2d),
        ("batch", 3, steadynorm.BatchNorm3d),
        ("instance", 2, nn.InstanceNorm2d),
        ("group", 2, nn.GroupNorm),
        ("layer", 2, nn.LayerNorm),
        ("rms", 2, nn.RMSNorm),
    ],
)
def test_classes(name, dims, cls):
    assert isinstance(steadynorm.norm_layer(name, dims=dims)(8), cls)


def test_settings_reach_the_layer_from_both_calls():
    layer = steadynorm.norm_layer("batch", momentum=None, activation="relu")(6, eps=1e-3)
    assert (layer.momentum, layer.activation, layer.eps) == (None, "relu", 1e-3)


@pytest.mark.parametrize(
    ("channels", "most", "groups"),
    [(64, 32, 16), (256, 32, 32), (24, 32, 6), (7, 32, 1), (40, 8, 8), (2, 32, 1), (96, 5, 4)],
)
def test_groups_divide_any_number_of_channels(channels, most, groups):
    layer = steadynorm.norm_layer("group", groups=most)(channels)
    assert layer.num_groups == groups
    assert channels % groups == 0


def test_a_network_that_takes_a_norm_layer():
    """As torchvision and timm call it: positional channels, sometimes eps, device and dtype."""

    class Block(nn.Module):
        def __init__(self, norm_layer):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 12, 3), norm_layer(12, eps=1e-6, device="cpu", dtype=torch.float64)

        def forward(self, x):
            return self.norm(self.conv(x).double())

    for name in ("batch", "renorm", "instance", "group", "channel_layer"):
        block = Block(steadynorm.norm_layer(name))
        assert block(torch.randn(2, 3, 8, 8)).dtype == torch.float64
        assert block.norm.eps == 1e-6


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: steadynorm.norm_layer("bach"), "got 'bach', expected one of batch, ghost"),
        (lambda: steadynorm.norm_layer("batch", dims=4), "dims=4, expected 1, 2 or 3"),
        (lambda: steadynorm.norm_layer("batch", momentun=0.1), "'momentun', expected settings among .*momentum"),
        (lambda: steadynorm.norm_layer("batch", groups=4), "'groups', expected settings among"),
        (lambda: steadynorm.norm_layer("group", num_groups=4), "'num_groups', expected settings among .*groups"),
        (lambda: steadynorm.norm_layer("layer", momentum=0.1), "'momentum', expected settings among .*eps"),
        (lambda: steadynorm.norm_layer("group", groups=0), "groups=0, expected a positive"),
    ],
)
def test_misuse_is_one_sentence_when_the_factory_is_made(call, words):
    with pytest.raises(InputError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)
