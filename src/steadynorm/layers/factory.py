"""norm_layer: a normalization by name, for whatever takes `norm_layer=`."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from steadynorm.errors import InputError
from steadynorm.layers.batch import BatchNorm1d, BatchNorm2d, BatchNorm3d
from steadynorm.layers.frozen import FrozenBatchNorm1d, FrozenBatchNorm2d, FrozenBatchNorm3d
from steadynorm.layers.ghost import GhostBatchNorm1d, GhostBatchNorm2d, GhostBatchNorm3d
from steadynorm.layers.group import GroupNorm
from steadynorm.layers.instance import InstanceNorm1d, InstanceNorm2d, InstanceNorm3d
from steadynorm.layers.layer import ChannelLayerNorm, LayerNorm
from steadynorm.layers.renorm import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d
from steadynorm.layers.rms import RMSNorm

# Wu & He, Group Normalization (2018), table 3: 32 groups are best, and so are 16 channels in each; one channel in each
# is instance norm, which is worse. Small networks have too few channels for either: 4 in each keeps them apart from it.
MAX_GROUPS = 32
MIN_CHANNELS_PER_GROUP = 4


def group_count(channels: int, most: int = MAX_GROUPS) -> int:
    """The largest divisor of `channels` that is at most `most` and leaves 4 channels a group or more; else 1."""
    most = min(most, channels // MIN_CHANNELS_PER_GROUP)
    return max((groups for groups in range(1, most + 1) if channels % groups == 0), default=1)


def group_norm_of(num_channels: int, *, groups: int = MAX_GROUPS, **settings: Any) -> GroupNorm:
    """A GroupNorm for any number of channels: the groups are as many as divide them, at most `groups`.

    Args:
        num_channels: C.
        groups: the most there may be; see `group_count`.
        settings: as `GroupNorm`.
    """
    return GroupNorm(group_count(num_channels, groups), num_channels, **settings)


def identity(num_features: int, **_: Any) -> nn.Module:
    """No normalization, under the arguments of one."""
    return nn.Identity()


BY_DIMS: dict[str, tuple[Callable[..., nn.Module], ...]] = {
    "batch": (BatchNorm1d, BatchNorm2d, BatchNorm3d),
    "ghost": (GhostBatchNorm1d, GhostBatchNorm2d, GhostBatchNorm3d),
    "renorm": (BatchRenorm1d, BatchRenorm2d, BatchRenorm3d),
    "frozen": (FrozenBatchNorm1d, FrozenBatchNorm2d, FrozenBatchNorm3d),
    "instance": (InstanceNorm1d, InstanceNorm2d, InstanceNorm3d),
}
ANY_DIMS: dict[str, Callable[..., nn.Module]] = {
    "group": group_norm_of,
    "channel_layer": ChannelLayerNorm,
    "layer": LayerNorm,
    "rms": RMSNorm,
    "none": identity,
}
NAMES = (*BY_DIMS, *ANY_DIMS)


def norm_layer(name: str, /, *, dims: int = 2, **settings: Any) -> Callable[..., nn.Module]:
    """A normalization as libraries take one: called with the number of channels, it gives a layer.

        torchvision.models.resnet50(norm_layer=steadynorm.norm_layer("group", groups=16))

    What is returned can be pickled, and takes further settings when it is called, as timm passes them.

    Args:
        name: ``"batch"``, ``"ghost"`` (needs ``ghost_size=``), ``"renorm"``, ``"frozen"``, ``"instance"``: the layer
            for `dims`. ``"group"``: `groups` groups or the next smaller number that divides the channels. ``"layer"``,
            ``"rms"``: over the last dimension, as in transformers. ``"channel_layer"``: over the channels of (N, C, *),
            as in ConvNeXt. ``"none"``: nothing.
        dims: dimensions behind N and C, 1 to 3.
        settings: of the layer: eps, momentum, activation, …

    Raises:
        InputError: no such name, dims or setting.
    """
    if name not in NAMES:
        raise InputError(f"norm_layer got {name!r}, expected one of {', '.join(NAMES)}.")
    if dims not in (1, 2, 3):
        raise InputError(f"norm_layer got dims={dims!r}, expected 1, 2 or 3: the dimensions behind N and C.")
    make = BY_DIMS[name][dims - 1] if name in BY_DIMS else ANY_DIMS[name]
    groups = settings.get("groups", MAX_GROUPS)
    if name == "group" and (not isinstance(groups, int) or groups < 1):
        raise InputError(f"norm_layer('group') got groups={groups!r}, expected a positive number of groups.")
    _ensure_taken(name, make, settings)
    return partial(make, **settings)


def _ensure_taken(name: str, make: Callable[..., nn.Module], settings: dict[str, Any]) -> None:
    """Say now what would otherwise be said when the model is built."""
    taken = set(inspect.signature(make).parameters)
    for source in getattr(make, "__mro__", ()):
        taken |= set(inspect.signature(source.__init__).parameters)
    if make is group_norm_of:
        taken |= set(inspect.signature(GroupNorm).parameters) - {"num_groups"}
    unknown = [setting for setting in settings if setting not in taken]
    if unknown:
        known = sorted(taken - {"self", "args", "kwargs", "settings", "_"} - {"num_features", "num_channels"})
        raise InputError(f"norm_layer({name!r}) got {unknown[0]!r}, expected settings among {', '.join(known)}.")
