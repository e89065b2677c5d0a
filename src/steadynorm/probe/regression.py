"""A model that ends in a norm and is trained on numbers: how far the norm lets its output vary."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from steadynorm import models
from steadynorm.probe.facts import Call
from steadynorm.probe.samples import TARGET_KEYS, tensors_in
from steadynorm.probe.training_facts import Regression


def regression(model: nn.Module, batch: Any, output: Any, calls: tuple[Call, ...]) -> Regression | None:
    """The norm that makes the output, and the targets of that shape; None where there is no such norm or target."""
    last = calls[-1].maker if calls else ""
    made, layer = next(tensors_in(output), None), dict(model.named_modules()).get(last)
    if made is None or layer is None or models.norm_kind(layer) is None or made.dim() < 1:
        return None
    target = _target(batch, made)
    if target is None:
        return None
    weight = getattr(layer, "weight", None)
    reach = float(weight.detach().double().square().mean().sqrt()) if isinstance(weight, Tensor) else 1.0
    columns = target.double().reshape(len(target), -1)
    return Regression(last, reach, float(columns.var(0, correction=0).mean().sqrt()))


def _target(batch: Any, made: Tensor) -> Tensor | None:
    """The first tensor of numbers beside the inputs that has as many, by sample, as the output."""
    if isinstance(batch, Mapping):
        found: Any = [batch[key] for key in TARGET_KEYS if key in batch]
    else:
        found = batch[1:] if isinstance(batch, list | tuple) else ()
    for target in tensors_in(found):
        if target.is_floating_point() and target.shape[:1] == made.shape[:1] and target.numel() == made.numel():
            return target if bool(torch.isfinite(target).all()) else None
    return None
