"""One layer becomes one of another class, and can be put back."""

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from steadynorm.convert.classes import named
from steadynorm.convert.targets import ASIDE, BATCH_SETTINGS, EARLIER, Plan
from steadynorm.convert.tensors import OWN, take_back, take_off
from steadynorm.errors import InputError
from steadynorm.functional import shapes
from steadynorm.layers import GroupNorm, LayerNorm, RMSNorm
from steadynorm.layers.batch import BatchNorm
from steadynorm.layers.frozen import FrozenBatchNorm
from steadynorm.layers.running import STATISTICS
from steadynorm.layers.weight.target import own_class, set_class
from steadynorm.layers.wide import WideBuffers, widened


def snapshot(layer: nn.Module) -> Callable[[], None]:
    """A function that takes back what `become` does to `layer`."""
    cls, attributes = type(layer), dict(vars(layer))
    registered = [(registry, dict(registry)) for registry in (layer._parameters, layer._buffers, layer._modules)]
    gradients = [(parameter, parameter.grad) for parameter in layer.parameters(recurse=False)]

    def restore() -> None:
        layer.__class__ = cls
        vars(layer).clear()
        vars(layer).update(attributes)
        for registry, entries in registered:
            registry.clear()
            registry.update(entries)  # type: ignore[arg-type]
        for parameter, gradient in gradients:
            parameter.grad = gradient

    return restore


def become(layer: nn.Module, plan: Plan) -> str:
    """Carry out a plan.

    Returns: what is to be known about it, for the log.

    Raises:
        InputError: the class that it becomes would not take it; `layer` is then half of each, to be put back.
    """
    _ensure_no_clash(layer, plan)
    was_wide, note = isinstance(layer, WideBuffers), ""
    set_class(layer, plan.cls)
    attributes = vars(layer)
    asides = attributes.pop(ASIDE, {})
    dropped = {name: attributes.pop(name) for name in (*plan.drop, EARLIER) if name in attributes}
    attributes.update(plan.attributes)
    if plan.earlier:
        attributes[EARLIER] = plan.earlier
    if plan.returns:
        note = take_back(layer, asides.pop(plan.returns, {}))
    kept = take_off(layer, plan)
    if plan.keeps:
        dropped.pop(EARLIER, None)
        asides = {**asides, plan.keeps: {"attributes": dropped, **kept}}
    if asides:
        attributes[ASIDE] = asides
    _check(layer)
    if isinstance(layer, WideBuffers):
        layer._widen_buffers()
    elif was_wide:
        note = "; ".join(filter(None, (note, _narrow_buffers(layer))))
    return note


def _ensure_no_clash(layer: nn.Module, plan: Plan) -> None:
    """Refuse what somebody has put on the layer under a name that means something to the new class only."""
    tensors = (*layer._parameters, *layer._buffers, *layer._modules)
    known = (*plan.attributes, *plan.drop, *OWN)
    old = own_class(layer)
    clashes = [
        name
        for name in (*vars(layer), *tensors)
        if name not in known and hasattr(plan.cls, name) and not hasattr(old, name)
    ]
    own = (*BATCH_SETTINGS, *plan.drop, *(name for name in plan.attributes if hasattr(old, name)))
    clashes += [name for name in plan.attributes if name in vars(layer) and name not in own]
    if clashes:
        raise InputError(
            f"has an attribute {clashes[0]!r} that is not {named(old)}'s, and means something else on a"
            f" {named(plan.cls)}: rename it"
        )


def _check(layer: nn.Module) -> None:
    """Raise InputError for what the constructor of our class would not take."""

    def who() -> str:
        return f"as a {named(own_class(layer))}"

    if isinstance(layer, BatchNorm | FrozenBatchNorm):
        layer._check_settings()
    elif isinstance(layer, GroupNorm | LayerNorm | RMSNorm):
        shapes.check_eps(who, layer.eps)
        if isinstance(layer, LayerNorm):
            shapes.check_width(who, math.prod(layer.normalized_shape))


def _narrow_buffers(layer: nn.Module) -> str:
    """Running statistics in the dtype of a half-precision weight: torch.nn computes with no other."""
    weight, note = getattr(layer, "weight", None), ""
    if not isinstance(weight, torch.Tensor) or widened(weight.dtype) == weight.dtype:
        return note
    for name in STATISTICS:
        wide = layer._buffers.get(name)
        if wide is None or is_lazy(wide):
            continue
        narrow = wide.to(weight.dtype)
        layer._buffers[name] = narrow
        if not wide.is_meta and not torch.equal(narrow.to(wide.dtype), wide):
            note = f"running statistics rounded to {weight.dtype}"
    return note
