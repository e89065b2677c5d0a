"""Stricter than users. That warnings are errors is in pyproject.toml; the rest of the strictness is here."""

from __future__ import annotations

import os
import random
import socket
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
import torch.distributed as dist

from steadynorm.kernels import numba_cpu

if not torch.cuda.is_available():
    # Read when Triton is imported: its kernels run in Python, on CPU tensors, where a test asks for them.
    os.environ["TRITON_INTERPRET"] = "1"

MOMENT = 0.05  # seconds

hypothesis.settings.register_profile("project", deadline=None, max_examples=60, derandomize=True, database=None)
hypothesis.settings.load_profile("project")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every dtype and activation is a kernel of its own, seconds to compile: the rarer ones are for the slow run.

    The reference goes through all of them always, and so do the sweeps of the slow run (`-m slow`).
    """
    for item in items:
        if _needs_a_rare_kernel(item):
            item.add_marker(pytest.mark.slow)


def _needs_a_rare_kernel(item: pytest.Item) -> bool:
    folder = item.path.parent.name
    params = getattr(getattr(item, "callspec", None), "params", {})
    is_compiled = folder in ("functional", "layers") or item.path.name.startswith("test_numba")
    if not is_compiled or params.get("backend") == "reference" or item.path.name == "test_numba_sample.py":
        return False
    case = params.get("case")
    activation = getattr(case, "activation", params.get("activation"))
    dtype = getattr(case, "dtype", params.get("dtype", torch.float32))
    if item.name.startswith("test_gradcheck"):
        dtype = torch.float64
    if "sample" in item.path.name and isinstance(activation, str):
        # Four layouts, twice that with masks: one activation, without masks. test_numba_sample.py has the others.
        return activation != "relu" or getattr(case, "mask", None) is not None or dtype != torch.float32
    if dtype == torch.float32:
        return isinstance(activation, str) and activation not in ("relu", "silu")
    return dtype == torch.float16 or isinstance(activation, str) or "sample" in item.path.name


@pytest.fixture(scope="session", autouse=True)
def no_network() -> Iterator[None]:
    """A test that needs the network fails; unix sockets and this machine's own address stay open."""
    connect = socket.socket.connect

    def connect_nearby(self: socket.socket, address: Any) -> None:
        if self.family != getattr(socket, "AF_UNIX", None) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"tests do not use the network: a connection to {address} was asked for")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connect_nearby)
        yield


@pytest.fixture(autouse=True)
def double_is_for_oracles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What layers and training loops are tested with in float64 is not the kernels, which have tests of their own."""
    asks_for_kernels = "numba" in getattr(getattr(request.node, "callspec", None), "params", {}).values()
    is_slow = request.node.get_closest_marker("slow") is not None
    if request.path.parent.name in ("layers", "training") and not asks_for_kernels and not is_slow:
        single = {dtype: name for dtype, name in numba_cpu.STORAGE.items() if dtype != torch.float64}
        monkeypatch.setattr(numba_cpu, "STORAGE", single)


@pytest.fixture(autouse=True)
def strict(request: pytest.FixtureRequest) -> Iterator[None]:
    """Deterministic algorithms, NaN in fresh memory, a seed from the test's name, one thread."""
    seed = zlib.crc32(request.node.nodeid.encode())
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    torch.set_num_threads(1)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """`threads(n)` gives torch n threads until the test ends."""
    yield torch.set_num_threads
    torch.set_num_threads(1)


@pytest.fixture
def group_of_one(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone, which outlives what a test has made in it.

    The group's thread takes the GIL to let go of its last work. Whoever drops the last reference to the group waits for
    that thread, and holds the GIL, so the thread is given a moment first: without it a test waited for ever.
    """
    store = dist.FileStore(str(tmp_path / "group of one"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    group = dist.group.WORLD
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
    time.sleep(MOMENT)
    del group
