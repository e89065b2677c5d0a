"""steadynorm makes normalization in deep learning dependable."""

__version__ = "0.1.0.dev0"
