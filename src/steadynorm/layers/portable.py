"""Evaluation in PyTorch's own operators, for graphs that leave PyTorch.

`torch.export` writes down what a layer calls. A converter (ONNX, ExecuTorch, Core ML) knows batch normalization by
PyTorch's operator and nothing by ours, and a saved program should load where this package is not installed.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from steadynorm.functional import ACTIVATIONS


def normalize_running(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float,
    residual: Tensor | None,
    activation: str | None,
    mask: Tensor | None,
) -> Tensor:
    """See `steadynorm.functional.normalize_running`, whose numbers these are to rounding."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    y = F.batch_norm(x, _as(dtype, mean), _as(dtype, var), _as(dtype, weight), _as(dtype, bias), False, 0.0, eps)
    if residual is not None:
        y = y + residual
    if activation is not None:
        y = ACTIVATIONS[activation](y)
    return y if mask is None else torch.where(mask.unsqueeze(1), y, 0)


def _as(dtype: torch.dtype, x: Tensor | None) -> Tensor | None:
    return x if x is None or x.dtype == dtype else x.to(dtype)
