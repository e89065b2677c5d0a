"""Backward passes that are differentiated themselves."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

Normalize = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]
"""y of x, weight and bias, as differentiable PyTorch."""


def apart(*tensors: Tensor | None) -> list[Any]:
    """Aliases, for a backward pass that is differentiated to take its gradients with respect to.

    Of one that was computed from another (the same weight earlier in a network, a weight that is made of x), autograd
    would count the way through the other as well, which the caller's own backward pass goes too.
    """
    return [t.view_as(t) if t is not None and t.requires_grad else t for t in tensors]


def differentiate_as(y: Tensor, x: Tensor, weight: Tensor | None, normalize: Normalize) -> None:
    """Have the backward pass of `y`, where it will be differentiated itself, be that of `normalize`.

    The second derivatives of torch's batch and layer norm count mean and deviation as constants, which makes those of
    third order wrong, without a word (torch 2.13).

    Args:
        y: what torch's kernel gave; left as it is.
        x, weight: what it gave it for.
    """
    node = y.grad_fn
    if node is None:
        return
    kept = None
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        # A checkpoint hands a tensor out once, and torch's node will have had it. These are small.
        kept = [(t, t._version) for t in (x, weight) if t is not None]
    node.register_hook(partial(_gradients, normalize, kept))


def _gradients(
    normalize: Normalize,
    kept: list[tuple[Tensor, int]] | None,
    gradients: tuple[Tensor | None, ...],
    dys: tuple[Tensor, ...],
) -> Any:
    """A hook behind torch's node, of x, weight and bias: other gradients, or None to keep those that it gave."""
    if not torch.is_grad_enabled():
        return None
    bias = None if gradients[2] is None else torch.zeros_like(gradients[2]).requires_grad_()
    leaves = apart(*_saved(kept), bias)
    is_wanted = [gradient is not None for gradient in gradients[:3]]
    wanted = [leaf for leaf, is_one in zip(leaves, is_wanted, strict=True) if is_one]
    found = iter(torch.autograd.grad(normalize(*leaves), wanted, dys[0], create_graph=True))
    return (*(next(found) if is_one else None for is_one in is_wanted), *gradients[3:])


def _saved(kept: list[tuple[Tensor, int]] | None) -> tuple[Tensor, Tensor | None]:
    """x and weight of the node that has just run."""
    node: Any = torch._C._current_autograd_node()
    try:
        return node._saved_input, node._saved_weight
    except RuntimeError:
        if kept is None or any(t._version != version for t, version in kept):
            raise
    x, *weight = (t for t, _ in kept)
    return x, weight[0] if weight else None
