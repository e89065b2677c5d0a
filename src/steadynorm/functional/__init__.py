"""Normalization as functions: autograd over the kernels, one file a family.

batch     moments, normalize_batch, normalize_running, update_running_, batch_norm
together  normalize_together: a batch in parts, on one process or several
slices    normalize_slices: each slice of a batch by its own statistics
group     group_norm                   sample    what these four share: statistics within a sample
instance  instance_norm                shapes    what they say about a tensor they cannot take
layer     layer_norm
rms       rms_norm
"""

from steadynorm.functional.batch import batch_norm, moments, normalize_batch, normalize_running, update_running_
from steadynorm.functional.group import group_norm
from steadynorm.functional.instance import instance_norm
from steadynorm.functional.layer import layer_norm
from steadynorm.functional.rms import rms_norm
from steadynorm.functional.slices import normalize_slices
from steadynorm.functional.together import Part, Reduction, normalize_together
from steadynorm.kernels import ACTIVATIONS

__all__ = [
    "ACTIVATIONS",
    "Part",
    "Reduction",
    "batch_norm",
    "group_norm",
    "instance_norm",
    "layer_norm",
    "moments",
    "normalize_batch",
    "normalize_running",
    "normalize_slices",
    "normalize_together",
    "rms_norm",
    "update_running_",
]
