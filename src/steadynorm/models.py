"""Models as we meet them: find, name and replace their layers, and leave a model exactly as it was found."""

import random
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy

from steadynorm.layers.sync import SyncBatchNorm

Kind = Literal["batch", "sync", "instance", "group", "layer", "rms", "frozen"]

# Most particular first: SyncBatchNorm is a _BatchNorm, and so are all of ours that compute over the batch.
KINDS: tuple[tuple[type[nn.Module], Kind], ...] = (
    (nn.SyncBatchNorm, "sync"),
    (SyncBatchNorm, "sync"),
    (_BatchNorm, "batch"),
    (_InstanceNorm, "instance"),
    (nn.GroupNorm, "group"),
    (nn.LayerNorm, "layer"),
    (nn.RMSNorm, "rms"),
)

# Of these a copy is plain and cheap; a subclass of somebody else's may do anything when it is copied.
CONTAINERS = (dict, OrderedDict, list, set)


def norm_kind(module: nn.Module) -> Kind | None:
    """Which normalization a module is, by isinstance, so that subclasses count; None if it is none.

    "frozen" is a module that holds running statistics without being one of torch's norms: the frozen batch norms of
    detection libraries, which normalise by constants.
    """
    for cls, kind in KINDS:
        if isinstance(module, cls):
            return kind
    buffers = dict(module.named_buffers(recurse=False))
    if not {"running_mean", "running_var"} <= buffers.keys():
        return None
    # Statistics by domain or by step, (D, C), are not those of one norm.
    return "frozen" if buffers["running_mean"].dim() == 1 else None


def norms(model: nn.Module) -> dict[str, nn.Module]:
    """The normalization layers of `model` by dotted path, in the order of definition; a shared layer comes once."""
    return {path: module for path, module in model.named_modules() if norm_kind(module) is not None}


def has_running_statistics(module: nn.Module) -> bool:
    """Whether a norm layer holds a running mean and variance."""
    return isinstance(getattr(module, "running_mean", None), Tensor) and isinstance(
        getattr(module, "running_var", None), Tensor
    )


def running_statistics(module: nn.Module) -> tuple[Tensor, Tensor]:
    """The running mean and variance of a norm layer that has them."""
    mean, var = module.running_mean, module.running_var
    assert isinstance(mean, Tensor)
    assert isinstance(var, Tensor)
    return mean, var


def uses_batch_statistics(module: nn.Module) -> bool:
    """Whether a batch norm layer, in the mode it is in, normalises by the statistics of the batch it is given."""
    if not isinstance(module, _BatchNorm):
        return False
    normalize_by = getattr(module, "normalize_by", None)  # of our layers: a switch apart from the mode
    if normalize_by is not None:
        return bool(normalize_by == "batch")
    return module.training or not has_running_statistics(module)


def unmade_parts(model: nn.Module) -> list[str]:
    """Names of parameters and buffers without values: lazy ones, and those on the meta device."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return [name for name, tensor in tensors if is_lazy(tensor) or tensor.is_meta]


def replace(model: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """Put `new` where `old` is, at every path that leads to it.

    Returns: the model; it is `new` itself if `old` was the whole model.
    """
    if old is model:
        return new
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children would show a shared layer once
            if child is old:
                setattr(parent, name, new)
    return model


@contextmanager
def undisturbed(model: nn.Module, *generators: torch.Generator) -> Iterator[nn.Module]:
    """Whatever happens inside, also an exception, the model and all random states are afterwards as they were before.

    Put back bit for bit and in place, so that aliases hold: parameters, their gradients and `requires_grad`; buffers
    and other tensors that are attributes of a module; the mode of every module; hooks; the tree of modules itself and
    their plain attributes. Random states: Python, NumPy, torch on the CPU and on CUDA, and `generators`.

    What it costs is a copy of the parameters and buffers, for as long as the block runs.
    """
    restore_model = remember(model)
    restore_random = _remember_random(generators)
    try:
        yield model
    finally:
        restore_model()
        restore_random()


def remember(model: nn.Module) -> Callable[[], None]:
    """A function that puts `model` back into the state in which it is now: see `undisturbed`. It can be used again."""
    modules = list(model.modules())
    restores = [_remember_attributes(module) for module in modules]
    restores += _remember_tensors(modules)

    def restore() -> None:
        for put_back in restores:
            put_back()

    return restore


def _remember_attributes(module: nn.Module) -> Callable[[], None]:
    """The class and the attributes of one module; its dictionaries, lists and sets keep their identity."""
    cls, attributes = type(module), dict(module.__dict__)
    contents = {name: value.copy() for name, value in attributes.items() if type(value) in CONTAINERS}

    def restore() -> None:
        if type(module) is not cls:  # a lazy module turned into its final class
            module.__class__ = cls
        module.__dict__.clear()
        module.__dict__.update(attributes)
        for name, content in contents.items():
            container = attributes[name]
            container.clear()
            container.extend(content) if isinstance(content, list) else container.update(content)

    return restore


def _remember_tensors(modules: list[nn.Module]) -> list[Callable[[], None]]:
    restores: list[Callable[[], None]] = []
    tensors, storages = set[int](), set[int]()
    for tensor in (t for module in modules for t in _tensors_of(module)):
        if id(tensor) in tensors:
            continue
        tensors.add(id(tensor))
        if is_lazy(tensor):
            restores.append(_remember_unmade(tensor))
            continue
        grad = tensor.grad if tensor.is_leaf else None
        for part in (tensor,) if grad is None else (grad, tensor):
            restores.append(_remember_place(part))
            if part.is_meta or part.layout is not torch.strided:
                continue
            storage = part.untyped_storage()
            if storage._cdata not in storages:
                storages.add(storage._cdata)
                restores.append(_remember_values(storage))
    return restores


def _tensors_of(module: nn.Module) -> Iterator[Tensor]:
    for value in module.__dict__.values():
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else (value,)
        yield from (item for item in inner if isinstance(item, Tensor))


def _remember_place(tensor: Tensor) -> Callable[[], None]:
    """Where a tensor's memory is, whether it takes a gradient, and the gradient object."""
    data, requires_grad = tensor.detach(), tensor.requires_grad
    grad = tensor.grad if tensor.is_leaf else None

    def restore() -> None:
        if tensor.is_leaf and tensor.grad is not grad:
            tensor.grad = None
        if tensor.dtype != data.dtype or tensor.shape != data.shape or tensor.data_ptr() != data.data_ptr():
            tensor.data = data
        if tensor.is_leaf:
            if tensor.requires_grad != requires_grad:
                tensor.requires_grad_(requires_grad)
            tensor.grad = grad

    return restore


def _remember_unmade(tensor: Tensor) -> Callable[[], None]:
    """A parameter or buffer without values: making them turns it into another class."""
    cls, data = type(tensor), tensor.data

    def restore() -> None:
        if not is_lazy(tensor):
            tensor.data = data
            tensor.__class__ = cls

    return restore


def _remember_values(storage: torch.UntypedStorage) -> Callable[[], None]:
    """The bytes of a storage: exact for every dtype and view, and unseen by autograd's version counters."""
    copy = storage.clone()

    def restore() -> None:
        storage.copy_(copy)

    return restore


def _remember_random(generators: tuple[torch.Generator, ...]) -> Callable[[], None]:
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    states = [(generator, generator.get_state()) for generator in generators]

    def restore() -> None:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
        if cuda_states is not None:
            torch.cuda.set_rng_state_all(cuda_states)
        for generator, state in states:
            generator.set_state(state)

    return restore
