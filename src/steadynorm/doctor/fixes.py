"""Repairs: safe ones leave what the model computes alone, or bring its statistics up to date; the others say so."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from steadynorm import models, recipe
from steadynorm.errors import SteadynormError
from steadynorm.probe import drift, spectral, state
from steadynorm.probe.samples import relative_difference, tensors_in
from steadynorm.probe.trace import ForwardRaised, run
from steadynorm.weights import STATISTICS

# What folding may change: the rounding of a few additions, relative to the largest value of the output.
FOLD_TOLERANCE = 1e-4

DEFAULT_MOMENTUM = 0.1
MOMENTUM_DIGITS = 12


class UnhelpfulError(SteadynormError):
    """A repair that did not do what it should; it is taken back."""


def recalibrate_(model: nn.Module, targets: Sequence[tuple[str, ...]], batches: Iterable[Any]) -> None:
    """Give the layers of `targets` the statistics of the data, pooled exactly over all batches.

    Only the batch norms that learn are in training mode for it, and only statistics of `targets` change.
    """
    paths = [path for (path,) in targets]
    with models.undisturbed(model):
        learning = [path for path, norm in state.look(model).items() if norm.learns]
        recalibration = drift.recalibrate(model, list(batches), recipe.call, learning)
    for path, (mean, var) in recalibration.statistics(paths).items():
        running_mean, running_var = models.running_statistics(model.get_submodule(path))
        with torch.no_grad():
            running_mean.copy_(mean)
            running_var.copy_(var)


def fold_biases_(model: nn.Module, targets: Sequence[tuple[str, ...]], batches: Iterable[Any]) -> None:
    """Take the bias out of each (layer, norm) of `targets`, and out of the running mean of the norm, if it has one.

    Raises:
        UnhelpfulError: the output in evaluation mode is not the same.
    """
    batch = next(iter(batches))
    with models.undisturbed(model):
        model.eval()
        before = run(model, batch, recipe.call)
    for producer, norm in targets:
        layer, following = model.get_submodule(producer), model.get_submodule(norm)
        assert isinstance(layer.bias, nn.Parameter)
        if models.has_running_statistics(following):
            running_mean, _ = models.running_statistics(following)
            with torch.no_grad():
                running_mean.sub_(layer.bias)
        layer.register_parameter("bias", None)
    with models.undisturbed(model):
        model.eval()
        after = run(model, batch, recipe.call)
    change = max(map(relative_difference, tensors_in(before), tensors_in(after)), default=0.0)
    if not change <= FOLD_TOLERANCE:
        raise UnhelpfulError(f"folding changed the output by {change:.1%}")


def widen_(model: nn.Module, targets: Sequence[tuple[str, ...]], batches: Iterable[Any]) -> None:
    """Keep the layers of `targets` in float32, and give them the statistics of the data.

    Raises:
        UnhelpfulError: the model does not run with float32 norms in it.
    """
    data = list(batches)
    for (path,) in targets:
        model.get_submodule(path).float()
    try:
        with models.undisturbed(model):
            model.eval()
            run(model, data[0], recipe.call)
        recalibrate_(model, targets, data)
    except ForwardRaised as raised:
        raise UnhelpfulError(f"the model does not run with the layer in float32 ({raised.__cause__})") from raised


def convert_momenta_(model: nn.Module, targets: Sequence[tuple[str, ...]], batches: Iterable[Any]) -> None:
    """Turn the momenta of `targets` from the sense of Keras into PyTorch's, and give the layers the data's statistics.

    Not safe: it changes how the model trains on.
    """
    for (path,) in targets:
        layer = model.get_submodule(path)
        _set(layer, "momentum", round(1 - getattr(layer, "momentum", 0.0), MOMENTUM_DIGITS))
    recalibrate_(model, targets, batches)


def start_momenta_(model: nn.Module, targets: Sequence[tuple[str, ...]], batches: Iterable[Any]) -> None:
    """Give `targets` PyTorch's default momentum, and the statistics of the data.

    Not safe: it changes how the model trains on.
    """
    for (path,) in targets:
        _set(model.get_submodule(path), "momentum", DEFAULT_MOMENTUM)
    recalibrate_(model, targets, batches)


def track_(model: nn.Module, targets: Sequence[tuple[str, ...]], batches: Iterable[Any]) -> None:
    """Let the statistics of `targets` move again in training, and give them those of the data.

    Not safe: somebody switched them off on purpose.
    """
    for (path,) in targets:
        _set(model.get_submodule(path), "track_running_stats", True)
    recalibrate_(model, targets, batches)


def forget_(model: nn.Module, targets: Sequence[tuple[str, ...]], batches: Iterable[Any]) -> None:
    """Take the running statistics out of the instance norms `targets`, so that evaluation does as training does.

    Not safe: it changes what evaluation computes.
    """
    for (path,) in targets:
        layer = model.get_submodule(path)
        _set(layer, "track_running_stats", False)
        for name in STATISTICS:
            layer.register_buffer(name, None)


def _set(layer: nn.Module, name: str, value: object) -> None:
    setattr(layer, name, value)


def iterate_(model: nn.Module, targets: Sequence[tuple[str, ...]], batches: Iterable[Any]) -> None:
    """Take the vectors of the spectral normalizations of `targets` anew from their weights."""
    paths = {path for (path,) in targets}
    for found in list(spectral.stored(model)):
        if found.path in paths:
            spectral.iterate_(found.matrix, found.u, found.v, spectral.POWER_ITERATIONS)
