"""What normalization over the batch says about tensors it cannot take."""

import torch
from torch import Tensor

from steadynorm.errors import InputError
from steadynorm.kernels import ACTIVATIONS


def check_extras(x: Tensor, residual: Tensor | None, activation: str | None, mask: Tensor | None) -> None:
    """Raise InputError for a residual, an activation or a mask that does not go with `x` (N, C, *)."""
    if activation is not None and activation not in ACTIVATIONS:
        raise InputError(f"activation got {activation!r}, expected None or one of {', '.join(ACTIVATIONS)}.")
    if residual is not None and residual.shape != x.shape:
        raise InputError(f"residual got shape {tuple(residual.shape)}, expected that of x, {tuple(x.shape)}.")
    if mask is not None:
        check_mask(x, mask)


def check_affine(
    x: Tensor, one: Tensor | None, two: Tensor | None, names: tuple[str, str] = ("weight", "bias")
) -> None:
    """Raise InputError where weight or bias, or what `names` says, is not one value a channel of `x` (N, C, *)."""
    channels = x.shape[1]
    for name, given in zip(names, (one, two), strict=True):
        if given is None:
            continue
        if given.numel() != channels:
            shape = tuple(given.shape)
            raise InputError(f"{name} got shape {shape}, expected ({channels},) for x of shape {tuple(x.shape)}.")
        if given.device != x.device:
            raise InputError(f"{name} is on {given.device}, expected it on the {x.device}, where x is: move it there.")


def check_mask(x: Tensor, mask: Tensor) -> None:
    """Raise InputError where `mask` is not bool (N, *) for `x` (N, C, *)."""
    expected = (x.shape[0], *x.shape[2:])
    if mask.dtype != torch.bool or mask.shape != expected:
        raise InputError(
            f"mask got shape {tuple(mask.shape)} and {mask.dtype}, expected {expected} and torch.bool: True is valid."
        )
