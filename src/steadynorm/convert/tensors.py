"""What becomes of the tensors of a layer whose relative holds them otherwise, or does not have them."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from steadynorm.convert.targets import Plan
from steadynorm.layers.running import STATISTICS

AFFINE = ("weight", "bias")
COUNT = "num_batches_tracked"
OWN = (*AFFINE, *STATISTICS, COUNT)
"""Tensors of normalizations."""


def take_off(layer: nn.Module, plan: Plan) -> dict[str, dict[str, Any]]:
    """Make constants of parameters, and take off what the relative does not have.

    A constant is a copy: whoever holds the parameter, an optimizer or a tied layer, moves it no more.

    Returns: the parameters and buffers that are gone.
    """
    parameters: dict[str, Any] = {}
    for name in plan.constants:
        parameter = parameters[name] = layer._parameters.pop(name, None)
        layer._buffers[name] = None if parameter is None else parameter.detach().clone()
    if plan.constants:
        # In the order in which a frozen layer has them from the start.
        for name in STATISTICS:
            layer._buffers[name] = layer._buffers.pop(name)
    buffers: dict[str, Any] = {name: layer._buffers.pop(name) for name in plan.gone if name in layer._buffers}
    parameters |= {name: layer._parameters.pop(name) for name in plan.gone if name in layer._parameters}
    for name in plan.emptied:
        layer._buffers[name] = None
    return {"parameters": parameters, "buffers": buffers}


def take_back(layer: nn.Module, aside: dict[str, dict[str, Any]]) -> str:
    """Make parameters of constants: the objects that they were, where these still hold the same values.

    Returns: what is to be known about it.
    """
    vars(layer).update(aside.get("attributes", {}))
    made: list[str] = []
    if not isinstance(layer, _BatchNorm):
        return ""
    for name in AFFINE:
        constant, before = layer._buffers.pop(name, None), aside.get("parameters", {}).get(name)
        if constant is not None and not _is_same(before, constant):
            before = nn.Parameter(constant.detach().clone(), requires_grad=before is None or before.requires_grad)
            made.append(name)
        layer._parameters[name] = None if constant is None else before
    mean = layer._buffers[STATISTICS[0]]
    assert mean is not None
    count = aside.get("buffers", {}).get(COUNT)
    layer._buffers[COUNT] = torch.tensor(0, device=mean.device) if count is None else count.to(mean.device)
    return f"new parameters, in no optimizer: {', '.join(made)}" if made else ""


def _is_same(parameter: Tensor | None, constant: Tensor) -> bool:
    if parameter is None or parameter.device != constant.device or parameter.dtype != constant.dtype:
        return False
    return torch.equal(parameter, constant)
