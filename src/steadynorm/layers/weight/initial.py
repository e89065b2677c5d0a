"""Weight norm from data: one batch sets lengths and biases so that every output has mean 0 and deviation 1."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from steadynorm.errors import DegenerateStatisticsError, InputError
from steadynorm.layers.weight import target
from steadynorm.layers.weight.norm import WeightNorm
from steadynorm.moments import Moments, of

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *target.TRANSPOSED)


def initialize_weight_norm_(model: nn.Module, *inputs: Any, **named_inputs: Any) -> list[str]:
    """Set g and the bias of every layer with `weight_norm` from one batch, in the order in which the batch meets them.

    t = v·x / ‖v‖;  g = 1 / deviation[t];  bias = −mean[t] / deviation[t]

    so that every output of such a layer has mean 0 and deviation 1 over this batch, the layers after it seeing what
    the layers before it give by then. Call it once, before training. Nothing else of the model changes: buffers that
    the forward pass moves are put back. Without a bias the mean stays. An output that is the same for all samples (a
    row of zeros) keeps its g. A layer that is called more than once is set by its first call.

    Args:
        model: in the mode it is to train in.
        inputs, named_inputs: what `model` is called with.

    Returns: paths of the layers that were set, in their order.

    Raises:
        InputError: no weight norm in the model, or one whose lengths are not one per output.
        DegenerateStatisticsError: a layer gives one value per output, or one that is not finite.
        Whatever the model raises. In each case nothing has changed.

    Source: Salimans & Kingma, Weight Normalization (2016), section 3.
    """
    layers = {path: module for path, module in model.named_modules() if target.parts(module, WeightNorm)}
    if not layers:
        raise InputError(f"{type(model).__name__} has no layer with weight norm: put it on with weight_norm.")
    for path, layer in layers.items():
        _check(path, layer)
    done: list[str] = []

    def hook(path: str) -> Any:
        def set_once(layer: nn.Module, args: Any, kwargs: Any, y: Tensor) -> Tensor | None:
            if path in done:
                return None
            done.append(path)
            _set(path, layer, y)
            again: Tensor = layer.forward(*args, **kwargs)
            return again

        return set_once

    hooks = [layer.register_forward_hook(hook(path), with_kwargs=True) for path, layer in layers.items()]
    parameters = [p for layer in layers.values() for p in layer.parameters()]
    try:
        with torch.no_grad(), _put_back(list(model.buffers()), always=True), _put_back(parameters, always=False):
            model(*inputs, **named_inputs)
    finally:
        for handle in hooks:
            handle.remove()
    return done


def _check(path: str, layer: nn.Module) -> None:
    if not isinstance(layer, LAYERS) or target.parts(layer, WeightNorm) != ["weight"]:
        raise InputError(
            f"{path or type(layer).__name__} expected weight norm on the weight of a Linear or a convolution, got"
            f" {type(layer).__name__} with {', '.join(target.parts(layer, WeightNorm))}: initialise it by hand."
        )
    dim = _step(layer).dim
    outputs = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    if dim != target.output_dim(layer) or _g(layer).numel() != outputs:
        raise InputError(
            f"{path or type(layer).__name__} expected one length per output, got weight norm with dim={dim} and"
            f" {_g(layer).numel()} lengths for {outputs} outputs: use dim={target.output_dim(layer)} without groups."
        )


def _step(layer: nn.Module) -> WeightNorm:
    lists: Any = layer.parametrizations
    step: WeightNorm = lists["weight"][0]
    return step


def _g(layer: nn.Module) -> Tensor:
    lists: Any = layer.parametrizations
    g: Tensor = lists["weight"].original0
    return g


def _set(path: str, layer: nn.Module, y: Tensor) -> None:
    """Divide g and the bias by the deviation of y, and take its mean off the bias."""
    batch = _moments(layer, y)
    kind = type(layer).__name__
    where = f"{kind.removeprefix('Parametrized')} at {path}" if path else kind.removeprefix("Parametrized")
    if batch.count == 1 or not bool((batch.mean.isfinite() & batch.var.isfinite()).all()):
        found = "one value per output" if batch.count == 1 else "values that are not finite"
        raise DegenerateStatisticsError(
            f"{where} expected a batch with a mean and a deviation, got {found}: give more samples, or look for NaN,"
            " inf and overflow in what comes before it."
        )
    deviation = torch.where(batch.var > 0, batch.var.sqrt(), 1)
    g, bias = _g(layer), layer.bias
    g.copy_(g.double() / deviation.view_as(g))
    if isinstance(bias, Tensor):
        bias.copy_((bias.double() - batch.mean) / deviation)


def _moments(layer: nn.Module, y: Tensor) -> Moments:
    if isinstance(layer, nn.Linear):
        return of(y.reshape(-1, y.shape[-1], 1))
    # A convolution takes one sample without its batch dimension too.
    dims = len(layer.kernel_size) if isinstance(layer, nn.modules.conv._ConvNd) else 0
    y = y if y.dim() == dims + 2 else y.unsqueeze(0)
    return of(y.flatten(2))


@contextmanager
def _put_back(tensors: list[Tensor], *, always: bool) -> Iterator[None]:
    """Afterwards the tensors hold what they held, in the same memory: after an exception, or `always`."""
    before = [tensor.detach().clone() for tensor in tensors]
    is_done = False
    try:
        yield
        is_done = True
    finally:
        if always or not is_done:
            with torch.no_grad():
                for tensor, value in zip(tensors, before, strict=True):
                    tensor.copy_(value)
