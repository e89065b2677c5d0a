"""What each target of `convert_` makes of a layer: a plan, nothing, or an InputError that says why it cannot be."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from steadynorm import layers, models
from steadynorm.convert.classes import OURS, TORCHS, additions, is_ours, named, origin
from steadynorm.convert.foreign import frozen_eps
from steadynorm.errors import InputError
from steadynorm.layers.batch import BatchNorm
from steadynorm.layers.frozen import FrozenBatchNorm, FrozenBatchNorm2d
from steadynorm.layers.ghost import GhostBatchNorm
from steadynorm.layers.renorm import BatchRenorm
from steadynorm.layers.rows import Rows
from steadynorm.layers.switches import DEFAULTS
from steadynorm.layers.sync import SyncBatchNorm
from steadynorm.layers.weight.target import own_class

Classes = dict[str, type[nn.Module]]
EARLIER = "_earlier_classes"
"""Attribute of a converted layer: by target, the class that this target gives back, where the layer cannot tell it."""
BY_DIMS: dict[int, type[nn.Module]] = {1: layers.BatchNorm1d, 2: layers.BatchNorm2d, 3: layers.BatchNorm3d}
SYNC: tuple[type[nn.Module], ...] = (nn.SyncBatchNorm, SyncBatchNorm)
RELATIVES_OF_BATCH: tuple[type[nn.Module], ...] = (GhostBatchNorm, BatchRenorm, FrozenBatchNorm)

ASIDE = "_set_aside"
"""Attribute of a frozen layer: what the batch norm that it was had besides, to be put back."""

# Settings that torch.nn does not have, and where the value stands in the layer.
SETTINGS = {**{name: name for name in (*BatchNorm.choices, "convention")}, "train_affine": "_train_affine"}
# What a batch norm, or a relative over the batch, has in its instance.
OF_TORCH = ("num_features", "eps", "momentum", "affine", "track_running_stats")
OF_RELATIVES = ("ghost_size", "limits", "_met", "process_group", "ranks", "_joined", "_pool")
FROM_THE_START = {"momentum": 0.1, "affine": True, "track_running_stats": True}
"""Of a batch norm that a frozen one, frozen from the start, becomes."""
BATCH_SETTINGS = (*OF_TORCH, *SETTINGS.values(), *OF_RELATIVES)


@dataclass(frozen=True)
class Plan:
    """What is to become of one layer.

    Args:
        cls: its class.
        earlier: classes that it could not tell any more, by the target that gives them back.
        attributes: to be set.
        drop: attributes of the instance to be taken off, if it has them.
        gone: parameters and buffers to be taken off.
        emptied: those that the class has and does not use: None.
        constants: parameters that become buffers.
        keeps: the target that is the way back, for which what is dropped, gone or constant now is set aside.
        returns: the same, where this is that way back.
    """

    cls: type[nn.Module]
    earlier: Classes
    attributes: dict[str, Any] = field(default_factory=dict)
    drop: tuple[str, ...] = ()
    gone: tuple[str, ...] = ()
    emptied: tuple[str, ...] = ()
    constants: tuple[str, ...] = ()
    keeps: str = ""
    returns: str = ""


Rule = Callable[[nn.Module], Plan | None]


def to_steadynorm(layer: nn.Module) -> Plan | None:
    """Our layer of the same name."""
    cls = own_class(layer)
    kind = models.norm_kind(layer)
    if kind is None or is_ours(cls):
        return None
    if kind == "frozen":
        eps = frozen_eps(layer)
        return foreign_frozen(layer, cls, eps) if isinstance(eps, float) else None
    base = own_base(layer, cls)
    earlier = {target: OURS.get(one, one) for target, one in earlier_classes(layer).items()}
    ours, earlier = _again(earlier, "steadynorm", OURS[base])
    if cls is not base:
        earlier["torch"] = cls
    attributes = {"process_group": layer.process_group} if isinstance(layer, nn.SyncBatchNorm) else {}
    return Plan(ours, earlier, attributes)


def foreign_frozen(layer: nn.Module, cls: type[nn.Module], eps: float) -> Plan:
    """Our frozen batch norm in place of one of another library, with the eps that it computes with."""
    attributes = {"num_features": len(layer.get_buffer("running_mean")), "eps": eps}
    return Plan(FrozenBatchNorm2d, {"torch": cls}, attributes, drop=tuple(attributes), keeps="torch")


def to_torch(layer: nn.Module) -> Plan | None:
    """The layer of torch.nn of the same name."""
    cls = own_class(layer)
    if not is_ours(cls):
        return None
    base = own_base(layer, cls)
    earlier = {target: TORCHS.get(one, one) for target, one in earlier_classes(layer).items()}
    drop, returns = (*SETTINGS.values(), "_joined"), ""
    if base is FrozenBatchNorm2d and "torch" in earlier:
        torchs, drop, returns = earlier.pop("torch"), (*drop, "num_features", "eps"), "torch"
    elif base in TORCHS:
        torchs, earlier = _again(earlier, "torch", TORCHS[base])
    else:
        raise InputError(f"is a {named(cls)}, which torch.nn does not have")
    _ensure_at_default(layer)
    if cls is not base:
        earlier["steadynorm"] = cls
    return Plan(torchs, earlier, drop=drop, returns=returns)


def to_sync(process_group: Any) -> Rule:
    """Our SyncBatchNorm, in place of a batch norm of any rank."""

    def rule(layer: nn.Module) -> Plan | None:
        cls = own_class(layer)
        if models.norm_kind(layer) not in ("batch", "sync") and not isinstance(layer, Rows):
            return None
        base = own_base(layer, cls)
        group = process_group if process_group is not None else getattr(layer, "process_group", None)
        attributes = {"process_group": group}
        earlier = earlier_classes(layer)
        if base in SYNC:
            is_same = cls is SyncBatchNorm and group is getattr(layer, "process_group", None)
            return None if is_same else Plan(SyncBatchNorm, earlier, attributes)
        ours = OURS.get(base, base)
        if ours not in BY_DIMS.values() or not issubclass(ours, BatchNorm):
            raise InputError(f"is a {named(cls)}, and only BatchNorm1d, 2d and 3d have a synchronised form")
        return Plan(SyncBatchNorm, {**earlier, "batch": cls}, attributes | {"ranks": ours.ranks})

    return rule


def to_batch(dims: int | None) -> Rule:
    """The batch norm that a relative over the batch, a frozen or a synchronised one was, or one of its rank."""

    def rule(layer: nn.Module) -> Plan | None:
        cls = own_class(layer)
        if issubclass(cls, SYNC):
            return _from_sync(layer, cls, dims)
        if issubclass(cls, RELATIVES_OF_BATCH):
            return _from_relative(layer, cls)
        before = earlier_classes(layer).get("batch")
        if before is not None and not issubclass(cls, _BatchNorm):
            raise InputError(f"was a {named(before)} before it was converted, whose running statistics are gone")
        return None

    return rule


def _from_sync(layer: nn.Module, cls: type[nn.Module], dims: int | None) -> Plan:
    base, earlier = own_base(layer, cls), earlier_classes(layer)
    before = earlier.pop("batch", None)
    if before is None:
        if dims is None:
            raise InputError(
                f"is a {named(cls)} from the start, or from torch's converter, and for which inputs is not known:"
                " give dims=2 for (N, C, H, W), 1 for (N, C) and (N, C, L), 3 for (N, C, D, H, W)"
            )
        before = BY_DIMS[dims] if base in TORCHS else TORCHS[BY_DIMS[dims]]
    drop: tuple[str, ...] = ("process_group", "ranks", "_joined")
    if not is_ours(before) and is_ours(cls):
        _ensure_at_default(layer)
        drop += tuple(SETTINGS.values())
    return Plan(before, earlier, drop=drop)


def _from_relative(layer: nn.Module, cls: type[nn.Module]) -> Plan:
    own_base(layer, cls)
    earlier = earlier_classes(layer)
    before = earlier.pop("batch", None) or BY_DIMS[int(layer.ranks[-1]) - 2]  # type: ignore[index]
    is_frozen = issubclass(cls, FrozenBatchNorm)
    drop: tuple[str, ...] = OF_RELATIVES
    if not is_ours(before):
        _ensure_at_default(layer)
        drop += tuple(SETTINGS.values())
    attributes = dict(FROM_THE_START) if is_frozen else {}
    if is_frozen:
        attributes["affine"] = getattr(layer, "weight", None) is not None
    return Plan(before, earlier, attributes, drop, returns="batch" if is_frozen else "")


def earlier_classes(layer: nn.Module) -> Classes:
    """What a layer was under targets whose class it cannot tell any more."""
    return dict(getattr(layer, EARLIER, {}))


def _again(earlier: Classes, target: str, cls: type[nn.Module]) -> tuple[type[nn.Module], Classes]:
    """The class that a layer had under this target, if it was one made from `cls`, else that; the rest of `earlier`."""
    before = earlier.get(target, cls)
    if not issubclass(before, cls):
        return cls, earlier
    return before, {other: one for other, one in earlier.items() if other != target}


def own_base(layer: nn.Module, cls: type[nn.Module]) -> type[nn.Module]:
    """The class that a layer is one of, as far as its class adds nothing to it that could be lost."""
    if "forward" in vars(layer):
        raise InputError("has a forward of its own, set on the layer, which would go on as it is")
    if cls.__module__.startswith("steadynorm."):
        # What our relatives add is known: a rule says what it does with them.
        return cls
    base = origin(cls)
    if base is None:
        raise InputError(f"is a {named(cls)}, which is none of torch.nn's normalizations")
    own = additions(cls, base)
    if own:
        raise InputError(f"is a {named(cls)}, a {named(base)} with its own {', '.join(own)}, which would be lost")
    return base


def _ensure_at_default(layer: nn.Module) -> None:
    """Raise InputError where a layer of ours has a setting that torch.nn does not have."""
    defaults = {name: DEFAULTS.get(name, getattr(type(layer), name, None)) for name in SETTINGS}
    given = [name for name, default in defaults.items() if hasattr(layer, name) and getattr(layer, name) != default]
    if given:
        shown = ", ".join(f"{name}={getattr(layer, name)!r}" for name in given)
        back = ", ".join(f"{name}={defaults[name]!r}" for name in given)
        raise InputError(f"has {shown}, which torch.nn does not have: set {back} first, if the layer can do without")
