"""What is converted is looked at here: kernels have tests of their own, and the rarer take seconds to compile."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import steadynorm


@pytest.fixture(autouse=True)
def by_reference(request: pytest.FixtureRequest) -> Iterator[None]:
    """Plain PyTorch, but for what is converted between torch.nn and ours, and what is trained."""
    if request.path.name in ("test_convert.py", "test_accuracy.py"):
        yield
        return
    with steadynorm.backend("reference"):
        yield
