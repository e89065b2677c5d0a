"""One update of the running statistics for all the micro-batches of an optimizer step, where they run one by one."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm as TorchBatchNorm

from steadynorm.errors import InputError
from steadynorm.layers.batch import BatchNorm
from steadynorm.layers.running import Running, update_
from steadynorm.moments import Moments, merge


@contextmanager
def pooled_statistics(model: nn.Module) -> Iterator[None]:
    """Move the running statistics once, when the block is over, by the pooled Moments of all batches inside.

        with pooled_statistics(model):
            for images, labels in micro_batches:
                (criterion(model(images), labels) / len(micro_batches)).backward()
        optimizer.step()

    For a layer that sees the data itself they are then those of one large batch, exactly; behind other batch norms,
    those of what the micro-batches made of it. Output and gradients are as ever: every micro-batch is normalised
    alone. A micro-batch whose statistics are not finite is left out, as the guard of a layer says. A layer that is
    called several times moves once, by all its calls. After an exception nothing moves.

    Args:
        model: with batch norm layers of ours; a warning names those of torch.nn, which move as ever.

    Raises:
        InputError: there is none, or they are pooled already.
    """
    layers = [module for module in model.modules() if isinstance(module, BatchNorm)]
    _look_at(model, layers)
    pool = _Pool()
    for layer in layers:
        layer._pool = pool.add
    try:
        yield
    finally:
        for layer in layers:
            del layer._pool
    pool.update_()


class _Pool:
    """The Moments of each set of running statistics; a layer may have several."""

    def __init__(self) -> None:
        self.found: dict[int, tuple[BatchNorm, Running, Moments]] = {}

    def add(self, layer: BatchNorm, running: Running, moments: Moments) -> None:
        if torch._C._current_graph_task_id() != -1:
            return  # a forward pass that checkpointing computes again: its batch is there already
        if layer.guard != "propagate":
            is_finite = (torch.isfinite(moments.mean) & torch.isfinite(moments.var)).all()
            moments = replace(moments, count=torch.where(is_finite, moments.count, 0))
        place = running.mean.data_ptr()
        if place in self.found:
            moments = merge([self.found[place][2], moments])
        self.found[place] = layer, running, moments

    def update_(self) -> None:
        for layer, running, moments in self.found.values():
            update_(running, moments, layer.momentum, guard=layer.guard != "propagate", debias=layer.debias)


def _look_at(model: nn.Module, layers: list[BatchNorm]) -> None:
    others = [
        path or type(module).__name__
        for path, module in model.named_modules()
        if isinstance(module, TorchBatchNorm) and not isinstance(module, BatchNorm)
    ]
    if not layers:
        raise InputError(
            f"pooled_statistics found no batch norm of ours in {type(model).__name__}: convert the model first."
        )
    if any(layer._pool is not None for layer in layers):
        raise InputError("pooled_statistics is inside another one for the same model: one of the two is enough.")
    if others:
        warnings.warn(
            f"pooled_statistics: {', '.join(others)} of torch.nn will move with every micro-batch: convert the model"
            " first.",
            stacklevel=4,
        )
