"""steadynorm makes normalization in deep learning dependable."""

import importlib
import typing

if typing.TYPE_CHECKING:
    from steadynorm import deploy as deploy
    from steadynorm import doctor as doctor
    from steadynorm import errors as errors
    from steadynorm import functional as functional
    from steadynorm import lab as lab
    from steadynorm import layers as layers
    from steadynorm import training as training
    from steadynorm.convert import convert_ as convert_
    from steadynorm.doctor import examine as examine
    from steadynorm.doctor import repair as repair
    from steadynorm.doctor import watch as watch
    from steadynorm.kernels import backend as backend
    from steadynorm.kernels.cpu.memory import keep_freed_memory as keep_freed_memory
    from steadynorm.layers import BatchNorm1d as BatchNorm1d
    from steadynorm.layers import BatchNorm2d as BatchNorm2d
    from steadynorm.layers import BatchNorm3d as BatchNorm3d
    from steadynorm.layers import BatchRenorm1d as BatchRenorm1d
    from steadynorm.layers import BatchRenorm2d as BatchRenorm2d
    from steadynorm.layers import BatchRenorm3d as BatchRenorm3d
    from steadynorm.layers import ChannelLayerNorm as ChannelLayerNorm
    from steadynorm.layers import DomainBatchNorm1d as DomainBatchNorm1d
    from steadynorm.layers import DomainBatchNorm2d as DomainBatchNorm2d
    from steadynorm.layers import DomainBatchNorm3d as DomainBatchNorm3d
    from steadynorm.layers import FrozenBatchNorm1d as FrozenBatchNorm1d
    from steadynorm.layers import FrozenBatchNorm2d as FrozenBatchNorm2d
    from steadynorm.layers import FrozenBatchNorm3d as FrozenBatchNorm3d
    from steadynorm.layers import GhostBatchNorm1d as GhostBatchNorm1d
    from steadynorm.layers import GhostBatchNorm2d as GhostBatchNorm2d
    from steadynorm.layers import GhostBatchNorm3d as GhostBatchNorm3d
    from steadynorm.layers import GroupNorm as GroupNorm
    from steadynorm.layers import InputNorm as InputNorm
    from steadynorm.layers import InstanceNorm1d as InstanceNorm1d
    from steadynorm.layers import InstanceNorm2d as InstanceNorm2d
    from steadynorm.layers import InstanceNorm3d as InstanceNorm3d
    from steadynorm.layers import LayerNorm as LayerNorm
    from steadynorm.layers import LazyBatchNorm1d as LazyBatchNorm1d
    from steadynorm.layers import LazyBatchNorm2d as LazyBatchNorm2d
    from steadynorm.layers import LazyBatchNorm3d as LazyBatchNorm3d
    from steadynorm.layers import LazyInstanceNorm1d as LazyInstanceNorm1d
    from steadynorm.layers import LazyInstanceNorm2d as LazyInstanceNorm2d
    from steadynorm.layers import LazyInstanceNorm3d as LazyInstanceNorm3d
    from steadynorm.layers import RenormLimits as RenormLimits
    from steadynorm.layers import RMSNorm as RMSNorm
    from steadynorm.layers import StepBatchNorm1d as StepBatchNorm1d
    from steadynorm.layers import SyncBatchNorm as SyncBatchNorm
    from steadynorm.layers import initialize_weight_norm_ as initialize_weight_norm_
    from steadynorm.layers import make_plain as make_plain
    from steadynorm.layers import norm_layer as norm_layer
    from steadynorm.layers import recompute_outputs as recompute_outputs
    from steadynorm.layers import spectral_norm as spectral_norm
    from steadynorm.layers import weight_norm as weight_norm
    from steadynorm.layers import weight_standardization as weight_standardization
    from steadynorm.ranks import sync_group as sync_group

__version__ = "0.1.0.dev0"

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchRenorm1d",
    "BatchRenorm2d",
    "BatchRenorm3d",
    "ChannelLayerNorm",
    "DomainBatchNorm1d",
    "DomainBatchNorm2d",
    "DomainBatchNorm3d",
    "FrozenBatchNorm1d",
    "FrozenBatchNorm2d",
    "FrozenBatchNorm3d",
    "GhostBatchNorm1d",
    "GhostBatchNorm2d",
    "GhostBatchNorm3d",
    "GroupNorm",
    "InputNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "LazyInstanceNorm1d",
    "LazyInstanceNorm2d",
    "LazyInstanceNorm3d",
    "RMSNorm",
    "RenormLimits",
    "StepBatchNorm1d",
    "SyncBatchNorm",
    "__version__",
    "backend",
    "convert_",
    "deploy",
    "doctor",
    "errors",
    "examine",
    "functional",
    "initialize_weight_norm_",
    "keep_freed_memory",
    "lab",
    "layers",
    "make_plain",
    "norm_layer",
    "recompute_outputs",
    "repair",
    "spectral_norm",
    "sync_group",
    "training",
    "watch",
    "weight_norm",
    "weight_standardization",
]

# Where a name lives; it is imported when it is first asked for. A name that is not here is a submodule.
_HOMES = {"backend": "kernels", "keep_freed_memory": "kernels.cpu.memory", "examine": "doctor", "repair": "doctor"}
_HOMES["watch"] = "doctor"
_HOMES["sync_group"] = "ranks"
_HOMES["convert_"] = "convert"
_HOMES |= {name: "layers" for name in __all__ if name[0].isupper()}
_ON_WEIGHTS = ("initialize_weight_norm_", "make_plain", "spectral_norm", "weight_norm", "weight_standardization")
_HOMES |= dict.fromkeys((*_ON_WEIGHTS, "norm_layer", "recompute_outputs"), "layers")

if not typing.TYPE_CHECKING:

    def __getattr__(name):  # noqa: ANN001, ANN202
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        home = importlib.import_module(f"{__name__}.{_HOMES.get(name, name)}")
        value = getattr(home, name) if name in _HOMES else home
        globals()[name] = value
        return value

    def __dir__():  # noqa: ANN202
        return sorted({*globals(), *__all__})
