from __future__ import annotations

from typing import NamedTuple

import pytest
from torch import Tensor

from steadynorm import kernels
from steadynorm.kernels import numba_cpu


class Backend(NamedTuple):
    """What the test runs on: a backend by name, or `automatic`, the one that is chosen for the tensor."""

    name: str

    def needs(self, x: Tensor) -> None:
        """Skip, with the reason, where the forced backend does not take such a tensor."""
        if self.name == "numba" and (reason := numba_cpu.why_not(x)):
            pytest.skip(reason)


@pytest.fixture(params=["automatic", "numba", "reference"])
def backend(request):
    if request.param == "automatic":
        yield Backend(request.param)
        return
    for line in kernels.status():
        if line.name == request.param and not line.is_available:
            pytest.skip(line.reason)
    with kernels.backend(request.param):
        yield Backend(request.param)
