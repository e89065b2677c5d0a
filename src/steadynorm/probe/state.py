"""What can be seen of a model without running it: its norm layers, their modes and what they have stored."""

import torch
from torch import nn

from steadynorm import models
from steadynorm.probe.facts import Norm


def look(model: nn.Module) -> dict[str, Norm]:
    """The norm layers of `model` by path. Leaves the model in evaluation mode."""
    layers = models.norms(model)
    # A batch norm that sits in evaluation mode while the model trains was put there by hand, to stay.
    by_hand = {path for path, layer in layers.items() if model.training and not layer.training}
    model.train()
    in_training = {path for path, layer in layers.items() if models.uses_batch_statistics(layer)} - by_hand
    model.eval()
    return {path: _norm(path, layer, in_training) for path, layer in layers.items()}


def _norm(path: str, layer: nn.Module, in_training: set[str]) -> Norm:
    kind = models.norm_kind(layer)
    assert kind is not None
    has_statistics = models.has_running_statistics(layer)
    moves = getattr(layer, "update_running", None) is not False
    channels = getattr(layer, "num_features", None) or getattr(layer, "num_channels", None)
    momentum, tracked = getattr(layer, "momentum", None), getattr(layer, "num_batches_tracked", None)
    is_batch = kind in ("batch", "sync")
    norm = Norm(
        path=path,
        kind=kind,
        class_name=type(layer).__name__,
        channels=channels if isinstance(channels, int) else None,
        eps=getattr(layer, "eps", None),
        momentum=momentum if isinstance(momentum, float | int) else None,
        learns=path in in_training and has_statistics and moves,
        is_frozen=is_batch and has_statistics and not (path in in_training and moves),
        trains_in_evaluation=is_batch and has_statistics and models.uses_batch_statistics(layer),
        has_statistics=has_statistics,
        batches_tracked=int(tracked) if isinstance(tracked, torch.Tensor) else None,
        has_initial_affine=_has_initial_affine(layer),
        takes_single_values=getattr(layer, "single_value", "error") == "running",
    )
    return _with_statistics(norm, layer) if has_statistics else norm


def _with_statistics(norm: Norm, layer: nn.Module) -> Norm:
    mean, var = models.running_statistics(layer)
    broken = ~(torch.isfinite(mean) & torch.isfinite(var))
    stored = {
        "channels": norm.channels or mean.numel(),
        "statistics_dtype": str(mean.dtype).removeprefix("torch."),
        "nonfinite": int(broken.sum()),
        "negative": int((var < 0).sum()),
        "has_initial_statistics": bool((mean == 0).all() and (var == 1).all()),
    }
    return Norm(**{**vars(norm), **stored})


def _has_initial_affine(layer: nn.Module) -> bool:
    weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
    starts = weight is None or bool((weight == 1).all()) or bool((weight == 0).all())
    return starts and (bias is None or not bool(bias.any()))
