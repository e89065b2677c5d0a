"""Samples in whatever a model takes and gives: some of them, two batches of them, what one of them became."""

import weakref
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from steadynorm.samples import map_tensors as map_tensors
from steadynorm.samples import sample_count as sample_count
from steadynorm.samples import tensors_in as tensors_in

Value = TypeVar("Value")

# Keys under which models that take a dictionary expect their target.
TARGET_KEYS = ("labels", "label", "target", "targets")


class ByTensor(Generic[Value]):
    """Values that belong to tensors: of one that is gone, or that was changed in place since, there is none."""

    def __init__(self) -> None:
        self._found: dict[int, tuple[weakref.ref[Tensor], int, Value]] = {}

    def get(self, tensor: Tensor) -> Value | None:
        """The value of a tensor, if there is one."""
        found = self._found.get(id(tensor))
        # A dead tensor's id is used again; a higher version is an operation in place since then.
        is_same = found is not None and found[0]() is tensor and found[1] == tensor._version
        return found[2] if found is not None and is_same else None

    def set(self, tensor: Tensor, value: Value) -> None:
        """Remember the value of a tensor, as it is now; not of one made in inference mode, which counts no changes."""
        if not tensor.is_inference():
            self._found[id(tensor)] = weakref.ref(tensor), tensor._version, value


def take(batch: Any, indices: list[int]) -> Any:
    """The samples `indices` of a batch: of every tensor in it whose first size is the number of samples."""
    first = next((tensor for tensor in tensors_in(batch) if tensor.dim()), None)
    if first is None:
        return batch
    count = first.shape[0]

    def pick(tensor: Tensor) -> Tensor:
        if not tensor.dim() or tensor.shape[0] != count:
            return tensor
        return tensor.index_select(0, torch.tensor(indices, device=tensor.device))

    return map_tensors(pick, batch)


def join(a: Any, b: Any) -> Any:
    """The samples of `a` and then those of `b`, two batches of one structure."""
    others = iter(list(tensors_in(b)))

    def attach(tensor: Tensor) -> Tensor:
        other = next(others)
        return torch.cat([tensor, other]) if tensor.dim() else tensor

    return map_tensors(attach, a)


def shapes(batch: Any) -> tuple[tuple[int, ...], ...]:
    """The shapes of all tensors of a batch."""
    return tuple(tuple(tensor.shape) for tensor in tensors_in(batch))


def readings(tensor: Tensor, count: int, place: int = 0) -> list[Tensor]:
    """Every part of `tensor` that may be what the sample at `place` of `count` is; none if no size fits.

    A tensor is read in all ways that its sizes allow: samples first; samples folded with something else into the first
    size, on either side; samples second, as in time-major sequences.
    """
    found = []
    if tensor.dim() and tensor.shape[0] % count == 0 and tensor.shape[0]:
        block = tensor.shape[0] // count
        found.append(tensor[place * block : (place + 1) * block])
        if block > 1:
            found.append(tensor[place::count])
    if tensor.dim() > 1 and tensor.shape[1] == count:
        found.append(tensor[:, place])
    return found


def is_broken_input(tensor: Tensor) -> bool:
    """Whether a tensor holds a NaN, or an infinity without being a mask of zeros and minus infinities."""
    if not tensor.is_floating_point() or torch.isfinite(tensor).all():
        return False
    return not bool(((tensor == 0) | (tensor == -torch.inf)).all())


def scores(output: Any, batch: Any) -> Tensor | None:
    """The class scores (N, K, *) in an output, where the batch holds the classes (N, *) that they are scores of."""
    if isinstance(batch, Mapping):
        found: Any = [batch[key] for key in TARGET_KEYS if key in batch]
    else:
        found = batch[1:] if isinstance(batch, list | tuple) else ()
    for target in tensors_in(found):
        if target.is_floating_point() or target.dtype == torch.bool:
            continue
        for tensor in tensors_in(output):
            has_classes = tensor.is_floating_point() and tensor.dim() > 1 and tensor.shape[1] > 1
            if has_classes and tensor.shape[:1] + tensor.shape[2:] == target.shape:
                return tensor
    return None


def relative_difference(a: Tensor, b: Tensor) -> float:
    """Largest difference relative to the largest value of `a`, or of `b` where `a` is zero; NaN equals NaN.

    Two shapes are not compared.
    """
    if a.shape != b.shape:
        return 0.0  # lengths that follow the data: nothing to compare
    if torch.equal(a, b) or a.numel() == 0:
        return 0.0
    if not a.is_floating_point():
        return 1.0
    a, b = a.double(), b.double()
    differs = (a != b) & ~(a.isnan() & b.isnan())
    if not (torch.isfinite(a[differs]).all() and torch.isfinite(b[differs]).all()):
        return torch.inf
    scale = b if not a.any() else a
    largest = scale[torch.isfinite(scale)].abs().max() if torch.isfinite(scale).any() else a.new_ones(())
    return float(((a - b)[differs].abs().max() if differs.any() else 0.0) / largest.clamp(min=1e-30))
