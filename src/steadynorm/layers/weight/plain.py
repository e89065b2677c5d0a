"""A weight as it is computed becomes the parameter: for deployment, folding, pickling and export."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm as OldSpectralNorm
from torch.nn.utils.weight_norm import WeightNorm as OldWeightNorm

from steadynorm.layers.weight import target


class _Computed(NamedTuple):
    """A weight that is computed from others, and its value."""

    module: nn.Module
    name: str
    value: Tensor
    trains: bool


def make_plain(model: nn.Module) -> nn.Module:
    """Turn every parametrized tensor of `model` into a plain parameter with the value it has in evaluation.

    The same bits, computed once instead of at every access, and nothing left that needs this package. All
    parametrizations, torch's own too, and the hooks of the older `torch.nn.utils.weight_norm` and `spectral_norm`.

    Args:
        model: changed in place. What an optimizer holds of it is not what it computes with any more.

    Returns: the model.
    """
    # All values first: one that cannot be computed leaves the model as it was.
    new = [_compute(module, name) for module in model.modules() for name in _parametrized(module)]
    old = [(module, hook, _parts(module, hook)) for module in model.modules() for hook in _old_hooks(module)]
    for module in {id(computed.module): computed.module for computed in new}.values():
        # A deepcopy shares the class that torch has made for the module, and removing takes properties off it.
        target.set_class(module, target.own_class(module))
    for computed in new:
        parametrize.remove_parametrizations(computed.module, computed.name)
        target.forget_older(computed.module)
        _set(computed)
    for module, hook, trains in old:
        (remove_weight_norm if isinstance(hook, OldWeightNorm) else remove_spectral_norm)(module, hook.name)
        module.get_parameter(hook.name).requires_grad_(trains)
    return model


def _parametrized(module: nn.Module) -> list[str]:
    lists: Any = module.parametrizations if parametrize.is_parametrized(module) else {}
    return list(lists)


def _compute(module: nn.Module, name: str) -> _Computed:
    lists: Any = module.parametrizations
    modes = {step: step.training for step in lists[name].modules()}
    try:
        # In training a power iteration would move the value that is asked for.
        lists[name].eval()
        with torch.no_grad():
            value = getattr(module, name).detach().clone()
    finally:
        for step, mode in modes.items():
            step.training = mode
    return _Computed(module, name, value, any(part.requires_grad for part in lists[name].parameters(recurse=False)))


def _set(computed: _Computed) -> None:
    """Put the value where torch has left a parameter, or a buffer if it does not train."""
    module, name, value, trains = computed
    left = getattr(module, name)
    if isinstance(left, nn.Parameter):
        left.data = value
        left.grad = None
    else:
        delattr(module, name)
        module.register_parameter(name, nn.Parameter(value, requires_grad=trains))


def _old_hooks(module: nn.Module) -> list[OldWeightNorm | OldSpectralNorm]:
    return [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, OldWeightNorm | OldSpectralNorm)]


def _parts(module: nn.Module, hook: OldWeightNorm | OldSpectralNorm) -> bool:
    """Whether the tensor behind an older hook trains."""
    part = "_v" if isinstance(hook, OldWeightNorm) else "_orig"
    return module.get_parameter(hook.name + part).requires_grad
