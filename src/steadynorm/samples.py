"""Tensors in whatever a model takes and gives: tuples, dictionaries, dataclasses, inside one another."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in a nested value, in a fixed order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for entry in dataclasses.fields(value):
            yield from tensors_in(getattr(value, entry.name))


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The same nested value with `function` applied to every tensor; what cannot be rebuilt stays as it is."""
    if isinstance(value, Tensor):
        return function(value)
    # Before mappings: the outputs of transformers are both.
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        entries = [entry.name for entry in dataclasses.fields(value) if entry.init]
        return dataclasses.replace(value, **{name: map_tensors(function, getattr(value, name)) for name in entries})
    if isinstance(value, Mapping):
        return {key: map_tensors(function, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [map_tensors(function, item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def sample_count(inputs: Any) -> int | None:
    """How many samples the inputs of a model hold: the first size that all their tensors share, else None."""
    sizes = {tensor.shape[0] for tensor in tensors_in(inputs) if tensor.dim()}
    return sizes.pop() if len(sizes) == 1 else None
