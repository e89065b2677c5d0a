"""What the normalizations within a sample say about what they cannot take: one sentence, and nothing changed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import steadynorm as sn
from steadynorm import functional as S
from steadynorm.errors import DegenerateStatisticsError, InputError

X = torch.ones(3, 6, 4, 5)
VALUE = "whose variance is zero and whose output would be the bias"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: sn.GroupNorm(4, 6),
            "GroupNorm expected a number of groups that divides 6 channels, got 4: take one of 1, 2, 3, 6.",
        ),
        (lambda: sn.GroupNorm(0, 6), "GroupNorm expected a number of groups that divides 6 channels, got 0"),
        (lambda: sn.GroupNorm(2, 6, eps=-1e-5), "GroupNorm: eps must not be negative, got -1e-05."),
        (lambda: sn.GroupNorm(2, 6, activation="tanh"), "GroupNorm: activation must be None or one of relu"),
        (lambda: sn.LayerNorm(6, eps=float("nan")), "LayerNorm: eps must not be negative, got nan."),
        (lambda: sn.RMSNorm(6, eps=-1.0), "RMSNorm: eps must not be negative, got -1.0."),
        (lambda: sn.RMSNorm(6, convention="qwen"), "convention must be one of torch, llama, gemma, t5, got 'qwen'."),
        (lambda: sn.InstanceNorm2d(6, eps=-1.0), "InstanceNorm2d: eps must be positive, got -1.0."),
        (lambda: sn.InstanceNorm2d(6, momentum=1.5), "InstanceNorm2d: momentum must be in [0, 1]"),
        (
            lambda: sn.LayerNorm(1),
            f"LayerNorm expected more than one value per statistic, got a normalized shape of one value, {VALUE}",
        ),
    ],
)
def test_construction(make, message):
    with pytest.raises(InputError) as error:
        make()
    assert str(error.value).startswith(message) or message in str(error.value)


@pytest.mark.parametrize(
    ("layer", "x", "message"),
    [
        (sn.LayerNorm(7), X, "LayerNorm at 0 expected last dimensions (7,), got shape (3, 6, 4, 5): construct it"),
        (sn.LayerNorm(6), X, "for channels in dimension 1 use ChannelLayerNorm, or move them with x.movedim(1, -1)."),
        (sn.LayerNorm((4, 6)), X, "expected last dimensions (4, 6), got shape (3, 6, 4, 5): construct it with"),
        (sn.RMSNorm(4), X, "RMSNorm at 0 expected last dimensions (4,), got shape (3, 6, 4, 5): construct it with"),
        (sn.RMSNorm((2, 5)), X[0, 0, 0], "expected last dimensions (2, 5), got shape (5,)"),
        (sn.LayerNorm(5), X.int(), "LayerNorm at 0 expected a floating-point tensor, got torch.int32: convert it"),
        (sn.GroupNorm(2, 4), X, "GroupNorm at 0 expected 4 channels in dimension 1, got shape (3, 6, 4, 5)"),
        (sn.GroupNorm(2, 6), X.movedim(1, -1), "got shape (3, 4, 5, 6): move them with x.movedim(-1, 1)."),
        (sn.GroupNorm(2, 6), X[0, 0, 0], "GroupNorm at 0 expected (N, C, *), got (5,): one sample needs"),
        (sn.ChannelLayerNorm(5), X, "expected 5 channels in dimension 1, got shape (3, 6, 4, 5): move them with"),
        (sn.InstanceNorm1d(6), X, "InstanceNorm1d at 0 expected (N, C, L) or (C, L), got (3, 6, 4, 5): use"),
        (sn.InstanceNorm2d(6), X[0, 0], "expected (N, C, H, W) or (C, H, W), got (4, 5): reshape it."),
        (sn.InstanceNorm2d(5, affine=True), X, "InstanceNorm2d at 0 expected 5 channels in dimension 1, got shape"),
    ],
)  # fmt: skip
def test_the_input(layer, x, message):
    with pytest.raises(InputError) as error:
        nn.Sequential(layer)(x)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("layer", "extras", "message"),
    [
        (sn.LayerNorm(5), {"addend": X[:1]}, "expected addend in the shape of x, (3, 6, 4, 5), got (1, 6, 4, 5)"),
        (sn.RMSNorm(5), {"addend": X[0]}, "expected addend in the shape of x, (3, 6, 4, 5), got (6, 4, 5)"),
        (sn.GroupNorm(2, 6), {"residual": X[:, :1]}, "expected residual in the shape of x, (3, 6, 4, 5), got"),
        (sn.GroupNorm(2, 6), {"mask": torch.ones(3, 4).bool()}, "expected a mask (3, 4, 5) of torch.bool, True"),
        (sn.GroupNorm(2, 6), {"mask": torch.ones(3, 4, 5)}, "got (3, 4, 5) of torch.float32."),
        (sn.GroupNorm(2, 6), {"lengths": torch.ones(2).long()}, "expected lengths (3,) of an integer dtype, got (2,)"),
        (sn.InstanceNorm2d(6), {"mask": torch.ones(3, 6, 4, 5).bool()}, "expected a mask (3, 4, 5) of torch.bool"),
        (
            sn.InstanceNorm2d(6),
            {"mask": torch.ones(3, 4, 5).bool(), "lengths": torch.ones(3).long()},
            "got both mask and lengths, expected one",
        ),
    ],
)  # fmt: skip
def test_what_comes_with_the_input(layer, extras, message):
    with pytest.raises(InputError) as error:
        layer(X, **extras)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (sn.GroupNorm(6, 6), (3, 6)),
        (sn.GroupNorm(6, 6), (3, 6, 1, 1)),
        (sn.ChannelLayerNorm, ()),
        (sn.InstanceNorm1d(6), (3, 6, 1)),
        (sn.InstanceNorm2d(6, track_running_stats=True), (3, 6, 1, 1)),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_one_value_behind_a_statistic(layer, shape, training):
    if not shape:
        with pytest.raises(DegenerateStatisticsError):
            layer(1)
        return
    layer.train(training)
    if layer.__class__.__name__ == "InstanceNorm2d" and not training:
        assert layer(torch.ones(shape)).shape == shape, "by the running statistics"
        return
    with pytest.raises(DegenerateStatisticsError, match=r"expected more than one (value|position)"):
        layer(torch.ones(shape))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: S.group_norm(X, 4), "group_norm expected a number of groups that divides 6 channels, got 4"),
        (lambda: S.group_norm(X, 2, torch.ones(4)), "group_norm expected a weight of shape (6,), got (4,)."),
        (lambda: S.group_norm(X, 2, eps=-1), "group_norm: eps must not be negative, got -1."),
        (lambda: S.group_norm(X[..., 0, 0], 6), "group_norm expected more than one value per sample and group"),
        (lambda: S.group_norm(X, 2, activation="tanh"), "group_norm: activation must be None or one of"),
        (lambda: S.group_norm(X, 2, mask=X), "group_norm expected a mask (3, 4, 5) of torch.bool"),
        (lambda: S.layer_norm(X, 6), "layer_norm expected last dimensions (6,), got shape (3, 6, 4, 5)"),
        (lambda: S.layer_norm(X, ()), "layer_norm expected a normalized_shape of at least one dimension, got none."),
        (lambda: S.layer_norm(X, 5, torch.ones(5), torch.ones(4)), "layer_norm expected a bias of shape (5,), got"),
        (lambda: S.layer_norm(X[..., :1], 1), "layer_norm expected more than one value per statistic"),
        (lambda: S.rms_norm(X, (5, 5)), "rms_norm expected last dimensions (5, 5), got shape (3, 6, 4, 5)"),
        (lambda: S.rms_norm(X, 5, convention="x"), "rms_norm: convention must be one of"),
        (lambda: S.instance_norm(X, use_input_stats=False), "instance_norm got no running statistics, expected both"),
        (lambda: S.instance_norm(X, bias=torch.ones(2)), "instance_norm expected a bias of shape (6,), got (2,)."),
        (lambda: S.instance_norm(X[..., :1, :1]), "instance_norm expected more than one value per sample and group"),
    ],
)  # fmt: skip
def test_functions(call, message):
    with pytest.raises(InputError) as error:
        call()
    assert str(error.value).startswith(message)


def test_a_refused_call_changes_nothing():
    layer = sn.InstanceNorm1d(6, track_running_stats=True)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    for bad in (X, torch.ones(3, 6, 1), torch.ones(3, 5, 4)):
        with pytest.raises(InputError):
            layer(bad)
    with pytest.raises(InputError):
        layer(torch.randn(3, 6, 4), mask=torch.ones(3, 5).bool())
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key])
