"""Normalization of weights: each a parametrization of torch that can be made plain for deployment.

norm              weight_norm, initialize_weight_norm_ (in initial)
standardization   weight_standardization, plain and scaled
spectral          spectral_norm
plain             make_plain
"""

from steadynorm.layers.weight.initial import initialize_weight_norm_
from steadynorm.layers.weight.norm import weight_norm
from steadynorm.layers.weight.plain import make_plain
from steadynorm.layers.weight.spectral import spectral_norm
from steadynorm.layers.weight.standardization import weight_standardization

__all__ = ["initialize_weight_norm_", "make_plain", "spectral_norm", "weight_norm", "weight_standardization"]
