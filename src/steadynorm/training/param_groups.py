"""param_groups: weight decay for weights, and none for normalizations and biases."""

import math
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _WeightNorm as TorchWeightNorm
from torch.nn.utils.weight_norm import WeightNorm as OldWeightNorm

from steadynorm import models
from steadynorm.errors import InputError
from steadynorm.layers.weight.norm import WeightNorm
from steadynorm.layers.weight.standardization import WeightStandardization
from steadynorm.selection import Selection, select, several

# Lengths of weight vectors: the first of the two tensors that weight norm makes of one.
LENGTHS, OLD_LENGTHS = "original0", "_g"


def param_groups(model: nn.Module, weight_decay: float, *, no_decay: Selection | None = None) -> list[dict[str, Any]]:
    """The parameters of a model in two groups for an optimizer: with weight decay, and without.

        optimizer = torch.optim.AdamW(param_groups(model, weight_decay=0.05), lr=1e-3)

    Without are the weights and biases of normalizations, all other biases, the lengths of weight norm, the gains of
    weight standardization, and the slopes of PReLU. All else is with: weights of layers, the directions of weight norm,
    embeddings, and what a module of your own holds: positions, class tokens, layer scales; `no_decay` names these.

    Decided by the module that a parameter belongs to, not by its shape or by the module's name in the model. A tied
    parameter is one parameter: without, where any of its places says so. Parameters that do not train are in the groups
    too, so that what is unfrozen later is trained; an optimizer does nothing to a parameter without a gradient.

    Args:
        weight_decay: of the first group; not negative.
        no_decay: more parameters without: a pattern for names (``"embed"`` is all that is inside, ``*`` any
            characters), a class of the module they belong to, several of them, or a function of name and parameter.

    Returns: two groups, ``{"params": [...], "weight_decay": ...}``, parameters in the order of the model, each once;
        a group that would be empty is left out.

    Raises:
        InputError: a negative decay, parameters without values, none at all, or a pattern that fits nothing.
    """
    if not (isinstance(weight_decay, int | float) and 0 <= weight_decay < math.inf):
        raise InputError(f"param_groups got weight_decay={weight_decay!r}, expected a number from 0 on.")
    named = list(model.named_parameters())
    if not named:
        raise InputError("param_groups got a model without parameters.")
    unmade = [name for name, parameter in named if is_lazy(parameter)]
    if unmade:
        raise InputError(
            f"param_groups got {unmade[0]}, which has no values yet: run one batch through the model first."
        )
    without = {id(parameter) for parameter in _without_decay(model)} | _asked_for(model, no_decay)
    groups = [
        {"params": [p for _, p in named if id(p) not in without], "weight_decay": weight_decay},
        {"params": [p for _, p in named if id(p) in without], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _without_decay(model: nn.Module) -> Iterator[Tensor]:
    """Parameters without decay by what they are, in every place where they are."""
    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        if is_normalization(module) or isinstance(module, nn.PReLU):
            yield from own.values()
            yield from _behind(module)
            continue
        yield from (parameter for name, parameter in own.items() if is_bias(name))
        yield from _lengths(module, own)
        if isinstance(module, WeightStandardization) and module.gain is not None:
            yield module.gain


def is_normalization(module: nn.Module) -> bool:
    """Whether a module is a normalization: torch.nn's, ours, made from these, or one of its own of that name.

    Many models bring their own, LlamaRMSNorm or LayerNorm2d, which are no subclass of anything: a module whose class is
    called a norm, and that holds nothing but one tensor or two of one and the same length.
    """
    if models.norm_kind(module) is not None or isinstance(module, nn.modules.batchnorm._NormBase):
        return True
    own = [*module.parameters(recurse=False)]
    sizes = {parameter.numel() for parameter in own}
    is_vector = all(parameter.numel() == max(parameter.shape, default=1) for parameter in own)
    return "norm" in type(module).__name__.lower() and len(own) in (1, 2) and len(sizes) == 1 and is_vector


def is_bias(name: str) -> bool:
    """Whether a parameter is a bias by the name its module gives it: bias, in_proj_bias, bias_ih_l0, bias_k."""
    return name == "bias" or name.startswith("bias_") or name.endswith("_bias")


def _behind(module: nn.Module) -> Iterator[Tensor]:
    """What the parametrized tensors of a module are computed from."""
    if parametrize.is_parametrized(module):
        yield from module.get_submodule("parametrizations").parameters()


def _lengths(module: nn.Module, own: dict[str, nn.Parameter]) -> Iterator[Tensor]:
    """Lengths of weight norm, torch's old and new and ours, and what a parametrized bias is computed from."""
    if parametrize.is_parametrized(module):
        for name, steps in module.get_submodule("parametrizations").named_children():
            if is_bias(name):
                yield from steps.parameters()
            elif isinstance(steps.get_submodule("0"), WeightNorm | TorchWeightNorm):
                yield steps.get_parameter(LENGTHS)
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, OldWeightNorm):
            yield own[hook.name + OLD_LENGTHS]


def _asked_for(model: nn.Module, no_decay: Selection | None) -> set[int]:
    if no_decay is None:
        return set()
    asked: set[int] = set()
    names = [one for one in several(no_decay) if not isinstance(one, type)]
    classes = [one for one in several(no_decay) if isinstance(one, type)]
    if names:
        named = list(model.named_parameters(remove_duplicate=False))
        asked |= {id(p) for _, p in select(named, names, "param_groups(no_decay=)", "parameter")}
    if classes:
        for _, module in select(model.named_modules(), classes, "param_groups(no_decay=)", "module"):
            asked |= {id(p) for p in (*module.parameters(recurse=False), *_behind(module))}
    return asked
