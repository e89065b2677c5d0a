"""BatchNorm1d, 2d, 3d held to the long-hand formulas, and to torch.nn attribute by attribute."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn
from torch.func import functional_call

import steadynorm
from steadynorm.layers import BatchNorm1d, BatchNorm2d, BatchNorm3d
from tests import cases, oracles
from tests.agree import assert_agrees

LAYERS = {2: BatchNorm1d, 3: BatchNorm1d, 4: BatchNorm2d, 5: BatchNorm3d}
NAMES = ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "LazyBatchNorm1d", "LazyBatchNorm2d", "LazyBatchNorm3d")
OURS = ("activation", "guard", "single_value", "debias")
SHAPES = {"BatchNorm1d": (6, 4, 5), "BatchNorm2d": (3, 4, 5, 2), "BatchNorm3d": (3, 4, 2, 3, 2)}


def through_the_layer(
    x, running_mean, running_var, weight, bias, training, momentum, eps, *, activation=None, residual=None, mask=None
):
    """A layer as the function that `assert_agrees` calls, on the very tensors it is given."""
    layer = LAYERS[x.dim()](x.shape[1], eps, momentum, affine=weight is not None, activation=activation)
    given = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
    given = {name: tensor for name, tensor in given.items() if tensor is not None}
    return functional_call(layer.train(training), given, (x,), {"residual": residual, "mask": mask})


@pytest.mark.parametrize("case", cases.ALL, ids=str)
def test_agrees_with_the_formulas(case):
    assert_agrees(through_the_layer, oracles.batch_norm, case)


@pytest.mark.parametrize("name", NAMES)
def test_is_a_torch_layer_with_its_signature(name):
    ours, theirs = getattr(steadynorm, name), getattr(nn, name)
    assert issubclass(ours, theirs)
    assert ours.__name__ == theirs.__name__
    known = dict(inspect.signature(ours).parameters)
    extra = {option: known.pop(option) for option in OURS}
    assert all(parameter.kind is inspect.Parameter.KEYWORD_ONLY for parameter in extra.values())
    torch_parameters = inspect.signature(theirs).parameters
    assert [(p.name, p.default, p.kind) for p in known.values()] == [
        (p.name, p.default, p.kind) for p in torch_parameters.values()
    ]


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}, {"bias": False}], ids=str)
@pytest.mark.parametrize("name", ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"])
def test_starts_as_torch_does_attribute_by_attribute(name, options):
    ours, theirs = getattr(steadynorm, name)(4, **options), getattr(nn, name)(4, **options)
    for attribute, value in vars(theirs).items():
        if not attribute.startswith("_"):
            assert vars(ours)[attribute] == value, attribute
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value)
        assert ours.state_dict()[key].dtype == value.dtype
    assert repr(ours) == repr(theirs)


@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, None])
@pytest.mark.parametrize("name", SHAPES)
def test_running_statistics_follow_torch_over_batches(name, momentum):
    ours = getattr(steadynorm, name)(4, momentum=momentum, dtype=torch.float64)
    theirs = getattr(nn, name)(4, momentum=momentum, dtype=torch.float64)
    for scale in (1.0, 3.0, 0.1):
        x = scale * torch.randn(SHAPES[name], dtype=torch.float64)
        torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-12)
    assert ours.num_batches_tracked.item() == 3
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value, rtol=0, atol=1e-12)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=0, atol=1e-12)


def test_track_running_stats_turned_off_later_stops_the_update_as_in_torch():
    ours, theirs = BatchNorm1d(4), nn.BatchNorm1d(4)
    ours.track_running_stats = theirs.track_running_stats = False
    x = torch.randn(6, 4)
    torch.testing.assert_close(ours(x), theirs(x))
    assert ours.num_batches_tracked.item() == theirs.num_batches_tracked.item() == 0
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize("training", [True, False])
def test_without_running_statistics_the_batch_is_used(training):
    x = torch.randn(6, 4, 5, 5)
    ours, theirs = (kind(4, track_running_stats=False).train(training) for kind in (BatchNorm2d, nn.BatchNorm2d))
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("name", SHAPES)
def test_lazy_takes_its_size_from_the_first_input(name):
    x = torch.randn(SHAPES[name])
    lazy = getattr(steadynorm, f"Lazy{name}")(eps=1e-3, activation="relu", guard="raise")
    assert "activation='relu'" in repr(lazy)
    y = lazy(x, mask=torch.ones(x.shape[0], *x.shape[2:], dtype=torch.bool))
    assert type(lazy) is getattr(steadynorm, name)
    assert lazy.num_features == 4
    plain = getattr(steadynorm, name)(4, eps=1e-3, activation="relu", guard="raise")
    torch.testing.assert_close(y, plain(x))
    assert repr(lazy) == repr(plain)


@pytest.mark.parametrize("options", [{"affine": False, "track_running_stats": False}, {"bias": False}], ids=str)
def test_lazy_with_little_or_nothing_to_make(options):
    lazy = steadynorm.LazyBatchNorm1d(**options)
    lazy(torch.randn(6, 4))
    assert lazy.num_features == 4
    assert list(lazy.state_dict()) == list(nn.BatchNorm1d(4, **options).state_dict())


def test_lazy_filled_by_a_state_dict_still_learns_its_size():
    lazy = steadynorm.LazyBatchNorm2d()
    lazy.load_state_dict(nn.BatchNorm2d(4).state_dict())
    lazy(torch.randn(3, 4, 2, 2))
    assert (type(lazy), lazy.num_features) == (BatchNorm2d, 4)


def test_lazy_refuses_the_wrong_rank_before_it_takes_a_size():
    lazy = steadynorm.LazyBatchNorm2d()
    with pytest.raises(ValueError, match=r"expected \(N, C, H, W\), got \(32, 64\): use BatchNorm1d for \(N, C\)"):
        lazy(torch.randn(32, 64))
    assert lazy.has_uninitialized_params()


def debiased(batches, momentum):
    """What was remembered as torch does it, without the share of the initial 0 and 1: from the closed formula."""
    mean, var = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    for x in batches:
        mean = mean + momentum * (x.mean((0, 2)) - mean)
        var = var + momentum * (x.var((0, 2)) - var)
    left = (1 - momentum) ** len(batches)
    return mean / (1 - left), (var - left) / (1 - left)


@pytest.mark.parametrize("momentum", [0.1, 0.01, 0.7, 1.0])
@pytest.mark.parametrize("steps", [1, 3, 20])
def test_debiased_statistics_are_those_of_the_batches_alone(steps, momentum):
    layer = BatchNorm1d(3, momentum=momentum, dtype=torch.float64, debias=True)
    batches = [torch.randn(6, 3, 5, dtype=torch.float64) * 3 + 7 for _ in range(steps)]
    for x in batches:
        layer(x)
    mean, var = debiased(batches, momentum)
    torch.testing.assert_close(layer.running_mean, mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(layer.running_var, var, rtol=1e-12, atol=0)
    assert layer.num_batches_tracked.item() == steps
    plain = nn.BatchNorm1d(3, dtype=torch.float64).eval()
    plain.load_state_dict(layer.state_dict(), strict=True)
    torch.testing.assert_close(plain(batches[0]), layer.eval()(batches[0]))


def test_debiased_after_one_step_evaluates_as_it_trained():
    layer, plain = BatchNorm1d(3, debias=True), BatchNorm1d(3)
    x = torch.randn(4000, 3) * 5 + 20
    y, biased = layer(x), plain(x)
    torch.testing.assert_close(layer.eval()(x), y, rtol=1e-3, atol=1e-3)
    assert (plain.eval()(x) - biased).abs().max() > 1, "which is what it is for"


def test_debias_counts_only_batches_that_entered():
    layer, clean = BatchNorm1d(3, debias=True), BatchNorm1d(3, debias=True)
    for number in range(3):
        x = torch.randn(6, 3)
        if number == 0:
            layer(torch.full((6, 3), torch.nan)), layer(torch.randn(0, 3))
        layer(x), clean(x)
    for ours, expected in zip(layer.buffers(), clean.buffers(), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("momentum", [None, 0.0])
def test_debias_has_no_part_in_a_plain_average_nor_in_none(momentum):
    layer, plain = BatchNorm1d(3, momentum=momentum, debias=True), BatchNorm1d(3, momentum=momentum)
    for _ in range(3):
        x = torch.randn(6, 3)
        layer(x), plain(x)
    for ours, expected in zip(layer.buffers(), plain.buffers(), strict=True):
        assert torch.equal(ours, expected)


def test_debias_is_right_after_the_counter_was_reset_by_a_recalibration():
    layer = BatchNorm1d(3, debias=True)
    data = [torch.randn(64, 3) * 2 + 5 for _ in range(3)]
    torch.optim.swa_utils.update_bn(data, model := nn.Sequential(layer))
    torch.testing.assert_close(layer.running_mean, torch.cat(data).mean(0))
    model(data[0])
    torch.testing.assert_close(layer.running_mean, torch.full((3,), 5.0), rtol=0, atol=0.5)
