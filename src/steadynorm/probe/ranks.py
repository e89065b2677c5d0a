"""The processes of a distributed training, and whether their running statistics are the same."""

import torch
from torch import nn

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
    wrapped = [m for m in model.modules() if isinstance(m, nn.parallel.DistributedDataParallel)]
    is_on = torch.distributed.is_available() and torch.distributed.is_initialized()
    if across_ranks and not is_on:
        raise InputError(
            "across_ranks got True, and torch.distributed is not initialised: there are no other processes."
        )
    if not wrapped and not is_on:
        return None
    # The first is the name from torch 2.13 on.
    names = ("forward_sync_buffers", "broadcast_buffers")
    apart = any(getattr(wrapper, name, True) is False for wrapper in wrapped for name in names)
    processes = torch.distributed.get_world_size() if is_on else 1
    return Ranks(processes, apart, _apart(model) if across_ranks else None)


def _apart(model: nn.Module) -> dict[str, float]:
    """By path, the largest divergence of the running statistics of a process from those of the first."""
    layers = {path: layer for path, layer in models.norms(model).items() if models.has_running_statistics(layer)}
    mine = {path: [t.detach().cpu() for t in models.running_statistics(layer)] for path, layer in layers.items()}
    first, *others = gathered(mine, None, "examine")
    shapes = [{path: mean.shape for path, (mean, _) in each.items()} for each in (first, *others)]
    if any(each != shapes[0] for each in shapes):
        raise InputError("across_ranks got models with other norm layers on other processes: build the same on each.")
    eps = {path: float(getattr(layer, "eps", None) or 0.0) for path, layer in layers.items()}
    return {
        path: max((_between(first[path], other[path], eps[path]) for other in others), default=0.0) for path in layers
    }


def _between(a: list[torch.Tensor], b: list[torch.Tensor], eps: float) -> float:
    # The same bits are the same, also where they are broken: that is another fault.
    is_same = all(torch.equal(*(t.contiguous().view(torch.uint8) for t in pair)) for pair in zip(a, b, strict=True))
    return 0.0 if is_same else divergence((a[0], a[1]), (b[0], b[1]), eps)
