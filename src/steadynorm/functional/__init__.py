"""Normalization as functions: autograd over the kernels, one file a family.

batch     moments, normalize_batch, normalize_running, update_running_, batch_norm
"""

from steadynorm.functional.batch import batch_norm, moments, normalize_batch, normalize_running, update_running_
from steadynorm.kernels import ACTIVATIONS

__all__ = ["ACTIVATIONS", "batch_norm", "moments", "normalize_batch", "normalize_running", "update_running_"]
