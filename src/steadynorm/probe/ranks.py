"""The processes of a distributed training, and whether their running statistics are the same."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from steadynorm import models
from steadynorm.errors import InputError
from steadynorm.probe.drift import divergence
from steadynorm.probe.training_facts import Ranks
from steadynorm.training.processes import gathered


def ranks(model: nn.Module, across_ranks: bool) -> Ranks | None:
    """The process group and how the model is wrapped for it; None where there is neither.

    Args:
        across_ranks: every process is here, with the same model: running statistics are compared.

    Raises:
        InputError: `across_ranks` without processes, or with other layers on another one.
        DistributedError: a process is gone, or did not come within the timeout of the group.
    """
    wrapped = {path: m for path, m in model.named_modules() if isinstance(m, DistributedDataParallel)}
    is_on = dist.is_available() and dist.is_initialized()
    if across_ranks and not is_on:
        raise InputError(
            "across_ranks got True, and torch.distributed is not initialised: there are no other processes."
        )
    if not wrapped and not is_on:
        return None
    # The first is the name from torch 2.13 on.
    names = ("forward_sync_buffers", "broadcast_buffers")
    layers = models.norms(model)
    around = {path: wrapper for path in layers if (wrapper := _around(path, wrapped)) is not None}
    apart, synchronised_on = _compared(layers) if across_ranks else (None, None)
    return Ranks(
        processes=dist.get_world_size() if is_on else 1,
        keeps_buffers_apart=any(getattr(w, name, True) is False for w in wrapped.values() for name in names),
        apart=apart,
        synchronised={
            path: _members(getattr(layer, "process_group", None)) for path, layer in layers.items() if is_sync(layer)
        }
        if is_on
        else {},
        trained={path: _members(wrapper.process_group) for path, wrapper in around.items()} if is_on else {},
        unreduced={path: own for path, wrapper in around.items() if (own := _unreduced(layers[path], wrapper))},
        synchronised_on=synchronised_on,
    )


def is_sync(layer: nn.Module) -> bool:
    """Whether it is a norm whose batch is that of several processes, torch's or ours."""
    return models.norm_kind(layer) == "sync"


def _around(path: str, wrapped: Mapping[str, DistributedDataParallel]) -> DistributedDataParallel | None:
    """The innermost wrapper that a module is in."""
    inside = [place for place in wrapped if not place or path.startswith(f"{place}.")]
    return wrapped[max(inside, key=len)] if inside else None


def _members(group: Any) -> tuple[int, ...]:
    """The processes of a group by their rank among all; None is all of them."""
    return tuple(dist.get_process_group_ranks(dist.group.WORLD if group is None else group))


def _unreduced(layer: nn.Module, wrapper: DistributedDataParallel) -> tuple[str, ...]:
    """Names of the parameters that take a gradient and came after the wrapper had counted its own."""
    known = getattr(wrapper, "_module_parameters", None)  # private: where it is gone nothing is said
    if known is None:
        return ()
    ids = {id(parameter) for parameter in known}
    # Those that it was told to ignore are none of its own, and that is meant.
    ignored = {id(p) for name, p in wrapper.module.named_parameters() if name in wrapper.parameters_to_ignore}
    parameters = layer.named_parameters(recurse=False)
    return tuple(name for name, p in parameters if p.requires_grad and id(p) not in ids | ignored)


def _compared(layers: Mapping[str, nn.Module]) -> tuple[dict[str, float], dict[str, int]]:
    """The norms of this process against those of the others: how far statistics are apart; what is synchronised."""
    mine = {
        path: (
            [t.detach().cpu() for t in models.running_statistics(layer)]
            if models.has_running_statistics(layer)
            else [],
            is_sync(layer),
        )
        for path, layer in layers.items()
    }
    everyone = gathered(mine, None, "examine")
    first, *others = everyone
    shapes = [{path: [t.shape for t in kept] for path, (kept, _) in each.items()} for each in everyone]
    if any(each != shapes[0] for each in shapes):
        raise InputError("across_ranks got models with other norm layers on other processes: build the same on each.")
    eps = {path: float(getattr(layer, "eps", None) or 0.0) for path, layer in layers.items()}
    apart = {
        path: max((_between(first[path][0], other[path][0], eps[path]) for other in others), default=0.0)
        for path in layers
        if first[path][0]
    }
    counts = {path: sum(each[path][1] for each in everyone) for path in layers}
    return apart, {path: count for path, count in counts.items() if 0 < count < len(everyone)}


def _between(a: list[torch.Tensor], b: list[torch.Tensor], eps: float) -> float:
    # The same bits are the same, also where they are broken: that is another fault.
    is_same = all(torch.equal(*(t.contiguous().view(torch.uint8) for t in pair)) for pair in zip(a, b, strict=True))
    return 0.0 if is_same else divergence((a[0], a[1]), (b[0], b[1]), eps)
