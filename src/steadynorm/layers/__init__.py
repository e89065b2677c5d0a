"""Normalization layers: subclasses of torch.nn's own, with the same signatures and the same state_dict."""

from steadynorm.layers.batch import BatchNorm1d, BatchNorm2d, BatchNorm3d
from steadynorm.layers.domain import DomainBatchNorm1d, DomainBatchNorm2d, DomainBatchNorm3d
from steadynorm.layers.factory import norm_layer
from steadynorm.layers.frozen import FrozenBatchNorm1d, FrozenBatchNorm2d, FrozenBatchNorm3d
from steadynorm.layers.ghost import GhostBatchNorm1d, GhostBatchNorm2d, GhostBatchNorm3d
from steadynorm.layers.group import GroupNorm
from steadynorm.layers.input import InputNorm
from steadynorm.layers.instance import (
    InstanceNorm1d,
    InstanceNorm2d,
    InstanceNorm3d,
    LazyInstanceNorm1d,
    LazyInstanceNorm2d,
    LazyInstanceNorm3d,
)
from steadynorm.layers.layer import ChannelLayerNorm, LayerNorm
from steadynorm.layers.lazy import LazyBatchNorm1d, LazyBatchNorm2d, LazyBatchNorm3d
from steadynorm.layers.renorm import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d, RenormLimits
from steadynorm.layers.rms import RMSNorm
from steadynorm.layers.saving import recompute_outputs
from steadynorm.layers.step import StepBatchNorm1d
from steadynorm.layers.sync import SyncBatchNorm
from steadynorm.layers.weight import (
    initialize_weight_norm_,
    make_plain,
    spectral_norm,
    weight_norm,
    weight_standardization,
)

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
    "initialize_weight_norm_",
    "make_plain",
    "norm_layer",
    "recompute_outputs",
    "spectral_norm",
    "weight_norm",
    "weight_standardization",
]
