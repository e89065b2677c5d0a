"""How far what a norm is given in half precision lies from zero, in its own deviations."""

import torch
from torch import Tensor, nn

from steadynorm import models

HALF = (torch.bfloat16, torch.float16)


def offset(module: nn.Module, x: Tensor) -> float | None:
    """|mean| / deviation of the values that share a statistic; None for what is no norm, or not in half precision.

    Of a batch norm that of the worst channel; of the others, within a sample, the median over samples of the worst
    group: one sample with a plain background is no fault. What varies less than eps is dead and left out.
    """
    kind = models.norm_kind(module)
    if kind in (None, "rms") or x.dtype not in HALF or x.dim() < 2 or not x.numel():
        return None
    rows = _rows(module, kind or "", x.float())
    if rows is None:
        return None
    var, mean = torch.var_mean(rows, -1, correction=0)
    eps = getattr(module, "eps", None) or 1e-12
    ratios = torch.where(var > eps, mean.abs() / var.sqrt(), 0.0)
    worst = ratios.amax(-1)
    return float(worst.max() if kind in ("batch", "sync", "frozen") else worst.median())


def _rows(module: nn.Module, kind: str, x: Tensor) -> Tensor | None:
    """Values that share a statistic in the last dimension, by (sample, group): batch norms have one row for all."""
    if kind == "layer":
        shape = getattr(module, "normalized_shape", ())
        size = len(shape)
        return x.flatten(-size).flatten(0, -2)[:, None] if size and x.shape[-size:] == torch.Size(shape) else None
    if kind in ("batch", "sync", "frozen"):
        return x.transpose(0, 1).flatten(1)[None]
    groups = getattr(module, "num_groups", x.shape[1])
    return x.reshape(x.shape[0], groups, -1) if x.shape[1] % groups == 0 else None
