"""The layers whose inside is known: linear ones, batch norms, and what does nothing in evaluation."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from steadynorm import layers, models
from steadynorm.convert.classes import additions, is_ours, named
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
NORMS: tuple[type[nn.Module], ...] = (*_OUR_NORMS, *_TORCH_NORMS)
"""Batch norms that are known, the particular ones first."""

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "relu6": nn.ReLU6,
    "hardswish": nn.Hardswish,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "elu": nn.ELU,
}
"""What our layers call their activation, and the module of torch.nn that computes it."""


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
    """Whether a layer is one that can take in a norm."""
    return known(module, LINEARS) and is_bare(module) and _is_plain(module._parameters.get("weight"))


def is_passing(module: nn.Module) -> bool:
    """Whether a module gives back its input as it is."""
    return known(module, PASSING) and is_bare(module) and (not module.training or type(module) is nn.Identity)


def is_norm(module: nn.Module) -> bool:
    """Whether a layer is a batch norm of which all is known but its settings."""
    return known(module, NORMS) and is_bare(module)


def units(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of a model whose inside is known, by path."""
    return {
        path: module
        for path, module in model.named_modules()
        if is_linear(module) or is_norm(module) or is_passing(module)
    }


def normalizations(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Everything in a model that normalises, what cannot be folded too."""
    for path, module in model.named_modules():
        if models.norm_kind(module) is not None or is_ours(type(module)):
            yield path, module


def why_not(norm: nn.Module) -> str:
    """Why a normalization is not one scale and one shift per channel, whatever is around it; empty where it is."""
    kind = models.norm_kind(norm)
    if kind == "instance" and models.has_running_statistics(norm):
        return "it is an instance norm with running statistics, which is not folded"
    if kind in ("instance", "group", "layer", "rms"):
        return "it normalises within the sample: its statistics are not constants"
    if not known(norm, NORMS):
        return f"{named(type(norm))} is not a batch norm of torch.nn or steadynorm: what it computes is not known"
    if not is_bare(norm):
        return "it has hooks or a forward of its own, which would see something else"
    if not models.has_running_statistics(norm):
        return "it has no running statistics: it normalises by the batch in evaluation too"
    tensors = [t for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias) if isinstance(t, Tensor)]
    if any(is_lazy(tensor) or tensor.is_meta for tensor in tensors):
        return "it has no values yet: run a batch through it, or load weights"
    if isinstance(norm, FrozenBatchNorm):
        return ""
    if isinstance(norm, _BatchNorm) and models.uses_batch_statistics(norm):
        return "it is in training mode: it normalises by the batch"
    if getattr(norm, "update_running", None):
        return "its running statistics move in evaluation too (update_running)"
    return ""


def activation_of(norm: nn.Module) -> nn.Module | None:
    """The activation of a norm as a module of torch.nn; None where it has none."""
    name: Any = getattr(norm, "activation", None)
    return None if name is None else ACTIVATIONS[name]().eval()


def _is_plain(weight: Any) -> bool:
    return (
        isinstance(weight, nn.Parameter)
        and type(weight.data) is Tensor
        and not is_lazy(weight)
        and not weight.is_meta
        and weight.is_floating_point()
    )
