"""Micro-batches that are one batch to batch normalization: gradients, statistics and output are those of the whole.

Gradient accumulation normalises every micro-batch alone, and no sum over micro-batches makes up for that. Here they run
in lock-step: all come to a layer, are normalised with the Moments of all, and go on. The gradient flows back through
these statistics into every micro-batch.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as TorchBatchNorm

from steadynorm import models
from steadynorm.errors import InputError
from steadynorm.layers import lockstep
from steadynorm.layers.batch import BatchNorm
from steadynorm.samples import map_tensors, tensors_in
from steadynorm.training.microbatch_lockstep import Memory, Together, why_not_together
from steadynorm.training.microbatch_offload import Offload
from steadynorm.training.microbatch_recompute import Recompute

Kind = Literal["keep", "offload", "recompute"]
KINDS: tuple[Kind, ...] = ("keep", "offload", "recompute")
REDUCTIONS = ("mean", "sum")


def microbatch(model: nn.Module, size: int | Sequence[int], *, memory: Kind = "keep") -> "MicroBatches":
    """Run `model` on micro-batches, with the result of the whole batch.

        exact = microbatch(model, 2)
        loss = criterion(exact(images), labels)         # where model(images) was
        loss.backward()

    Args:
        model: with batch norm layers of ours; those of torch.nn are converted first.
        size: samples in a micro-batch, the last of which may be smaller; or the size of each, which add up to the
            batch.
        memory: how what the backward pass needs is kept: "keep", as ever; "offload", in a temporary file, or for
            tensors on a GPU in pinned host memory; "recompute", not at all: a part of the forward pass at a time is
            run again when the backward pass comes to it.

    Raises:
        InputError: there is no batch norm in `model`, or one of a kind that cannot be put together; a size that cannot
            be used.
    """
    return MicroBatches(model, size, memory=memory)


class MicroBatches:
    """A model on micro-batches, in lock-step: see `microbatch`."""

    def __init__(self, model: nn.Module, size: int | Sequence[int], *, memory: Kind = "keep") -> None:
        sizes = list(size) if isinstance(size, Sequence) else [size]
        if not sizes or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in sizes):
            raise InputError(f"microbatch expected a size, or sizes, of at least 1 sample, got {size!r}.")
        if memory not in KINDS:
            raise InputError(f"microbatch: memory must be one of {', '.join(map(repr, KINDS))}, got {memory!r}.")
        if not any(isinstance(module, BatchNorm | TorchBatchNorm) for module in model.modules()):
            raise InputError(
                f"microbatch found no batch norm in {type(model).__name__}: there plain gradient accumulation gives the"
                " gradients of the whole batch already."
            )
        if memory == "recompute" and any(isinstance(m, nn.parallel.DistributedDataParallel) for m in model.modules()):
            raise InputError(
                "microbatch: memory='recompute' runs the forward pass again inside the backward pass, which"
                " DistributedDataParallel does not expect of the model inside: use 'offload'."
            )
        self.model, self.size, self.memory = model, size, memory

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What ``model(*args, **kwargs)`` returns, micro-batch by micro-batch, and joined again.

        Every tensor in the arguments is cut along its first axis, which has to be the batch, and every tensor in the
        output joined along it; numbers and strings are passed on as they are.

        Raises:
            InputError: arguments that cannot be cut, outputs that cannot be joined, or micro-batches that take
                different paths through the model.
        """
        return _joined(self.map(self.model, *args, **kwargs), self._sizes((args, kwargs)))

    def loss(
        self, function: Callable[..., Tensor], *batch: Any, reduction: Literal["mean", "sum"] = "mean", **named: Any
    ) -> Tensor:
        """The loss of the whole batch, where `function` gives that of a micro-batch: nothing is joined but numbers.

            loss = exact.loss(lambda images, labels: criterion(model(images), labels), images, labels)
            loss.backward()

        mean: Σ_k n_k / N · loss_k        sum: Σ_k loss_k

        Args:
            function: called with the tensors of a micro-batch; it calls the model and returns a loss ().
            batch, named: what it is called with, as in a call.
            reduction: what the loss does over samples. A mean over something else, as over the pixels that are not
                ignored, is a sum divided by their number in the whole batch.

        Raises:
            InputError: as for a call; a loss that is not one number.
        """
        if reduction not in REDUCTIONS:
            raise InputError(f"microbatch: reduction must be 'mean' or 'sum', got {reduction!r}.")
        losses = self.map(function, *batch, **named)
        for loss in losses:
            if not isinstance(loss, Tensor) or loss.dim():
                shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
                raise InputError(f"microbatch expected the loss of a micro-batch to be one number, got {shape}.")
        if reduction == "sum":
            return torch.stack(losses).sum()
        sizes = self._sizes((batch, named))
        return torch.stack([loss * (n / sum(sizes)) for loss, n in zip(losses, sizes, strict=True)]).sum()

    def map(self, function: Callable[..., Any], *batch: Any, **named: Any) -> list[Any]:
        """What `function`, which calls the model, returns for each micro-batch: the general form of the others.

        An error ends all of them, and leaves buffers as they were.
        """
        if lockstep.current() is not None:
            raise InputError("microbatch was called inside the forward pass of another one: use one of the two.")
        self._look_at_layers()
        sizes = self._sizes((batch, named))
        cuts = _cut((batch, named), sizes)
        calls = [_bound(function, *cut) for cut in cuts]
        with _buffers_as_they_were(self.model), _broadcast_once(self.model, calls):
            return Together(calls, self._name, self._memory(calls, cuts)).run()

    def _memory(self, calls: Sequence[Callable[[], Any]], cuts: Sequence[Any]) -> Memory:
        if self.memory == "keep" or not torch.is_grad_enabled():
            return Memory()
        # What is there anyway is not moved or computed again.
        resident = [*self.model.parameters(), *self.model.buffers(), *tensors_in(cuts)]
        return Offload(resident) if self.memory == "offload" else Recompute(resident, calls)

    def _sizes(self, batch: Any) -> list[int]:
        """The size of each micro-batch."""
        counts = {tensor.shape[0] for tensor in tensors_in(batch) if tensor.dim()}
        if len(counts) != 1:
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors_in(batch)) or "none"
            raise InputError(
                f"microbatch expected tensors that share their first size, that of the batch, got {shapes}: hand over"
                " only what belongs to samples, and the rest through a function of your own."
            )
        (count,) = counts
        if not isinstance(self.size, int):
            if sum(self.size) != count:
                raise InputError(f"microbatch got sizes {list(self.size)} for a batch of {count}: they have to add up.")
            return list(self.size)
        if self.size > count:
            raise InputError(
                f"microbatch got micro-batches of {self.size} for a batch of {count}: give at most {count}. A ragged"
                " last batch is left out by drop_last=True in the DataLoader, or given to the model itself."
            )
        return [min(self.size, count - start) for start in range(0, count, self.size)]

    def _look_at_layers(self) -> None:
        unmade = models.unmade_parts(self.model)
        if unmade:
            raise InputError(f"microbatch found {unmade[0]} without values: run the model once on a batch before.")
        strange = []
        for path, module in self.model.named_modules():
            if not models.uses_batch_statistics(module) and not isinstance(module, BatchNorm):
                continue
            if not isinstance(module, BatchNorm):
                strange.append(path or type(module).__name__)
            elif module.training and module.normalize_by != "running" and (why := why_not_together(module)) is not None:
                raise InputError(f"{self._name(module)} {why}")
        if strange:
            warnings.warn(
                f"microbatch: {', '.join(strange)} of torch.nn will normalise every micro-batch alone: convert the"
                " model first.",
                stacklevel=4,
            )

    def _name(self, module: nn.Module) -> str:
        paths = {id(found): path for path, found in self.model.named_modules()}
        kind = type(module).__name__
        return f"{kind} at {paths[id(module)]}" if paths.get(id(module)) else kind


def _bound(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], Any]:
    return lambda: function(*args, **kwargs)


def _cut(batch: Any, sizes: Sequence[int]) -> list[Any]:
    """A nested value for each micro-batch, with views of its tensors."""
    pieces = [tensor.split(list(sizes)) if tensor.dim() else (tensor,) * len(sizes) for tensor in tensors_in(batch)]
    return [_filled(batch, [piece[i] for piece in pieces]) for i in range(len(sizes))]


def _joined(outputs: Sequence[Any], sizes: Sequence[int]) -> Any:
    """One nested value of the same structure, tensors joined along their first axis."""
    found = [list(tensors_in(output)) for output in outputs]
    if len({len(tensors) for tensors in found}) != 1:
        raise InputError("microbatch got outputs of different structure for different micro-batches: use map.")
    joined = []
    for tensors in zip(*found, strict=True):
        is_of_samples = all(t.dim() and t.shape[0] % n == 0 for t, n in zip(tensors, sizes, strict=True))
        if not is_of_samples or len({len(t) // n for t, n in zip(tensors, sizes, strict=True)}) != 1:
            raise InputError(
                f"microbatch cannot join outputs {', '.join(str(tuple(t.shape)) for t in tensors)} of micro-batches of"
                f" {', '.join(map(str, sizes))}: their first axis is not the batch. A loss is added up by loss(), and"
                " map() returns what there is as a list."
            )
        joined.append(torch.cat(tensors))
    return _filled(outputs[0], joined)


def _filled(value: Any, tensors: Sequence[Tensor]) -> Any:
    """`value` with other tensors in it, in the order of `tensors_in`."""
    others = iter(tensors)
    filled = map_tensors(lambda _: next(others), value)
    if next(others, None) is not None:
        raise InputError(f"microbatch cannot put a {type(value).__name__} together again: use map, or a plain tuple.")
    return filled


@contextmanager
def _broadcast_once(model: nn.Module, calls: list[Callable[[], Any]]) -> Iterator[None]:
    """DDP broadcasts buffers before a forward pass: only before the first, or ranks with fewer micro-batches hang."""
    parallel = [module for module in model.modules() if isinstance(module, nn.parallel.DistributedDataParallel)]
    before = [module.require_forward_param_sync for module in parallel]

    def set_to(values: Sequence[bool]) -> None:
        for module, value in zip(parallel, values, strict=True):
            module.require_forward_param_sync = value

    def quietly(call: Callable[[], Any]) -> Callable[[], Any]:
        def called() -> Any:
            set_to([False] * len(parallel))
            return call()

        return called

    calls[1:] = [quietly(call) for call in calls[1:]] if parallel else calls[1:]
    try:
        yield
    except BaseException:
        set_to(before)
        raise


@contextmanager
def _buffers_as_they_were(model: nn.Module) -> Iterator[None]:
    """After an error the buffers of `model` are, bit for bit, what they were."""
    before = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for buffer, values in before:
                buffer.copy_(values)
        raise
