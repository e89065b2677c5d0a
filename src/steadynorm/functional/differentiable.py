"""Derivatives of every order, where torch's own kernels compute the norm."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointError

Normalize = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]
"""y of x, weight and bias, as differentiable PyTorch."""


def differentiate_as(y: Tensor, normalize: Normalize) -> None:
    """Have the backward pass of `y`, where it will be differentiated itself, be that of `normalize`.

    The second derivatives of torch's batch and layer norm count mean and deviation as constants, which makes those of
    third order wrong, without a word (torch 2.13). Inside `torch.utils.checkpoint` they stay what torch gives.

    Args:
        y: what torch's kernel gave; left as it is.
    """
    node = y.grad_fn
    if node is not None:
        node.register_hook(partial(_gradients, normalize))


def _gradients(normalize: Normalize, gradients: tuple[Tensor | None, ...], dys: tuple[Tensor, ...]) -> Any:
    """A hook behind torch's node, of x, weight and bias: other gradients, or None to keep those that it gave."""
    if not torch.is_grad_enabled():
        return None
    node: Any = torch._C._current_autograd_node()
    try:
        x, weight = node._saved_input, node._saved_weight
    except CheckpointError:
        # It hands a tensor out once, and torch's node has had it.
        return None
    bias = None if gradients[2] is None else torch.zeros_like(gradients[2]).requires_grad_()
    leaves = (x, weight, bias)
    is_wanted = [gradient is not None for gradient in gradients[:3]]
    wanted = [leaf for leaf, is_one in zip(leaves, is_wanted, strict=True) if is_one]
    found = iter(torch.autograd.grad(normalize(*leaves), wanted, dys[0], create_graph=True))
    return (*(next(found) if is_one else None for is_one in is_wanted), *gradients[3:])
