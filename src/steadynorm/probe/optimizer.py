"""Which parameters of a model an optimizer holds, and with how much weight decay."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from steadynorm.blame import in_a_line
from steadynorm.errors import InputError
from steadynorm.probe.training_facts import Held

Optimizers = Optimizer | Callable[[list[nn.Parameter]], Optimizer]
"""An optimizer over a model's parameters, or a function that makes one from those that take a gradient."""


def made(optimizer: Optimizers, model: nn.Module) -> Optimizer | None:
    """The optimizer itself, or what the function makes of the parameters that take a gradient; None if none does.

    Raises:
        InputError: it is neither, or the function raises.
    """
    if isinstance(optimizer, Optimizer):
        return optimizer
    expected = "expected an optimizer of torch.optim, or a function (parameters) -> optimizer"
    if not callable(optimizer):
        raise InputError(f"optimizer is {type(optimizer).__name__}: {expected}.")
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        return None
    try:
        found = optimizer(trainable)
    except Exception as error:
        raise InputError(f"optimizer raised {in_a_line(error)}: {expected}.") from error
    if not isinstance(found, Optimizer):
        raise InputError(f"optimizer gave {type(found).__name__}: {expected}.")
    return found


def held(optimizer: Optimizer, model: nn.Module) -> Held:
    """What the groups of `optimizer` hold of `model`."""
    names = {id(p): name for name, p in model.named_parameters()}
    decays: dict[str, float] = {}
    found, foreign = set[str](), 0
    for group in optimizer.param_groups:
        decay = float(group.get("weight_decay") or 0.0)
        for parameter in group["params"]:
            if id(parameter) not in names:
                foreign += 1
                continue
            name = names[id(parameter)]
            found.add(name)
            if decay > 0:
                decays[name] = decay
    trainable = tuple(name for name, p in model.named_parameters() if p.requires_grad)
    return Held(frozenset(found), decays, foreign, trainable)


def remember_optimizer(optimizer: Optimizer) -> Callable[[], None]:
    """A function that puts the state and the settings of an optimizer back, in place, bit for bit."""
    states = {parameter: (state, dict(state)) for parameter, state in optimizer.state.items()}
    tensors = [t for _, state in states.values() for t in state.values() if isinstance(t, Tensor)]
    values = [t.detach().clone() for t in tensors]
    others = {
        parameter: {k: copy.deepcopy(v) for k, v in state.items() if not isinstance(v, Tensor)}
        for parameter, (_, state) in states.items()
    }
    groups: list[dict[str, Any]] = [
        {k: copy.deepcopy(v) for k, v in group.items() if k != "params"} for group in optimizer.param_groups
    ]
    params = {id(p): (p, p.detach().clone()) for group in optimizer.param_groups for p in group["params"]}

    def restore() -> None:
        for parameter in [p for p in optimizer.state if p not in states]:
            del optimizer.state[parameter]
        for parameter, (own, state) in states.items():
            own.clear()
            own.update({**state, **others[parameter]})
            optimizer.state[parameter] = own
        with torch.no_grad():
            for tensor, value in zip(tensors, values, strict=True):
                tensor.copy_(value)
            for parameter, value in params.values():
                parameter.copy_(value)
        for group, settings in zip(optimizer.param_groups, groups, strict=True):
            group.update(settings)

    return restore
