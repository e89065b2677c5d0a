"""What autograd saves for micro-batches, kept in a temporary file or in pinned host memory until the backward pass."""

import os
import tempfile
import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from steadynorm.training.microbatch_lockstep import Memory
from steadynorm.training.microbatch_state import State

SMALLEST = 1 << 14
"""Bytes below which a tensor stays where it is: a file or a transfer has its price too."""


class Offload(Memory):
    """Tensors on a CPU, whose memory is the memory, go to a file; others to pinned memory of the host."""

    def __init__(self, resident: Iterable[Tensor]) -> None:
        self.resident = {address(tensor) for tensor in resident if has_storage(tensor)}
        self.moved: dict[int, tuple[StorageWeakRef, int, _Block]] = {}
        self.file: _File | None = None

    def begin(self, lane: int, state: State) -> State:
        """Every micro-batch with the same hooks; the layers where they meet are computed inside them too."""
        return state.inside((self._pack, _unpack))

    def end(self) -> None:
        """Tensors that are saved from now on have nothing to do with us."""
        self.moved.clear()

    def _pack(self, tensor: Tensor) -> "Tensor | _Moved":
        # Detached, or the output of a node would keep the node that keeps it.
        tensor = tensor.detach()
        if not has_storage(tensor) or tensor.nbytes < SMALLEST or address(tensor) in self.resident:
            return tensor
        storage = tensor.untyped_storage()
        if storage.nbytes() > 2 * tensor.nbytes and not self._is_moved(tensor):
            # A view of something larger, of which the rest may not be needed. Where it is not dense, it stays.
            if not _is_dense(tensor):
                return tensor
            tensor = torch.empty_like(tensor).copy_(tensor)
        return _Moved(self._block(tensor), tensor.dtype, tensor.size(), tensor.stride(), int(tensor.storage_offset()))

    def _is_moved(self, tensor: Tensor) -> bool:
        found = self.moved.get(address(tensor))
        return found is not None and not found[0].expired() and found[1] == tensor._version

    def _block(self, tensor: Tensor) -> "_Block":
        """The storage of `tensor`, moved; once for all that are views of it."""
        if not self._is_moved(tensor):
            storage = tensor.untyped_storage()
            self.moved[address(tensor)] = StorageWeakRef(storage), tensor._version, self._move(storage)
        return self.moved[address(tensor)][2]

    def _move(self, storage: torch.UntypedStorage) -> "_Block":
        values = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        if storage.device.type != "cpu":
            return _Hosted(values)
        if self.file is None:
            self.file = _File()
        return _Written(self.file, values)


class _Moved(NamedTuple):
    """What is in the graph in place of a tensor."""

    block: "_Block"
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


def _unpack(saved: "Tensor | _Moved") -> Tensor:
    if isinstance(saved, Tensor):
        return saved
    return saved.block.values().view(saved.dtype).as_strided(saved.size, saved.stride, saved.offset)


class _Block:
    """The bytes of a storage, somewhere else."""

    def values(self) -> Tensor:
        """Its bytes, where they were."""
        raise NotImplementedError


class _Hosted(_Block):
    """In memory of the host; where that is pinned, both copies are in the order of the stream and nobody waits."""

    def __init__(self, values: Tensor) -> None:
        self.device, self.is_pinned = values.device, values.is_cuda
        self.host = torch.empty(values.shape, dtype=values.dtype, pin_memory=self.is_pinned)
        self.host.copy_(values, non_blocking=self.is_pinned)

    def values(self) -> Tensor:
        return self.host.to(self.device, non_blocking=self.is_pinned)


class _File:
    """A file without a name, gone with the last block in it. Where it is, TMPDIR says."""

    def __init__(self) -> None:
        self.file: Any = tempfile.TemporaryFile(prefix="steadynorm-", buffering=0)  # noqa: SIM115, as long as its blocks
        self.length = 0
        weakref.finalize(self, self.file.close)

    def write(self, values: memoryview) -> int:
        """Append; where it begins."""
        start = self.length
        while len(values):
            written = os.pwrite(self.file.fileno(), values, self.length)
            self.length, values = self.length + written, values[written:]
        return start

    def read(self, start: int, values: memoryview) -> None:
        """Fill `values` from `start` on."""
        while len(values):
            count = os.preadv(self.file.fileno(), [values], start)
            if count == 0:
                raise EOFError("microbatch: the file of offloaded tensors ended early.")
            start, values = start + count, values[count:]


class _Written(_Block):
    """In a file."""

    def __init__(self, file: _File, values: Tensor) -> None:
        self.file, self.size = file, len(values)
        self.start = file.write(values.numpy().data)

    def values(self) -> Tensor:
        values = torch.empty(self.size, dtype=torch.uint8)
        self.file.read(self.start, values.numpy().data)
        return values


def has_storage(tensor: Tensor) -> bool:
    """Whether there is plain memory behind a tensor: not behind those of compilers, sparse ones and DTensors."""
    is_plain = type(tensor) in (Tensor, torch.nn.Parameter)
    return is_plain and tensor.layout is torch.strided and not tensor.is_meta and not tensor.is_quantized


def address(tensor: Tensor) -> int:
    """Of its storage: the same for all views of one memory."""
    return tensor.untyped_storage()._cdata


def _is_dense(tensor: Tensor) -> bool:
    """Whether its values lie side by side, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True
