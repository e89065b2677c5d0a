"""state_dict to and from torch.nn, and what casting, moving, sharing and copying do to parameters and buffers."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import steadynorm
from steadynorm.layers import BatchNorm1d, BatchNorm2d, LazyBatchNorm2d

NAMES = ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d")
OPTIONS = [{}, {"affine": False}, {"track_running_stats": False}, {"bias": False}]
HALF_TYPES = [torch.bfloat16, torch.float16]


def trained(layer: nn.Module) -> nn.Module:
    for tensor in layer.state_dict().values():
        tensor.copy_(torch.rand(tensor.shape) + 3)
    return layer


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_state_dicts_go_both_ways_strictly(name, options):
    ours, theirs = getattr(steadynorm, name)(5, **options), getattr(nn, name)(5, **options)
    theirs.load_state_dict(trained(ours).state_dict(), strict=True)
    again = getattr(steadynorm, name)(5, **options)
    again.load_state_dict(theirs.state_dict(), strict=True)
    for key, value in ours.state_dict().items():
        assert torch.equal(again.state_dict()[key], value)
    assert repr(again) == repr(theirs)


def test_set_switches_are_no_hindrance_either():
    theirs = nn.BatchNorm1d(5)
    theirs.load_state_dict(trained(BatchNorm1d(5)).freeze_().state_dict(), strict=True)
    assert theirs.running_mean.min() >= 3


def test_safetensors_carry_the_tensors(tmp_path):
    ours = trained(BatchNorm1d(5)).freeze_()
    save_file(ours.state_dict(), tmp_path / "norm.safetensors")
    theirs, again = nn.BatchNorm1d(5), BatchNorm1d(5)
    for layer in (theirs, again):
        layer.load_state_dict(load_file(tmp_path / "norm.safetensors"), strict=True)
    assert torch.equal(again.running_var, ours.running_var)


def test_a_state_dict_from_before_num_batches_tracked_loads():
    old = {key: value for key, value in nn.BatchNorm1d(5).state_dict().items() if key != "num_batches_tracked"}
    ours = BatchNorm1d(5)
    ours.load_state_dict(old, strict=True)
    assert ours.num_batches_tracked.item() == 0


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
def test_running_statistics_stay_float32_when_the_module_does_not(dtype):
    layer = trained(BatchNorm1d(5))
    mean = layer.running_mean
    exact = mean.clone()
    layer.to(dtype)
    assert layer.weight.dtype == layer.bias.dtype == dtype
    assert layer.running_mean is mean, "neither copied nor rounded"
    assert torch.equal(layer.running_mean, exact)
    assert layer.running_var.dtype == torch.float32
    assert nn.Sequential(layer).to(dtype)[0].running_mean.dtype == torch.float32
    y = layer(torch.randn(8, 5, dtype=dtype))
    assert y.dtype == dtype


@pytest.mark.parametrize("cast", ["bfloat16", "half"])
def test_the_named_casts_do_the_same(cast):
    layer = getattr(BatchNorm1d(5), cast)()
    assert layer.running_mean.dtype == torch.float32
    assert layer.num_batches_tracked.dtype == torch.int64


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
def test_constructed_in_half_precision(dtype):
    for layer in (BatchNorm1d(5, dtype=dtype), LazyBatchNorm2d(dtype=dtype)):
        assert layer.weight.dtype == dtype
        assert layer.running_mean.dtype == layer.running_var.dtype == torch.float32


def test_a_bfloat16_layer_still_learns_its_mean():
    """torch.nn's own running mean sticks at 6.69 for a true mean of 10: its step is below the rounding."""
    layer = BatchNorm1d(2, momentum=0.01).bfloat16()
    for _ in range(1000):
        layer(torch.randn(32, 2).add(10).bfloat16())
    torch.testing.assert_close(layer.running_mean, torch.full((2,), 10.0), rtol=0, atol=0.1)


def test_double_is_double_and_comes_back_as_float():
    layer = BatchNorm1d(5).double()
    assert layer.running_mean.dtype == torch.float64
    assert layer.half().running_mean.dtype == torch.float32
    assert BatchNorm1d(5, dtype=torch.float64).running_var.dtype == torch.float64


@pytest.mark.parametrize("assign", [False, True])
def test_a_half_precision_checkpoint_keeps_the_buffers_float32(assign):
    checkpoint = trained(nn.BatchNorm1d(5).bfloat16()).state_dict()
    layer = BatchNorm1d(5)
    layer.load_state_dict(checkpoint, assign=assign)
    assert layer.running_mean.dtype == layer.running_var.dtype == torch.float32
    torch.testing.assert_close(layer.running_mean, checkpoint["running_mean"].float())


def test_meta_and_back():
    layer = BatchNorm2d(5, device="meta", dtype=torch.bfloat16)
    assert layer.running_mean.is_meta
    layer.to_empty(device="cpu").reset_parameters()
    assert layer.running_mean.dtype == torch.float32
    assert layer.weight.dtype == torch.bfloat16
    assert torch.equal(layer.running_var, torch.ones(5))
    moved = trained(BatchNorm2d(5)).to("meta", torch.bfloat16)
    assert moved.running_mean.is_meta
    assert moved.running_mean.dtype == torch.float32


def test_shared_memory():
    layer = BatchNorm2d(5).share_memory()
    assert all(tensor.is_shared() for tensor in layer.state_dict().values())


@pytest.mark.parametrize("way", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_keep_every_setting(way):
    layer = trained(BatchNorm1d(5, activation="gelu", guard="raise", single_value="running").bfloat16())
    back = way(layer)
    assert repr(back) == repr(layer)
    assert back.running_mean.dtype == torch.float32
    for key, value in layer.state_dict().items():
        assert torch.equal(back.state_dict()[key], value)
    back(torch.randn(4, 5).bfloat16())
    assert not torch.equal(back.running_mean, layer.running_mean)


def test_a_torch_layer_can_become_ours_in_place():
    layer = trained(nn.BatchNorm2d(3))
    layer.__class__ = BatchNorm2d
    assert layer.guard == "skip"
    layer(torch.full((2, 3, 2, 2), float("nan")))
    assert torch.isfinite(layer.running_mean).all()
