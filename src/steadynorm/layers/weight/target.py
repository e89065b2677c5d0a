"""The tensor that a parametrization is put on: what is asked of it, and what older state_dicts call its parts."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from steadynorm.errors import InputError
from steadynorm.layers import checks

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def output_dim(module: nn.Module) -> int:
    """Which dimension of the weight of `module` counts its outputs: 1 in a transposed convolution, else 0."""
    return int(isinstance(module, TRANSPOSED))


def find(module: nn.Module, name: str, does: str) -> Tensor:
    """The tensor `name` of `module`, or InputError if it cannot be parametrized. `does` says for what, in messages."""
    tensor = getattr(module, name, None)
    if not isinstance(tensor, Tensor):
        raise InputError(f"{checks.name(module)} has no tensor named {name!r} to put {does} on: give name=.")
    if is_lazy(tensor):
        raise InputError(f"{checks.name(module)}.{name} has no shape yet: run one batch through it before {does}.")
    if not tensor.is_floating_point():
        raise InputError(f"{checks.name(module)}.{name} is {tensor.dtype}, expected floating point for {does}.")
    return tensor


def check_eps(module: nn.Module, eps: float) -> None:
    """Raise InputError where eps is not positive."""
    if not eps > 0:
        raise InputError(f"{checks.name(module)}: eps must be positive, got {eps}.")


def check_dim(module: nn.Module, name: str, tensor: Tensor, dim: int | None) -> None:
    """Raise InputError where `tensor` has no dimension `dim`, counted from the front."""
    if dim is not None and not 0 <= dim < tensor.dim():
        raise InputError(
            f"{checks.name(module)}: dim must be from 0 to {tensor.dim() - 1} for {name} of shape"
            f" {tuple(tensor.shape)}, got {dim}."
        )


def is_parametrized(module: nn.Module, name: str) -> bool:
    """Whether the tensor `name` of `module` is computed from others."""
    return parametrize.is_parametrized(module, name)


def parts(module: nn.Module, kind: type[nn.Module]) -> list[str]:
    """Names of the tensors of `module` that are parametrized by a `kind`."""
    if not parametrize.is_parametrized(module):
        return []
    lists: Any = module.parametrizations
    return [name for name, steps in lists.items() if any(isinstance(step, kind) for step in steps)]


def refuse_twice(module: nn.Module, name: str, kind: type[nn.Module], does: str) -> None:
    """Raise InputError where the tensor already has a parametrization of this `kind`."""
    if name in parts(module, kind):
        raise InputError(f"{checks.name(module)}.{name} has {does} already: make_plain takes it off.")


def attach(module: nn.Module, name: str, step: nn.Module) -> None:
    """Parametrize a tensor that `find` has passed, and let the module load what torch's older functions saved."""
    # Unsafe leaves out torch's check of shape and dtype, which costs an evaluation, with a power iteration in it.
    parametrize.register_parametrization(module, name, step, unsafe=True)
    hooks: Any = module._load_state_dict_pre_hooks
    if not any(_is_ours(hook) for hook in hooks.values()):
        module.register_load_state_dict_pre_hook(_read_older)


def _read_older(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Rename what torch.nn.utils.weight_norm and spectral_norm, of before parametrizations, called the parts."""
    lists: Any = module.parametrizations if parametrize.is_parametrized(module) else {}
    for name, steps in lists.items():
        older: dict[str, str] = getattr(steps[0], "older", {})
        if older and all(prefix + name + ending in state_dict for ending in older):
            for ending, new in older.items():
                state_dict[f"{prefix}parametrizations.{name}.{new}"] = state_dict.pop(prefix + name + ending)


def _is_ours(hook: Any) -> bool:
    return getattr(hook, "hook", None) is _read_older


def forget_older(module: nn.Module) -> None:
    """Take off what `attach` added, so that a module made plain needs nothing of ours; and what torch's adds.

    Torch's is a function inside a function, for whose sake the module could not be pickled.
    """
    hooks: Any = module._load_state_dict_pre_hooks
    for key, hook in list(hooks.items()):
        inner = getattr(getattr(hook, "hook", None), "__name__", "")
        if _is_ours(hook) or inner == "_weight_norm_compat_hook":
            del hooks[key]


def autocast_off(x: Tensor) -> torch.autocast:
    """A context in which products stay in the dtype of their factors."""
    return torch.autocast(x.device.type, enabled=False)


def own_class(layer: nn.Module) -> type[nn.Module]:
    """The class of a layer, without what torch's parametrizations have put over it."""
    cls = type(layer)
    return cls.__bases__[0] if parametrize.is_parametrized(layer) else cls


def set_class(layer: nn.Module, cls: type[nn.Module]) -> None:
    """Make `layer` one of `cls`; what torch's parametrizations have put over its class goes over the new one."""
    over = vars(type(layer)) if parametrize.is_parametrized(layer) else {}
    layer.__class__ = cls
    if over:
        parametrize._inject_new_class(layer)
        for name, value in over.items():
            if isinstance(value, property) or name == "__deepcopy__":
                setattr(type(layer), name, value)
