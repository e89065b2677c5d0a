"""Where the layers of a model meet those of its other micro-batches."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, nn

from steadynorm.functional import Part, Reduction
from steadynorm.moments import Moments


class Lockstep(Protocol):
    """Runs the micro-batches of one batch through a model, all of them to a layer before any goes on."""

    def normalize(
        self,
        layer: nn.Module,
        part: Part,
        weight: Tensor | None,
        bias: Tensor | None,
        *,
        eps: float,
        activation: str | None,
        reduction: Reduction | None,
    ) -> tuple[Tensor, Moments | None]:
        """y of this micro-batch by the statistics of all; their Moments, to one of them only: it is remembered once."""

    def pool(self, layer: nn.Module, moments: Moments, reduction: Reduction | None) -> Moments | None:
        """The Moments of all micro-batches, to one of them only, for a layer that does not normalise by them."""


class _Current(threading.local):
    lockstep: Lockstep | None = None


_CURRENT = _Current()


def current() -> Lockstep | None:
    """The lockstep that the calling thread runs in, if it does."""
    return _CURRENT.lockstep


@contextmanager
def entered(lockstep: Lockstep) -> Iterator[Any]:
    """Layers called inside, on this thread, are in `lockstep`."""
    before, _CURRENT.lockstep = _CURRENT.lockstep, lockstep
    try:
        yield lockstep
    finally:
        _CURRENT.lockstep = before
