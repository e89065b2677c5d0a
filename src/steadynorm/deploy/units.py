"""The layers whose inside is known: linear ones, batch norms, and what does nothing in evaluation."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from steadynorm import layers, models
from steadynorm.convert.classes import additions, is_ours, named
from steadynorm.deploy import inside
from steadynorm.deploy.affine import LINEARS
from steadynorm.layers.frozen import FrozenBatchNorm

PASSING = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_TORCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_OUR_NORMS = (
    layers.SyncBatchNorm,
    *(
        getattr(layers, f"{kind}{dims}d")
        for kind in ("BatchNorm", "GhostBatchNorm", "BatchRenorm", "FrozenBatchNorm")
        for dims in (1, 2, 3)
    ),
)
NORMS: tuple[type[nn.Module], ...] = (*_OUR_NORMS, *_TORCH_NORMS, layers.InputNorm)
"""Batch norms that are known, the particular ones first."""


def known(module: nn.Module, classes: tuple[type[nn.Module], ...]) -> bool:
    """Whether a module computes what one of the classes does: it is one, or a subclass that only has another name."""
    cls = type(module)
    origin = next((base for base in cls.__mro__ if base in classes), None)
    return origin is not None and not additions(cls, origin)


def is_bare(module: nn.Module) -> bool:
    """Whether nothing was put on a module: no hook, no forward of its own, no parametrization, no submodule."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return (
        not any(hooks)
        and "forward" not in vars(module)
        and not parametrize.is_parametrized(module)
        and not module._modules
    )


def is_linear(module: nn.Module) -> bool:
    """Whether a layer is one that can take in a norm that is behind it."""
    # With max_norm an embedding changes its weight when it is called.
    is_constant = getattr(module, "max_norm", None) is None
    return known(module, LINEARS) and is_bare(module) and is_constant and _is_plain(module._parameters.get("weight"))


def is_passing(module: nn.Module) -> bool:
    """Whether a module gives back its input as it is."""
    return known(module, PASSING) and is_bare(module) and (not module.training or type(module) is nn.Identity)


def is_norm(module: nn.Module) -> bool:
    """Whether a layer is a batch norm of which it is known what it computes."""
    if known(module, NORMS):
        return is_bare(module)
    return is_foreign(module) and _has_no_hooks(module) and not isinstance(inside.of_foreign(module), str)


def is_foreign(module: nn.Module) -> bool:
    """Whether a module is somebody else's norm with running statistics, or ours or torch's with code of its own."""
    if isinstance(module, torch.jit.ScriptModule) or known(module, NORMS):
        return False
    return models.norm_kind(module) in ("batch", "sync", "frozen") and models.has_running_statistics(module)


def inside_of(norm: nn.Module) -> inside.Inside:
    """What a norm that is one of the units computes."""
    if known(norm, NORMS):
        return inside.of_known(norm)
    found = inside.of_foreign(norm)
    assert not isinstance(found, str)
    return found


def units(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of a model whose inside is known, by path; what is inside of one is none."""
    found = dict[str, nn.Module]()
    within = list[str]()
    for path, module in model.named_modules():
        if any(path.startswith(outer) for outer in within):
            continue
        if is_linear(module) or is_norm(module) or is_passing(module):
            found[path] = module
            if module._modules:
                within.append(f"{path}.")
    return found


def normalizations(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Everything in a model that normalises, what cannot be folded too."""
    for path, module in model.named_modules():
        if models.norm_kind(module) is not None or is_ours(type(module)) or isinstance(module, layers.InputNorm):
            yield path, module


def why_not(norm: nn.Module) -> str:
    """Why a normalization is not one scale and one shift per channel, whatever is around it; empty where it is."""
    kind = models.norm_kind(norm)
    if kind == "instance" and models.has_running_statistics(norm):
        return "it is an instance norm with running statistics, which is not folded"
    if kind in ("instance", "group", "layer", "rms"):
        return "it normalises within the sample: its statistics are not constants"
    if isinstance(norm, layers.InputNorm):
        return _why_not_input(norm)
    if not models.has_running_statistics(norm):
        return "it has no running statistics: it normalises by the batch in evaluation too"
    if not (is_bare(norm) if known(norm, NORMS) else _has_no_hooks(norm)):
        return "it has hooks or a forward of its own, which would see something else"
    tensors = [t for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias) if isinstance(t, Tensor)]
    if any(is_lazy(tensor) or tensor.is_meta for tensor in tensors):
        return "it has no values yet: run a batch through it, or load weights"
    if isinstance(norm, FrozenBatchNorm) and known(norm, NORMS):
        return ""
    if isinstance(norm, _BatchNorm) and models.uses_batch_statistics(norm):
        return "it is in training mode: it normalises by the batch"
    if getattr(norm, "update_running", None):
        return "its running statistics move in evaluation too (update_running)"
    return "" if known(norm, NORMS) else _why_not_foreign(norm)


def _why_not_input(norm: layers.InputNorm) -> str:
    if not known(norm, NORMS) or not is_bare(norm):
        return "it has hooks or code of its own"
    if norm.missing == "mean":
        return "it fills missing values, which no layer does"
    return "" if bool((norm.num_values > 0).any()) else "it has no statistics yet"


def _why_not_foreign(norm: nn.Module) -> str:
    name = named(type(norm))
    if norm.running_mean.dim() != 1:  # type: ignore[operator]
        return f"{name} has statistics for several domains or steps: which one holds depends on the call"
    if any(module.training for module in norm.modules()):
        return "it is in training mode"
    found = inside.of_foreign(norm)
    return f"{name} is not a batch norm of torch.nn or steadynorm, and {found}" if isinstance(found, str) else ""


def _has_no_hooks(module: nn.Module) -> bool:
    """Whether nothing was put on a module of somebody else's, and on those in it."""
    return all(
        not any((one._forward_hooks, one._forward_pre_hooks, one._backward_hooks, one._backward_pre_hooks))
        and "forward" not in vars(one)
        and not parametrize.is_parametrized(one)
        for one in module.modules()
    )


def _is_plain(weight: Any) -> bool:
    return (
        isinstance(weight, nn.Parameter)
        and type(weight.data) is Tensor
        and not is_lazy(weight)
        and not weight.is_meta
        and weight.is_floating_point()
    )
