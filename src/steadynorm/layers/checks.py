"""What a layer says about a tensor it cannot take, and the mask that lengths stand for."""

import re
import sys
from typing import Any

import torch
from torch import Tensor, nn

from steadynorm.errors import InputError, module_path

SHAPES = {2: "(N, C)", 3: "(N, C, L)", 4: "(N, C, H, W)", 5: "(N, C, D, H, W)"}
LAYER_FOR = {2: "BatchNorm1d", 3: "BatchNorm1d", 4: "BatchNorm2d", 5: "BatchNorm3d"}


def name(module: nn.Module) -> str:
    """How messages call a layer: "BatchNorm2d at features.3", or its class where no model is being called."""
    kind = type(module).__name__
    # The walk up the call stack is not for a compiler to trace; one that is not in use is not worth importing.
    walk = torch.compiler.disable(module_path) if "torch._dynamo" in sys.modules else module_path
    path = walk(module).removeprefix("_orig_mod.")
    return kind if path == kind else f"{kind} at {path}"


# What torch.compiler.assume_constant_result does, less the import of the compiler, which takes longer than ours.
name._dynamo_marked_constant = True  # type: ignore[attr-defined]


def check_input(module: nn.Module, x: Tensor, ranks: tuple[int, ...], channels: int | None) -> None:
    """Raise InputError where `x` is not a floating-point tensor (N, `channels`, *) of one of the `ranks`."""
    if x.dim() not in ranks:
        raise InputError(_about_rank(module, x, ranks))
    if not x.is_floating_point():
        raise InputError(f"{name(module)} expected a floating-point tensor, got {x.dtype}: convert it with x.float().")
    if channels is not None and x.shape[1] != channels:
        advice = f"construct it with num_features={x.shape[1]}"
        if x.shape[-1] == channels:
            advice = "move them with x.movedim(-1, 1)"
        raise InputError(
            f"{name(module)} expected {channels} channels in dimension 1, got shape {tuple(x.shape)}: {advice}."
        )


def _about_rank(module: nn.Module, x: Tensor, ranks: tuple[int, ...]) -> str:
    expected = " or ".join(SHAPES[rank] for rank in ranks)
    if x.dim() in LAYER_FOR:
        advice = f"use {_sibling(module, x.dim())} for {SHAPES[x.dim()]}"
        if x.dim() + 1 in ranks:
            advice += ", or x.unsqueeze(0) for one sample"
    else:
        advice = "one sample needs x.unsqueeze(0)" if x.dim() + 1 in ranks else "reshape it"
    return f"{name(module)} expected {expected}, got {tuple(x.shape)}: {advice}."


def _sibling(module: nn.Module, rank: int) -> str:
    """The class of the family of `module` that takes `rank` dimensions; BatchNorm's where the family has none."""
    family = next((cls.__name__ for cls in type(module).__mro__ if cls.__module__.startswith(__package__)), "")
    sibling = re.sub(r"\dd$", LAYER_FOR[rank][-2:], family).removeprefix("Lazy")
    return sibling if hasattr(sys.modules[__package__], sibling) else LAYER_FOR[rank]


_sibling._dynamo_marked_constant = True  # type: ignore[attr-defined]


def check_choices(module: nn.Module, choices: dict[str, tuple[Any, ...]]) -> None:
    """Raise InputError where an attribute of `module` is none of its `choices`."""
    for setting, allowed in choices.items():
        value = getattr(module, setting)
        if value not in allowed:
            listed = ", ".join(repr(choice) for choice in allowed)
            raise InputError(f"{name(module)}: {setting} must be one of {listed}, got {value!r}.")


def valid(module: nn.Module, x: Tensor, mask: Tensor | None, lengths: Tensor | None) -> Tensor | None:
    """The mask that a call means by `mask` or `lengths`; InputError where it cannot be one."""
    if mask is not None and lengths is not None:
        raise InputError(f"{name(module)} got both mask and lengths, expected one: lengths are a mask.")
    if lengths is not None:
        return mask_from(module, lengths, x)
    if mask is not None:
        check_mask(module, mask, x)
    return mask


def mask_from(module: nn.Module, lengths: Tensor, x: Tensor) -> Tensor:
    """The mask (N, *spatial) of `x` (N, C, *spatial) that is true in the first `lengths[n]` places of the last axis."""
    if x.dim() < 3:
        raise InputError(
            f"{name(module)} expected lengths only with {SHAPES[3]} or more, got {tuple(x.shape)}: there is no axis to"
            " count along, so give mask."
        )
    is_integer = not (lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool)
    if lengths.shape != x.shape[:1] or not is_integer:
        raise InputError(
            f"{name(module)} expected lengths ({x.shape[0]},) of an integer dtype, got {tuple(lengths.shape)} of"
            f" {lengths.dtype}: one number of valid positions per sample."
        )
    n, _, *spatial = x.shape
    positions = torch.arange(spatial[-1], device=x.device)
    valid = positions < lengths.to(x.device).view(n, *[1] * len(spatial))
    return valid.expand(n, *spatial)


def check_mask(module: nn.Module, mask: Tensor, x: Tensor) -> None:
    """Raise InputError where `mask` is not bool (N, *spatial) for `x` (N, C, *spatial)."""
    expected = (x.shape[0], *x.shape[2:])
    if mask.shape != expected or mask.dtype != torch.bool:
        raise InputError(
            f"{name(module)} expected a mask {tuple(expected)} of torch.bool, True where a value is valid, got"
            f" {tuple(mask.shape)} of {mask.dtype}."
        )
