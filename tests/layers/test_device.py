"""A training step asks its device nothing: what is brought to the host, or sent from it, is a wait on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree

import steadynorm

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm2d": lambda: steadynorm.BatchNorm2d(8, activation="relu"),
    "cumulative": lambda: steadynorm.BatchNorm2d(8, momentum=None),
    "debiased": lambda: steadynorm.BatchNorm2d(8, debias=True),
    "evaluation": lambda: steadynorm.BatchNorm2d(8).eval(),
    "frozen": lambda: steadynorm.BatchNorm2d(8).freeze_(),
    "FrozenBatchNorm2d": lambda: steadynorm.FrozenBatchNorm2d(8),
    "ghost": lambda: steadynorm.GhostBatchNorm2d(8, ghost_size=3),
    "renorm": lambda: steadynorm.BatchRenorm2d(8),
    "renorm, a limit on the device": lambda: steadynorm.BatchRenorm2d(8, limits=lambda batches: (1 + batches / 9, 5.0)),
    "layer": lambda: steadynorm.LayerNorm(4),
    "rms": lambda: steadynorm.RMSNorm(4),
    "channels": lambda: steadynorm.ChannelLayerNorm(8),
    "group": lambda: steadynorm.GroupNorm(2, 8),
    "instance": lambda: steadynorm.InstanceNorm2d(8, track_running_stats=True),
}
MASKED = ("BatchNorm2d", "cumulative", "debiased", "evaluation", "frozen", "renorm", "group", "instance")
BRINGS = {"item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "cpu", "nonzero", "equal"}
SENDS = {"tensor", "as_tensor", "new_tensor", "asarray"}


class Watch(TorchFunctionMode):
    """Fails where a value of the device is looked at, or a number becomes a tensor of the device by being sent there.

    The device here is `meta`: tensors without memory, which no program can look into.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        given = [t.device for t in _pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        found = function(*args, **(kwargs or {}))
        assert not (name in BRINGS and given), f"{name} brings a value to the host"
        on_device = isinstance(found, Tensor) and found.device.type == "meta"
        is_sent = name in SENDS and not any(
            isinstance(a, Tensor) and a.is_meta for a in args[:1] if name != "new_tensor"
        )
        assert not (is_sent and on_device), f"{name} sends a value to the device"
        was_here = name in ("to", "copy_") and any(device.type == "cpu" for device in given)
        assert not (was_here and on_device), f"{name} sends a tensor to the device"
        return found


def step(layer: nn.Module, **extras: Tensor) -> None:
    x = torch.randn(8, 8, 4, 4, device="meta", requires_grad=True)
    with Watch():
        y = layer(x, **extras)
        y.backward(torch.ones_like(y))


@pytest.mark.parametrize("name", LAYERS)
def test_a_step_waits_for_nothing(name):
    step(LAYERS[name]().to("meta"))


@pytest.mark.parametrize("name", MASKED)
def test_a_masked_step_waits_for_nothing(name):
    step(LAYERS[name]().to("meta"), mask=torch.ones(8, 4, 4, dtype=torch.bool, device="meta"))


def test_parts_of_a_batch_wait_for_nothing():
    x = torch.randn(8, 8, 4, 4, device="meta", requires_grad=True)
    parts = [steadynorm.functional.Part(x[:3]), steadynorm.functional.Part(x[3:])]
    with Watch():
        ys, _ = steadynorm.functional.normalize_together(parts)
        torch.cat(ys).backward(torch.ones_like(x))


@pytest.mark.parametrize(
    "asks",
    [
        lambda t: torch.as_tensor(5, device=t.device),
        lambda t: t.new_tensor(5),
        lambda t: torch.tensor([1, 2], device=t.device),
        lambda t: torch.ones(2).to(t.device),
        lambda t: t.copy_(torch.ones(2)),
    ],
)
def test_the_watch_sees_what_is_sent(asks):
    with Watch(), pytest.raises(AssertionError, match="sends"):
        asks(torch.ones(2, device="meta"))


def test_the_watch_sees_what_is_asked():
    with Watch(), pytest.raises(AssertionError, match="item brings"):
        torch.ones(()).item()
