"""Classes of layers: which of ours stands for which of torch.nn's, and what a class adds to the one it is made from."""

from torch import nn

from steadynorm import layers
from steadynorm.layers.batch import BatchNorm
from steadynorm.layers.frozen import FrozenBatchNorm
from steadynorm.layers.sync import SyncBatchNorm

NAMES = (
    *(f"{lazy}{kind}Norm{dims}d" for kind in ("Batch", "Instance") for lazy in ("", "Lazy") for dims in (1, 2, 3)),
    "GroupNorm",
    "LayerNorm",
    "RMSNorm",
)
OURS: dict[type[nn.Module], type[nn.Module]] = {getattr(nn, name): getattr(layers, name) for name in NAMES}
OURS[nn.SyncBatchNorm] = SyncBatchNorm
"""Of each normalization of torch.nn, ours."""
TORCHS: dict[type[nn.Module], type[nn.Module]] = {ours: torchs for torchs, ours in OURS.items()}
ROOTS = (BatchNorm, FrozenBatchNorm, layers.GroupNorm, layers.LayerNorm, layers.RMSNorm)

# What a class has that says nothing about what its layers do; __init__ has been run already.
PLAIN = {
    *("__module__", "__qualname__", "__doc__", "__init__", "__annotations__", "__annotate_func__", "__dict__"),
    *("__weakref__", "__firstlineno__", "__static_attributes__", "__parameters__", "__orig_bases__"),
    *("__annotations_cache__", "__constants__"),
}


def is_ours(cls: type) -> bool:
    """Whether a class is a normalization of ours, or made from one."""
    return issubclass(cls, ROOTS)


def origin(cls: type) -> type[nn.Module] | None:
    """The nearest class of torch.nn or of ours that both have, itself included."""
    return next((base for base in cls.__mro__ if base in OURS or base in TORCHS), None)


def additions(cls: type, base: type) -> list[str]:
    """What a class, and those between, have that `base` has not or has otherwise; nothing where it is only a name."""
    between = cls.__mro__[: cls.__mro__.index(base)]
    return sorted({name for one in between for name in vars(one)} - PLAIN)


def named(cls: type) -> str:
    """How messages call a class: nn.BatchNorm2d, steadynorm.BatchNorm2d, timm.BatchNormAct2d."""
    package = "nn" if cls.__module__.startswith("torch.nn") else cls.__module__.partition(".")[0]
    return cls.__qualname__ if package in ("__main__", "builtins") else f"{package}.{cls.__qualname__}"
