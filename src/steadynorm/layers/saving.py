"""Training with less memory: the output of a norm is recomputed for the layer behind it, not kept.

A convolution or linear layer behind a norm keeps its input, the output of the norm, for its backward pass, and the norm
keeps its own input for its own. The second gives the first: normalise, add, activate once more, with the statistics
that are there. So the output is let go as soon as the forward pass has used it.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from steadynorm.functional.batch import _Normalize, flat_mask
from steadynorm.functional.sample import _NormalizeSample
from steadynorm.kernels import backends, reference, reference_sample

FUNCTIONS: tuple[Any, ...] = (_Normalize, _NormalizeSample)
NODES = tuple(function._backward_cls for function in FUNCTIONS)
"""The classes of the nodes that our norms leave in autograd's graph."""
SAVED, RESIDUAL, OUTPUT, MASK = 8, 3, 4, 5
"""How many tensors they save, and which of them are a residual, their own output and a mask, or None."""
LONGEST_CHAIN = 1
"""Of residuals that are computed again for an output: they exist together in the backward pass. Peak of a step of
ResNet-50, batch 2: 201 MB at 0, 197 at 1, 199 at 2 and 3 (benchmarks/saving.py)."""


@contextmanager
def recompute_outputs() -> Iterator[None]:
    """Let go of the outputs of norms in the forward passes inside, and compute them again in the backward pass.

    The gradients have the same bits, since what is computed again has. It pays behind a norm with its activation
    fused into it (``activation=``); an activation on its own keeps its output as ever. With a residual the output can
    be computed again where the residual came from a norm too; one in every few is kept, so that no long chain of them
    has to be computed at once. Everything else is kept as torch keeps it.

    Backward passes can be inside or outside, of any order, and more than one. To change an input, an output or a
    parameter in place between forward and backward raises RuntimeError, as without it.

    It holds for the thread that enters it. Inside `torch.utils.checkpoint` and in compiled functions others decide
    what is kept, and nothing is gained or lost.
    """
    with saved_tensors_hooks(_pack, _unpack):
        yield


class _Saved:
    """What is in the graph in place of a tensor: the tensor, or what it is computed from."""

    def __init__(self, tensor: Tensor) -> None:
        # Detached, or the output of a node would keep the node that keeps it.
        self.tensor: Tensor | None = tensor.detach()
        # autograd checks versions only where there are no hooks.
        self.version = None if tensor.is_inference() else tensor._version
        self.source: _Source | None = None
        self.geometry: tuple[Any, ...] = ()

    def let_go(self, source: "_Source") -> None:
        """Compute the tensor from `source` from now on."""
        assert self.tensor is not None
        self.geometry = self.tensor.size(), self.tensor.stride(), self.tensor.storage_offset()
        self.tensor, self.source = None, source
        source.uses += 1

    def get(self) -> Tensor:
        """The values that were saved, or RuntimeError if they were changed since."""
        if self.source is not None:
            return self.source.get().as_strided(*self.geometry)
        assert self.tensor is not None
        if self.version is not None and self.tensor._version != self.version:
            raise _modified(self.tensor.shape, self.tensor._version, self.version)
        return self.tensor


class _Source:
    """What the output of one norm is computed from."""

    def __init__(
        self, node: Any, backend: ModuleType, y: Tensor, parts: "list[_Saved | _Source | None]", depth: int
    ) -> None:
        self.uses = 0
        self.compute: Callable[..., Tensor] = _again if isinstance(node, NODES[0]) else _again_within_samples
        self.settings, self.backend = node.settings, backend
        self.parts = parts
        self.depth = depth
        for part in parts:
            source = part.source if isinstance(part, _Saved) else part
            if source is not None:
                source.uses += 1
        # An alias without the memory: it shares the counter of in-place changes.
        self.geometry = y.size(), y.stride()
        self.counter = y.detach()
        self.counter.data = y.new_empty(0)
        self.version = y._version
        self.output: Tensor | None = None

    def get(self) -> Tensor:
        """The output, computed once for all that saved it and let go with the last of them."""
        if self.counter._version != self.version:
            raise _modified(self.geometry[0], self.counter._version, self.version)
        y = self.output
        if y is None:
            with torch.no_grad():
                y = self.compute(
                    self.backend, self.settings, *(None if part is None else part.get() for part in self.parts)
                )
            if y.stride() != self.geometry[1]:
                y = torch.empty_strided(*self.geometry, dtype=y.dtype, device=y.device).copy_(y)
        self.uses -= 1
        self.output = y if self.uses > 0 else None
        return y


def _pack(tensor: Tensor) -> _Saved:
    saved = _Saved(tensor)
    if type(tensor) is not Tensor:
        # A parameter; or a compiler's or somebody else's tensor, that is not to be looked into.
        return saved
    y = tensor
    if not isinstance(y.grad_fn, NODES) and tensor._is_view() and tensor._base is not None:
        y = tensor._base
    node: Any = y.grad_fn
    if isinstance(node, NODES) and y.output_nr == 0 and tensor.dtype == y.dtype and y.storage_offset() == 0:
        source = _source(node, y)
        if source is not None:
            saved.let_go(source)
        elif tensor is y:
            node.kept = weakref.ref(saved)
    return saved


def _unpack(saved: _Saved) -> Tensor:
    return saved.get()


def _source(node: Any, y: Tensor) -> _Source | None:
    """What the output `y` of a norm is computed from; None while it is being saved, or if it has to be kept."""
    source = _alive(node, "source")
    parts = _parts(node) if source is None else []
    if source is not None or not parts:
        return source
    own, parts[OUTPUT] = parts[OUTPUT], None
    backend = _backend(node, parts)
    # A compiled kernel writes past torch's counter, the reference ends in one copy_. Written more often, the memory was
    # changed since where autograd does not see it (under no_grad): it is not what the norm would compute again.
    if y._version != int(backend in (reference, reference_sample)):
        return None
    if node.has_residual and parts[RESIDUAL] is None:
        parts[RESIDUAL] = _residual(node, parts)
        if parts[RESIDUAL] is None:
            return None
    residual = parts[RESIDUAL]
    before = residual.source if isinstance(residual, _Saved) else residual
    depth = 0 if before is None else before.depth + 1
    if depth > LONGEST_CHAIN:
        return None
    source = _Source(node, backend, y, parts, depth)
    # Weakly: the node outlives its backward pass, what it saved must not.
    node.source = weakref.ref(source)
    if own is not None:
        own.let_go(source)
    return source


def _parts(node: Any) -> list[Any]:
    """What a node has saved, as our hooks packed it; nothing where it is not there, or packed by others.

    It is not there while the node is still saving, its own output for one, nor after its backward pass.
    """
    try:
        parts = [saved.data for saved in node._raw_saved_tensors]
    except RuntimeError:
        return []
    is_ours = all(part is None or isinstance(part, _Saved) for part in parts)
    return parts if is_ours and len(parts) == SAVED else []


def _backend(node: Any, parts: list[Any]) -> ModuleType:
    """The backend that the norm ran on: to compute it again elsewhere would give other bits."""
    backend: ModuleType | None = node.backend
    if backend is not None:
        return backend
    x, is_masked = parts[0].get(), parts[MASK] is not None
    if isinstance(node, NODES[0]):
        return backends.choose(x, masked=is_masked)
    return backends.choose_sample(x, node.settings.grouping, masked=is_masked)


def _residual(node: Any, parts: list[Any]) -> "_Saved | _Source | None":
    """The residual that a norm did not save: it can be had if another norm gave it."""
    tensors = 1 + getattr(node, "has_addend", False) + sum(part is not None for part in parts[1:RESIDUAL])
    before, output = node.next_functions[tensors]
    if not isinstance(before, NODES) or output != 0:
        return None
    return _alive(before, "kept") or _alive(before, "source")


def _alive(node: Any, name: str) -> Any:
    reference = getattr(node, name, None)
    return None if reference is None else reference()


def _again(
    backend: ModuleType,
    settings: Any,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    _: Tensor | None,
    mask: Tensor | None,
    mean: Tensor,
    var: Tensor,
) -> Tensor:
    grouping, eps, activation, *_rest = settings
    flat = flat_mask(mask, grouping)
    y: Tensor = backend.normalize(x, grouping, mean, var, weight, bias, residual, flat, eps, activation)
    return y


def _again_within_samples(
    backend: ModuleType,
    settings: Any,
    total: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    _: Tensor | None,
    mask: Tensor | None,
    *statistics: Tensor,
) -> Tensor:
    grouping, *rest = settings
    y: Tensor = backend.sample_forward(total, None, grouping, weight, bias, residual, mask, *rest)[0]
    return y


def _modified(shape: torch.Size, version: int, expected: int) -> RuntimeError:
    return RuntimeError(
        f"one of the variables needed for gradient computation has been modified by an inplace operation: a tensor"
        f" {tuple(shape)} is at version {version}; expected version {expected} instead. Change a copy of it, or call"
        " backward before."
    )
