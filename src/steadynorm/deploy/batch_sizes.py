"""One sample in batches of different sizes: does an artefact take them, and what does it say of the sample in each?"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steadynorm.deploy.difference import default_tolerance, distances
from steadynorm.samples import map_tensors, sample_count, tensors_in

SIZES = (1, 2, 3, 4, 8, 16, 32, 64)
"""1 and 2 are what exporters make constants of; the rest are what a server puts together."""


@dataclass(frozen=True)
class Sized:
    """A batch of `size` samples, of which that at `place` is the same in all of them."""

    size: int
    place: int
    batch: Any


@dataclass(frozen=True)
class Invariance:
    """What an output says of one sample, alone and among others.

    Args:
        sizes: of the batches that it was in.
        model, artefact: largest difference from what the same one says in the first of them, over the largest value.
        tolerance: above it an output depends on the batch, and not on rounding only.
    """

    sizes: tuple[int, ...]
    model: float
    artefact: float
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether the sample's output does not depend on its batch, but for rounding."""
        return max(self.model, self.artefact) <= self.tolerance

    def __str__(self) -> str:
        verdict = "is the same" if self.holds else "DEPENDS ON THE BATCH"
        return (
            f"a sample alone and in batches of {self.sizes[0]} to {self.sizes[-1]} {verdict}: relative difference"
            f" {self.artefact:.1e}, in the model {self.model:.1e}"
        )


def sized(batches: Sequence[Any], sizes: Sequence[int]) -> list[Sized]:
    """The first sample of the first batch among others, in batches of the sizes; none where sizes are not shared.

    Args:
        batches: as ``(inputs,)``; tensors that fit those of the first are taken from all of them.
    """
    first = batches[0]
    if sample_count(first) in (None, 0):
        return []
    alike = [batch for batch in batches if _inner(batch) == _inner(first) and sample_count(batch)]
    others = [list(tensors_in(batch)) for batch in alike]
    return [Sized(size, size // 2, _made(first, others, size)) for size in sizes]


def _inner(batch: Any) -> list[Any]:
    return [(tensor.shape[1:], tensor.dtype) for tensor in tensors_in(batch)]


def _made(first: Any, others: list[list[Tensor]], size: int) -> Any:
    """`size` samples: the first one in the middle, around it those that follow, from the beginning again at the end."""
    count = sum(len(tensors[0]) for tensors in others if tensors[0].dim()) or 1
    rows = [1 + index % max(count - 1, 1) for index in range(size - 1)] if count > 1 else [0] * (size - 1)
    rows.insert(size // 2, 0)
    number = iter(range(len(others[0])))

    def pick(tensor: Tensor) -> Tensor:
        index = next(number)
        if not tensor.dim():
            return tensor
        return torch.cat([tensors[index] for tensors in others])[rows]

    return map_tensors(pick, first)


class Rows:
    """What is said of the same sample in batch after batch."""

    def __init__(self) -> None:
        self.rows: dict[str, list[Tensor]] = {}

    def add(self, outputs: Iterator[tuple[str, Tensor]], one: Sized) -> None:
        """The outputs for one more batch; those that have no row for each sample are passed over."""
        for name, tensor in outputs:
            if tensor.dim() and len(tensor) == one.size:
                self.rows.setdefault(name, []).append(tensor[one.place].detach().cpu())

    def difference(self, count: int) -> tuple[float, float] | None:
        """The largest relative difference of all outputs, and the widest tolerance; None where there is none.

        Args:
            count: of batches; an output that had no row in one of them says nothing.
        """
        found = [_relative(rows) for rows in self.rows.values() if len(rows) == count and rows[0].numel()]
        if not found:
            return None
        return max(relative for relative, _ in found), max(tolerance for _, tolerance in found)


def _relative(rows: list[Tensor]) -> tuple[float, float]:
    first = rows[0]
    distance = max(float(distances(first, row).max()) for row in rows[1:]) if len(rows) > 1 else 0.0
    finite = first[torch.isfinite(first)].abs().double()
    largest = float(finite.max()) if finite.numel() else 0.0
    relative = distance / largest if largest else (float("inf") if distance else 0.0)
    return relative, default_tolerance(first.dtype)
