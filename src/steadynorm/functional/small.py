"""Batch normalization of small float32 tensors on the CPU by torch's own kernel, and what autograd sees of it."""

from functools import partial

import torch
from torch import Tensor

from steadynorm.functional.differentiable import differentiate_as
from steadynorm.kernels import ACTIVATIONS, reference, torch_small


def normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: tuple[Tensor, Tensor] | None,
    eps: float,
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """y, and mean and var, where torch's kernel is for a call, else None.

    Args:
        statistics: constants; None takes those of `x`.
    """
    if statistics is None:
        found = torch_small.batch(x, weight, bias, eps)
        if found is None:
            return None
        y, mean, var = found
        differentiate_as(y, x, weight, partial(_exactly, eps))
    else:
        mean, var = statistics
        given = torch_small.given(x, mean, var, weight, bias, eps)
        if given is None:
            return None
        y = given
    return _activated(y, activation), mean, var


def _exactly(eps: float, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    return reference.compose(x, weight, bias, None, None, eps, None)[0]


def _activated(y: Tensor, activation: str | None) -> Tensor:
    """An activation on its own, whose output may be changed in place, as that of our kernels may."""
    if activation is None:
        return y
    # The same as relu, which keeps its output for its backward pass where this keeps its input.
    return torch.threshold(y, 0, 0) if activation == "relu" else ACTIVATIONS[activation](y)
