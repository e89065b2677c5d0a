"""The batches of one split: the first of them kept, the rest counted."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from steadynorm.errors import InputError
from steadynorm.probe.data import Sketch
from steadynorm.probe.facts import Batches
from steadynorm.probe.samples import is_broken_input, map_tensors, sample_count, take, tensors_in
from steadynorm.probe.trace import Forward, inputs_of

Source = Iterable[Any] | Callable[[], Iterable[Any]]
"""Batches, or a function that gives them."""

# Batches that are only counted, to know the size of the last one, cost what loading them costs.
MOST_COUNTED = 200


def gather(
    source: Source, forward: Forward, model: nn.Module, samples: int, what: str, sketch: Sketch | None = None
) -> tuple[list[Any], Batches]:
    """The first batches that make up `samples` samples, on the device of the model, without those that hold NaN.

    Args:
        what: the name of the split in an error.
        sketch: takes in the inputs, of more batches if it needs more.

    Raises:
        InputError: there is no batch, or what is given cannot be iterated over.
    """
    kept: list[Any] = []
    sizes: list[int] = []
    broken: list[int] = []
    used, is_complete = 0, True
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    for i, batch in enumerate(iterate(source, what)):
        is_known = used >= samples and (sketch is None or sketch.is_enough)
        if i == MOST_COUNTED or (is_known and isinstance(source, DataLoader)):
            is_complete = False
            break
        inputs = inputs_of(batch, forward)
        size = sample_count(inputs) or 1
        sizes.append(size)
        if is_known:
            continue
        if any(is_broken_input(tensor) for tensor in tensors_in(inputs)):
            broken.append(i)
            continue
        if sketch is not None:
            sketch.add(inputs)
        if used >= samples:
            continue
        kept.append(map_tensors(lambda tensor: tensor.to(device), batch))
        used += size
    if not sizes:
        raise InputError(f"{what} is empty: expected at least one batch; is there enough data for the batch size?")
    last = sizes[-1] if is_complete else _last_size(source)
    return kept, Batches(tuple(sizes), last, tuple(broken), used)


def iterate(source: Source, what: str) -> Iterable[Any]:
    """The batches of a source.

    Raises:
        InputError: it is neither iterable nor a function that gives something iterable.
    """
    made = source() if callable(source) and not isinstance(source, Iterable) else source
    if not isinstance(made, Iterable):
        raise InputError(
            f"{what} is {type(made).__name__}, expected an iterable of batches or a function that gives one: "
            "a list, a DataLoader, or lambda: my_batches()."
        )
    return made


def first_samples(batches: Iterable[Any], forward: Forward, samples: int) -> list[Any]:
    """The first batches, as many as make up `samples` samples; of the last only those that are needed."""
    found: list[Any] = []
    for batch in batches:
        if samples < 1:
            break
        size = sample_count(inputs_of(batch, forward))
        found.append(batch if size is None or size <= samples else take(batch, list(range(samples))))
        samples -= size or 1
    return found


def _last_size(source: Source) -> int | None:
    """The size of the last batch of a DataLoader, by arithmetic."""
    if not isinstance(source, DataLoader) or source.batch_size is None:
        return None
    try:
        remainder = len(source.sampler) % source.batch_size  # type: ignore[arg-type]
    except TypeError:  # a sampler of unknown length
        return None
    return source.batch_size if source.drop_last or remainder == 0 else remainder
