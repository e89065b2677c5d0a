"""What InstanceNorm remembers, one sample without a batch, and its lazy forms."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import steadynorm as sn
from steadynorm.errors import NonFiniteStatisticsError


@pytest.mark.parametrize("momentum", [0.1, 1.0])
def test_running_statistics_are_those_of_torch(momentum):
    ours, theirs = (
        kind(5, momentum=momentum, track_running_stats=True) for kind in (sn.InstanceNorm1d, nn.InstanceNorm1d)
    )
    for _ in range(3):
        x = torch.randn(4, 5, 9) * 3 + 2
        torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    assert ours.num_batches_tracked == 3
    x = torch.randn(4, 5, 9)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_momentum_none_is_the_plain_average():
    layer, batches = sn.InstanceNorm1d(3, momentum=None, track_running_stats=True), torch.randn(4, 2, 3, 8) + 5
    for x in batches:
        layer(x)
    torch.testing.assert_close(layer.running_mean, batches.mean((0, 1, 3)))
    torch.testing.assert_close(layer.running_var, batches.var(3).mean((0, 1)))


def test_a_masked_batch_is_remembered_as_the_average_of_its_samples():
    layer, x, lengths = sn.InstanceNorm1d(3, momentum=1.0, track_running_stats=True), torch.randn(4, 3, 8), [8, 3, 1, 0]
    padded = torch.where(torch.arange(8) < torch.tensor(lengths)[:, None, None], x, math.nan)
    layer(padded, lengths=torch.tensor(lengths))
    cut = [sample[:, :length] for sample, length in zip(x, lengths, strict=True) if length > 1]
    torch.testing.assert_close(layer.running_mean, torch.stack([t.mean(1) for t in cut]).mean(0))
    torch.testing.assert_close(layer.running_var, torch.stack([t.var(1) for t in cut]).mean(0))
    before = copy.deepcopy(layer.state_dict())
    layer(padded, lengths=torch.tensor([1, 0, 1, 1]))
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key]), "a single value says nothing about a variance"


def test_a_batch_that_is_not_finite_does_not_enter():
    x = torch.randn(2, 3, 8)
    x[1, 2, 3] = math.nan
    skips, raises, spoils = (
        sn.InstanceNorm1d(3, track_running_stats=True, guard=guard) for guard in ("skip", "raise", "propagate")
    )
    skips(x)
    assert (skips.running_mean == 0).all()
    assert skips.num_batches_tracked == 0
    with pytest.raises(NonFiniteStatisticsError, match="InstanceNorm1d got a batch whose statistics are not finite"):
        raises(x)
    spoils(x)
    assert spoils.running_mean.isnan().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_running_statistics_stay_float32(dtype):
    layer = sn.InstanceNorm1d(3, affine=True, track_running_stats=True).to(dtype)
    assert layer.weight.dtype == dtype
    y = layer(torch.randn(2, 3, 8).to(dtype))
    assert y.dtype == dtype
    assert layer.running_mean.dtype == layer.running_var.dtype == torch.float32
    plain = nn.InstanceNorm1d(3, affine=True, track_running_stats=True)
    plain.load_state_dict(layer.state_dict(), strict=True)


def test_freezing():
    layer = sn.InstanceNorm1d(3, affine=True, track_running_stats=True)
    layer(torch.randn(4, 3, 8))
    layer.freeze_()
    x, before = torch.randn(4, 3, 8), layer.running_mean.clone()
    torch.testing.assert_close(layer.train()(x), copy.deepcopy(layer).eval()(x))
    assert torch.equal(layer.running_mean, before)


@pytest.mark.parametrize(("rank", "shape"), [(1, (3, 7)), (2, (3, 4, 5)), (3, (3, 2, 4, 5))])
def test_one_sample_without_a_batch(rank, shape):
    ours, theirs = (getattr(home, f"InstanceNorm{rank}d")(3, affine=True) for home in (sn, nn))
    x, residual = torch.randn(shape), torch.randn(shape)
    torch.testing.assert_close(ours(x), theirs(x))
    mask = torch.rand(shape[1:]) > 0.3
    mask.flatten()[:2] = True
    expected = ours(x[None], residual[None], mask[None])[0]
    assert torch.equal(ours(x, residual, mask), expected)
    expected = ours(x[None], lengths=torch.tensor([2]))[0]
    assert torch.equal(ours(x, lengths=torch.tensor(2)), expected)


@pytest.mark.parametrize(("rank", "shape"), [(1, (2, 3, 7)), (2, (2, 3, 4, 5)), (3, (2, 3, 2, 4, 5))])
def test_lazy_forms_become_plain_ones(rank, shape):
    ours, theirs = (getattr(home, f"LazyInstanceNorm{rank}d")() for home in (sn, nn))
    assert isinstance(ours, type(theirs))
    x = torch.randn(shape)
    torch.testing.assert_close(ours(x), theirs(x))
    assert type(ours) is getattr(sn, f"InstanceNorm{rank}d")
    assert repr(ours) == repr(theirs)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    torch.testing.assert_close(ours.running_var, theirs.running_var)


def test_num_features_plays_no_part_where_nothing_is_per_channel():
    x = torch.randn(2, 4, 9)
    assert torch.equal(sn.InstanceNorm1d(7)(x), sn.InstanceNorm1d(4)(x))


def test_it_is_no_batch_norm():
    """Whoever looks for layers that mix samples must not find it."""
    assert not isinstance(sn.InstanceNorm2d(3), nn.modules.batchnorm._BatchNorm)
    assert isinstance(sn.InstanceNorm2d(3), nn.modules.instancenorm._InstanceNorm)
