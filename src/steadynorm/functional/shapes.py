"""What normalizations say about a tensor they cannot take.

Every check is given `who`, which says how to call the caller, and is asked only when there is something to say.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from steadynorm.errors import DegenerateStatisticsError, InputError
from steadynorm.kernels import ACTIVATIONS

Who = Callable[[], str]


def check_eps(who: Who, eps: float | None) -> None:
    """Raise InputError for a negative eps, or one that is not a number."""
    if eps is not None and not eps >= 0:
        raise InputError(f"{who()}: eps must not be negative, got {eps}.")


def check_last(who: Who, x: Tensor, shape: tuple[int, ...], *affine: Tensor | None) -> None:
    """Raise InputError where `x` is not a floating-point tensor whose last dimensions are `shape`, as are `affine`."""
    if not shape:
        raise InputError(f"{who()} expected a normalized_shape of at least one dimension, got none.")
    _check_float(who, x)
    if tuple(x.shape[-len(shape) :]) != shape:
        raise InputError(
            f"{who()} expected last dimensions {shape}, got shape {tuple(x.shape)}: {_advice_for_last(x, shape)}."
        )
    for name, tensor in zip(("weight", "bias"), affine, strict=False):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise InputError(f"{who()} expected a {name} of shape {shape}, got {tuple(tensor.shape)}.")


def _advice_for_last(x: Tensor, shape: tuple[int, ...]) -> str:
    if len(shape) == 1 and x.dim() > 2 and x.shape[1] == shape[0]:
        return "for channels in dimension 1 use ChannelLayerNorm, or move them with x.movedim(1, -1)"
    return f"construct it with normalized_shape={tuple(x.shape[-len(shape) :])}"


def check_width(who: Who, width: int) -> None:
    """Raise DegenerateStatisticsError where a statistic with a mean is of a single value."""
    if width == 1:
        raise DegenerateStatisticsError(
            f"{who()} expected more than one value per statistic, got a normalized shape of one value, whose variance"
            " is zero and whose output would be the bias: normalise over more, or use an identity."
        )


def check_channels_first(who: Who, x: Tensor, channels: int | None, *affine: Tensor | None) -> None:
    """Raise InputError where `x` is not floating point (N, `channels`, *), or `affine` are not one per channel."""
    if x.dim() < 2:
        raise InputError(f"{who()} expected (N, C, *), got {tuple(x.shape)}: one sample needs x.unsqueeze(0).")
    _check_float(who, x)
    if channels is not None and x.shape[1] != channels:
        advice = "move them with x.movedim(-1, 1)" if x.shape[-1] == channels else f"construct it for {x.shape[1]}"
        raise InputError(f"{who()} expected {channels} channels in dimension 1, got shape {tuple(x.shape)}: {advice}.")
    for name, tensor in zip(("weight", "bias"), affine, strict=False):
        if tensor is not None and tuple(tensor.shape) != (x.shape[1],):
            raise InputError(f"{who()} expected a {name} of shape ({x.shape[1]},), got {tuple(tensor.shape)}.")


def check_groups(who: Who, num_groups: int, channels: int) -> None:
    """Raise InputError where `num_groups` groups of one size cannot be made of the channels."""
    if num_groups < 1 or channels % num_groups:
        divisors = [str(d) for d in range(1, channels + 1) if channels % d == 0]
        raise InputError(
            f"{who()} expected a number of groups that divides {channels} channels, got {num_groups}: take one of"
            f" {', '.join(divisors)}."
        )


def check_several(who: Who, x: Tensor, num_groups: int) -> None:
    """Raise DegenerateStatisticsError where a group of a sample of `x` (N, C, *) is a single value."""
    if x.shape[1] // num_groups * math.prod(x.shape[2:]) == 1 and x.shape[0]:
        raise DegenerateStatisticsError(
            f"{who()} expected more than one value per sample and group, got shape {tuple(x.shape)} in {num_groups}"
            f" {'group' if num_groups == 1 else 'groups'}, with a variance of zero and the bias as output: use fewer"
            " groups, larger inputs, or an identity here."
        )


def check_extras(who: Who, x: Tensor, residual: Tensor | None, activation: str | None, mask: Tensor | None) -> None:
    """Raise InputError for a residual, an activation or a mask that does not go with `x` (N, C, *)."""
    check_same_shape(who, "residual", residual, x)
    check_activation(who, activation)
    expected = (x.shape[0], *x.shape[2:])
    if mask is not None and (mask.dtype != torch.bool or tuple(mask.shape) != expected):
        raise InputError(
            f"{who()} expected a mask {expected} of torch.bool, True where a value is valid, got {tuple(mask.shape)}"
            f" of {mask.dtype}."
        )


def check_activation(who: Who, activation: str | None) -> None:
    """Raise InputError where there is no such activation."""
    if activation is not None and activation not in ACTIVATIONS:
        raise InputError(f"{who()}: activation must be None or one of {', '.join(ACTIVATIONS)}, got {activation!r}.")


def check_same_shape(who: Who, name: str, tensor: Tensor | None, x: Tensor) -> None:
    """Raise InputError where a tensor that is added to `x` has another shape."""
    if tensor is not None and tensor.shape != x.shape:
        raise InputError(
            f"{who()} expected {name} in the shape of x, {tuple(x.shape)}, got {tuple(tensor.shape)}: expand it first."
        )


def about_single_value(name: str, x: Tensor, advice: str) -> str:
    """Why one value per channel cannot be normalised in training, what usually brings it about, and what to do."""
    what, where, more = "one sample", "", ""
    if x.dim() > 2:
        what, where = "one sample with one position", " behind a pooling to 1x1"
        more = " and more than one sample per batch"
    return (
        f"{name} expected more than one value per channel in training, got shape {tuple(x.shape)}, whose variance is"
        f" zero: this is {what}, often the last, ragged batch of an epoch{where}: use drop_last=True in the"
        f" DataLoader{more}, or {advice}."
    )


def _check_float(who: Who, x: Tensor) -> None:
    if not x.is_floating_point():
        raise InputError(f"{who()} expected a floating-point tensor, got {x.dtype}: convert it with x.float().")
