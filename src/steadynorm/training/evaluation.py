"""A model as it is while something is taken from it: in evaluation, in this process alone, and put back exactly."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from steadynorm import models
from steadynorm.samples import map_tensors


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of DDP, DataParallel or a compiled model, whose wrappers talk to other processes."""
    parallel = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    while isinstance(model, parallel) or isinstance(getattr(model, "_orig_mod", None), nn.Module):
        model = model.module if isinstance(model, parallel) else model._orig_mod  # type: ignore[assignment]
    return model


@contextmanager
def evaluation(model: nn.Module, batches: Any) -> Iterator[None]:
    """Every module in evaluation mode, and no running statistic moving; afterwards all is as it was, random states too.

    Modes are set one by one: an overridden train() may do anything. `batches` may have a random generator of its own.
    """
    generators = [g for g in [getattr(batches, "generator", None)] if isinstance(g, torch.Generator)]
    is_sharded = any(hasattr(parameter, "device_mesh") for parameter in model.parameters())
    # The parameters of FSDP come and go while it runs, and are its own to put back.
    kept = _modes_and_buffers(model) if is_sharded else nullcontext()
    # What is compiled inside of the model would have to be compiled again, with hooks.
    eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
    remembered = models.undisturbed(nn.Identity() if is_sharded else model, *generators)
    with remembered, kept, eager, torch.no_grad():
        for module in model.modules():
            module.training = False
            if getattr(module, "update_running", None) is not None:
                module.update_running = False  # type: ignore[assignment]
        yield


@contextmanager
def _modes_and_buffers(model: nn.Module) -> Iterator[None]:
    """The modes and buffers of a model afterwards as before."""
    modules = {m: (m.training, getattr(m, "update_running", None)) for m in model.modules()}
    buffers = {buffer: buffer.clone() for buffer in model.buffers()}
    try:
        yield
    finally:
        for module, (mode, updates) in modules.items():
            module.training = mode
            if updates is not None:
                module.update_running = updates
        with torch.no_grad():
            for buffer, value in buffers.items():
                buffer.copy_(value)


def call(model: nn.Module, batch: Any) -> Any:
    """`model` on a batch: a tensor, a tuple that begins with the input, or a dictionary of arguments."""
    given = batch[0] if isinstance(batch, tuple | list) else batch
    if isinstance(given, Mapping):
        return model(**given)
    return model(*given) if isinstance(given, tuple | list) else model(given)


def on_device(device: torch.device, batch: Any) -> Any:
    """A batch on `device`: its tensors, or all of it where it is an object that can go there."""
    if not isinstance(batch, Mapping | list | tuple) and callable(getattr(batch, "to", None)):
        return batch.to(device)
    return map_tensors(lambda tensor: tensor.to(device), batch)
