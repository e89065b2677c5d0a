"""Layers with a forward pass of their own, made plain as one was told, after a look at whether that is the same."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from steadynorm import models
from steadynorm.convert.become import become
from steadynorm.convert.classes import OURS, TORCHS, is_ours, named, origin
from steadynorm.convert.targets import Plan
from steadynorm.errors import InputError
from steadynorm.layers.layer import ChannelLayerNorm
from steadynorm.layers.weight.target import own_class

Told = Mapping[type[nn.Module], Callable[[Any], nn.Module]]
"""For a class, a function that takes a layer of it and gives the plain normalization that computes the same."""

SEED = 0
SAMPLES, WIDTH = 4, 5
# Some compute in float32, whatever they are given.
TOLERANCE = 1e-5
# Deviations of the input, and of what is remembered: where they are small, another eps is another result.
DEVIATIONS = (1.0, 1e-3)


def made_plain_(layer: nn.Module, told: Told) -> str | None:
    """Make `layer` what it was told to be, in place: the class and settings of that, with its own tensors.

    Both are run on random values in float64, in evaluation and in training, and have to give the same output and the
    same running statistics.

    Returns: what is to be known about it; None if nothing was told about its class.

    Raises:
        InputError: what was told does not compute the same, or does not have the same tensors.
    """
    cls = own_class(layer)
    say = next((told[one] for one in cls.__mro__ if one in told), None)
    if say is None:
        return None
    if "forward" in vars(layer):
        raise InputError("has a forward of its own, set on the layer, which would go on as it is")
    plain = say(layer)
    _ensure_plain(layer, plain)
    _ensure_alike(layer, plain)
    settings = {name: value for name, value in vars(plain).items() if not name.startswith("_") and name != "training"}
    parts, constants = tuple(layer._modules), tuple(name for name in layer._parameters if name in plain._buffers)
    layer._modules.clear()
    become(layer, Plan(type(plain), {}, settings, drop=tuple(settings), constants=constants))
    return f"without {', '.join(parts)}" if parts else ""


def _ensure_plain(layer: nn.Module, plain: Any) -> None:
    cls, kind = named(own_class(layer)), type(plain)
    is_plain = isinstance(plain, nn.Module) and (kind in OURS or kind in TORCHS or _is_relative(kind))
    if not is_plain:
        raise InputError(f"is a {cls}, for which as_= gave a {named(kind)}, expected a layer of torch.nn or steadynorm")
    shapes = [{name: tensor.shape for name, tensor in _tensors(one).items()} for one in (layer, plain)]
    if shapes[0] != shapes[1]:
        raise InputError(
            f"is a {cls} with the tensors {_listed(shapes[0])}, for which as_= gave a {named(kind)} with"
            f" {_listed(shapes[1])}: some would be lost, or are missing"
        )
    trained = [name for name in plain._parameters if name in layer._buffers]
    if trained:
        raise InputError(f"is a {cls} whose {trained[0]} is a buffer, and a {named(kind)} would train it")


def _is_relative(kind: type[nn.Module]) -> bool:
    return is_ours(kind) and kind.__module__.startswith("steadynorm.")


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _listed(shapes: dict[str, torch.Size]) -> str:
    return ", ".join(f"{name} {tuple(shape)}" for name, shape in shapes.items()) or "none"


def _ensure_alike(layer: nn.Module, plain: nn.Module) -> None:
    who, like = f"is a {named(own_class(layer))}", next(iter(_tensors(layer).values()), torch.ones(1))
    for deviation in DEVIATIONS:
        own, other = (_probe(one, deviation).to(like.device) for one in (layer, plain))
        other.load_state_dict(own.state_dict())
        for mode in (False, True):
            try:
                # Both draw the same, if they draw any; random states are afterwards as they were.
                with models.undisturbed(nn.Identity()), torch.no_grad():
                    torch.manual_seed(SEED)
                    x = deviation * _random_input(plain, like)
                    y, expected = type(own).forward(own.train(mode), x.clone()), other.train(mode)(x.clone())
            except InputError:
                raise
            except Exception as error:  # somebody else's code
                raise InputError(f"{who}, which fails on a probe ({error})") from error
            where = "training" if mode else "evaluation"
            if not _is_close(y, expected):
                raise InputError(f"{who}, which does not give in {where} what as_= says")
            if not all(_is_close(buffer, _tensors(other)[name]) for name, buffer in own.named_buffers()):
                raise InputError(f"{who}, which does not remember in {where} what as_= says")


def _probe(module: nn.Module, deviation: float) -> nn.Module:
    probe = copy.deepcopy(module).double()
    for hooks in (probe._forward_hooks, probe._forward_pre_hooks):
        hooks.clear()
    var = probe._buffers.get("running_var")
    if var is not None:
        var.mul_(deviation**2)
    return probe


def _random_input(plain: nn.Module, like: Tensor) -> Tensor:
    shape: tuple[int, ...] = (SAMPLES, len(like) if like.dim() else 1, WIDTH, WIDTH)
    if isinstance(plain, nn.LayerNorm | nn.RMSNorm) and not isinstance(plain, ChannelLayerNorm):
        shape = (SAMPLES, WIDTH, *plain.normalized_shape)
    elif (origin(type(plain)) or type(plain)).__name__[-2:] in ("1d", "2d", "3d"):
        shape = (*shape[:2], *[WIDTH] * int((origin(type(plain)) or type(plain)).__name__[-2]))
    return torch.randn(shape, dtype=torch.float64).to(like.device)


def _is_close(a: Any, b: Tensor) -> bool:
    if not isinstance(a, Tensor) or a.shape != b.shape:
        return False
    return bool((a.double() - b.double()).abs().max() <= TOLERANCE * b.double().abs().max().clamp(min=1e-30))
