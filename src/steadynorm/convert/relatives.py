"""Plans that make a batch norm one of its relatives: by slices, by constants, within the sample, or none at all."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from steadynorm import layers, models
from steadynorm.convert.classes import named
from steadynorm.convert.foreign import frozen_eps
from steadynorm.convert.targets import BATCH_SETTINGS, SYNC, Plan, Rule, earlier_classes, foreign_frozen, own_base
from steadynorm.errors import InputError
from steadynorm.layers.batch import BatchNorm
from steadynorm.layers.factory import group_count
from steadynorm.layers.frozen import FrozenBatchNorm
from steadynorm.layers.ghost import GhostBatchNorm
from steadynorm.layers.renorm import BatchRenorm
from steadynorm.layers.rows import Rows
from steadynorm.layers.running import STATISTICS
from steadynorm.layers.weight.target import own_class

RELATIVES = ("frozen", "ghost", "renorm", "group", "instance", "layer", "channel_layer", "none")
WITHIN_SAMPLE = ("group", "instance", "layer", "channel_layer")
WITH_DIMS = ("batch", "frozen", "ghost", "renorm", "instance")
COUNTED = (*STATISTICS, "num_batches_tracked")
BY_RANK: dict[str, dict[int, type[nn.Module]]] = {
    "frozen": {1: layers.FrozenBatchNorm1d, 2: layers.FrozenBatchNorm2d, 3: layers.FrozenBatchNorm3d},
    "ghost": {1: layers.GhostBatchNorm1d, 2: layers.GhostBatchNorm2d, 3: layers.GhostBatchNorm3d},
    "renorm": {1: layers.BatchRenorm1d, 2: layers.BatchRenorm2d, 3: layers.BatchRenorm3d},
    "instance": {1: layers.InstanceNorm1d, 2: layers.InstanceNorm2d, 3: layers.InstanceNorm3d},
}
TORCHS_RANKS = ((1, nn.BatchNorm1d), (2, nn.BatchNorm2d), (3, nn.BatchNorm3d))


@dataclass(frozen=True)
class Wish:
    """What was asked for.

    Args:
        to: one of RELATIVES.
        dims: of a SyncBatchNorm that does not know its rank.
        ghost_size, limits, groups: see `convert_`.
        is_seen: whether batches show what the layers are called with.
    """

    to: str
    dims: int | None = None
    ghost_size: int | None = None
    limits: Any = None
    groups: int | None = None
    is_seen: bool = False

    def check(self) -> None:
        """Raise InputError where an option does not belong to the target, or cannot be used."""
        for name, target in (("ghost_size", "ghost"), ("limits", "renorm"), ("groups", "group")):
            if getattr(self, name) is not None and self.to != target:
                raise InputError(f"convert_ got {name}={getattr(self, name)!r} to {self.to!r}: it is for {target!r}.")
        if self.dims is not None and (self.to not in WITH_DIMS or self.dims not in (1, 2, 3)):
            raise InputError(
                f"convert_ got dims={self.dims!r} to {self.to!r}, expected 1, 2 or 3, to one of"
                f" {', '.join(map(repr, WITH_DIMS))}."
            )
        if self.to == "ghost" and self.ghost_size is None:
            raise InputError("convert_ to 'ghost' needs ghost_size=, the samples of a slice.")
        if self.groups is not None and (not isinstance(self.groups, int) or self.groups < 1):
            raise InputError(f"convert_ got groups={self.groups!r}, expected a positive number of groups.")


def to_relative(wish: Wish) -> Rule:
    """The rule of one of RELATIVES."""
    make: dict[str, Callable[[nn.Module, Wish], Plan]] = {
        "frozen": _frozen,
        "ghost": _by_batch,
        "renorm": _by_batch,
        "group": _within_sample,
        "layer": _within_sample,
        "channel_layer": _within_sample,
        "instance": _instance,
        "none": _none,
    }

    def rule(layer: nn.Module) -> Plan | None:
        if wish.to == "frozen" and models.norm_kind(layer) == "frozen":
            return _foreign_frozen(layer)
        if not _is_batch_norm(layer):
            return None
        _check(layer)
        plan = make[wish.to](layer, wish)
        return None if _is_already(layer, plan) else plan

    return rule


def _is_batch_norm(layer: nn.Module) -> bool:
    return models.norm_kind(layer) in ("batch", "sync") or isinstance(layer, Rows)


def _check(layer: nn.Module) -> None:
    """Raise InputError for batch norms that no relative can be made of."""
    cls = own_class(layer)
    own_base(layer, cls)
    if isinstance(layer, Rows):
        raise InputError(f"is a {named(cls)}, whose statistics are those of several norms: merge them first")
    if any(is_lazy(tensor) for tensor in (*layer.parameters(), *layer.buffers())):
        raise InputError(f"is a {named(cls)} without a number of channels: run one batch through the model first")


def _is_already(layer: nn.Module, plan: Plan) -> bool:
    return own_class(layer) is plan.cls and all(
        getattr(layer, name, None) == value for name, value in plan.attributes.items()
    )


def _before(layer: nn.Module) -> dict[str, type[nn.Module]]:
    """The earlier classes of what `layer` is to become; "batch" is the batch norm that it is, or was."""
    earlier, cls = earlier_classes(layer), own_class(layer)
    if not issubclass(cls, (*SYNC, GhostBatchNorm, BatchRenorm)):
        return {**earlier, "batch": cls}
    return earlier


def _rank(layer: nn.Module, wish: Wish) -> int:
    """Dimensions behind N and C."""
    for one in (own_class(layer), earlier_classes(layer).get("batch", nn.Module)):
        for dims, cls in TORCHS_RANKS:
            if issubclass(one, cls):
                return dims
    if wish.dims is None:
        raise InputError(
            f"is a {named(own_class(layer))}, and for which inputs is not known: give dims=2 for (N, C, H, W), 1 for"
            " (N, C) and (N, C, L), 3 for (N, C, D, H, W)"
        )
    return wish.dims


def _by_batch(layer: nn.Module, wish: Wish) -> Plan:
    """Statistics of slices of the batch, or drawn towards the running ones: the same tensors, another forward pass."""
    attributes: dict[str, Any] = {"ghost_size": wish.ghost_size} if wish.to == "ghost" else {}
    if wish.to == "renorm":
        _ensure_running(layer)
        attributes = {"limits": wish.limits} if wish.limits is not None else {"limits": layers.RenormLimits()}
    cls = BY_RANK[wish.to][_rank(layer, wish)]
    return Plan(cls, _before(layer), attributes, drop=("process_group", "ranks", "_joined", *_settings_of(layer, cls)))


def _settings_of(layer: nn.Module, cls: type[nn.Module]) -> tuple[str, ...]:
    """What a ghost batch norm or a renormalization has in its instance that `cls` does not."""
    own = {GhostBatchNorm: ("ghost_size",), BatchRenorm: ("limits", "_met")}
    return tuple(
        name for kind, names in own.items() if isinstance(layer, kind) and not issubclass(cls, kind) for name in names
    )


def _frozen(layer: nn.Module, wish: Wish) -> Plan:
    """Weight, bias and statistics become constants, of which no optimizer, mode or recalibration moves any."""
    _ensure_running(layer)
    _ensure_plain(layer, "weight and bias become constants")
    attributes = {"num_features": layer.num_features, "eps": layer.eps}
    cls = BY_RANK["frozen"][_rank(layer, wish)]
    return Plan(
        cls,
        _before(layer),
        attributes,
        drop=tuple(name for name in BATCH_SETTINGS if name not in ("activation", *attributes)),
        constants=("weight", "bias"),
        gone=("num_batches_tracked",),
        keeps="batch",
    )


def _foreign_frozen(layer: nn.Module) -> Plan | None:
    """A frozen batch norm of another library, known by what it computes."""
    cls = own_class(layer)
    if issubclass(cls, FrozenBatchNorm):
        return None
    eps = frozen_eps(layer)
    if isinstance(eps, str):
        raise InputError(f"is a {named(cls)}, which {eps}: say what it computes with as_=")
    return foreign_frozen(layer, cls, eps)


def _within_sample(layer: nn.Module, wish: Wish) -> Plan:
    """Statistics of groups of channels of one sample, of all of them, or of those at one position."""
    channels = _channels(layer)
    if wish.to == "channel_layer":
        _ensure_no_activation(layer, layers.ChannelLayerNorm)
        cls: type[nn.Module] = layers.ChannelLayerNorm
        attributes: dict[str, Any] = {"normalized_shape": (channels,), "elementwise_affine": _is_affine(layer)}
        keep: tuple[str, ...] = ("eps",)
    else:
        groups = 1 if wish.to == "layer" else wish.groups or group_count(channels)
        if channels % groups:
            raise InputError(f"has {channels} channels, which groups={groups} does not divide")
        cls = layers.GroupNorm
        attributes = {"num_groups": groups, "num_channels": channels, "affine": _is_affine(layer)}
        keep = ("eps", "affine", "activation")
    drop = tuple(name for name in BATCH_SETTINGS if name not in keep)
    return Plan(cls, _before(layer), attributes, drop, gone=COUNTED)


def _instance(layer: nn.Module, wish: Wish) -> Plan:
    """Statistics of one channel of one sample, of which none are remembered."""
    rank = _rank(layer, wish)
    if rank == 1 and not wish.is_seen:
        raise InputError(
            "is a batch norm of (N, C) or (N, C, L), and an instance norm would take (N, C) for one sample of N"
            " channels: give batches=, which show what it is called with"
        )
    cls = BY_RANK["instance"][rank]
    attributes = {"num_features": _channels(layer), "track_running_stats": False, "affine": _is_affine(layer)}
    keep = ("num_features", "eps", "momentum", "affine", "activation")
    return Plan(cls, _before(layer), attributes, tuple(n for n in BATCH_SETTINGS if n not in keep), emptied=COUNTED)


def _none(layer: nn.Module, wish: Wish) -> Plan:
    """An Identity in its place, under its paths and with its hooks."""
    _ensure_no_activation(layer, nn.Identity)
    _ensure_plain(layer, "weight and bias are dropped")
    return Plan(nn.Identity, _before(layer), {}, BATCH_SETTINGS, gone=("weight", "bias", *COUNTED))


def _channels(layer: nn.Module) -> int:
    assert isinstance(layer, _BatchNorm)
    return layer.num_features


def _is_affine(layer: nn.Module) -> bool:
    return getattr(layer, "weight", None) is not None


def _ensure_running(layer: nn.Module) -> None:
    if not models.has_running_statistics(layer):
        raise InputError(
            f"is a {named(own_class(layer))} without running statistics, and nothing to normalise by: construct it with"
            " track_running_stats=True"
        )


def _ensure_plain(layer: nn.Module, what: str) -> None:
    if parametrize.is_parametrized(layer):
        raise InputError(f"has a tensor that a parametrization computes, and {what}: make_plain takes it off")


def _ensure_no_activation(layer: nn.Module, cls: type[nn.Module]) -> None:
    if isinstance(layer, BatchNorm) and layer.activation is not None:
        raise InputError(f"has activation={layer.activation!r}, which a {named(cls)} does not have: set it to None")
