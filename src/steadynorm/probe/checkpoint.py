"""A checkpoint held against the model that was loaded from it, by the names of the tensors."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from steadynorm import models
from steadynorm.errors import InputError
from steadynorm.probe.training_facts import Checkpoint
from steadynorm.weights import STATISTICS, first_few, wrapping

COUNTER = "num_batches_tracked"


def compare(model: nn.Module, checkpoint: Mapping[str, Tensor]) -> Checkpoint:
    """What the checkpoint lacks of the model, and has besides.

    Args:
        checkpoint: without what wrappers put before every name; what they put before those of the model does not count.

    Raises:
        InputError: it has no name in common with the model.
    """
    own = model.state_dict()
    prefix = wrapping(own)
    own = {name.removeprefix(prefix): value for name, value in own.items()}
    if checkpoint and own and not own.keys() & checkpoint.keys():
        raise InputError(
            f"the checkpoint has no name in common with the model: it has {first_few(list(checkpoint))}, and the model "
            f"{first_few(list(own))}; give what the model was loaded from."
        )
    fitting = [name for name, value in own.items() if name in checkpoint and _fits(value, checkpoint[name])]
    missing = {}
    for path, layer in models.norms(model).items():
        names = {name: f"{path}.{name}".removeprefix(prefix) for name in STATISTICS if has_buffer(layer, name)}
        if absent := tuple(name for name, full in names.items() if full in own and full not in fitting):
            missing[path] = absent
    lost = {f"{path}.{name}".removeprefix(prefix) for path, names in missing.items() for name in names}
    unknown = [name for name in checkpoint if name not in own]
    homeless: dict[str, tuple[str, ...]] = {}
    for name in unknown:
        path, _, last = name.rpartition(".")
        if last in STATISTICS:
            homeless[path] = (*homeless.get(path, ()), last)
    return Checkpoint(
        missing=missing,
        # A frozen norm has no counter, and needs none.
        homeless={_path_of(path, prefix, model): names for path, names in homeless.items() if names != (COUNTER,)},
        missing_others=tuple(name for name in own if name not in fitting and name not in lost),
        unknown_others=tuple(name for name in unknown if name.rpartition(".")[2] not in STATISTICS),
        shared=len(fitting),
        differing=sum(not _is_same(own[name], checkpoint[name]) for name in fitting),
    )


def has_buffer(layer: nn.Module, name: str) -> bool:
    """Whether a layer keeps a tensor under this name in its state_dict."""
    return layer._buffers.get(name) is not None and name not in layer._non_persistent_buffers_set


def _path_of(path: str, prefix: str, model: nn.Module) -> str:
    """The path in the model, which may be wrapped where the checkpoint is not."""
    paths = {name for name, _ in model.named_modules()}
    return prefix + path if prefix + path in paths else path


def _fits(own: Any, other: Tensor) -> bool:
    return isinstance(own, Tensor) and own.shape == other.shape


def _is_same(own: Tensor, other: Tensor) -> bool:
    """Whether it is the same up to the precision of the model; NaN is the same as NaN."""
    other = other.to(own.device, own.dtype)
    return bool(
        torch.equal(own, other) or (own.is_floating_point() and ((own == other) | (own.isnan() & other.isnan())).all())
    )
