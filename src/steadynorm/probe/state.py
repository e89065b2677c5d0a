"""What can be seen of a model without running it: its norm layers, their modes and what they have stored."""

import math

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from steadynorm import models
from steadynorm.probe.facts import DEAD_VARIANCE, Norm
from steadynorm.weights import STATISTICS

# Averaging wrappers without a counter: timm's and ema-pytorch's.
AVERAGES = ("ModelEma", "ModelEmaV2", "ModelEmaV3", "EMA", "ExponentialMovingAverage")
# A channel is dead if its weight is so much less than the largest one.
DEAD_WEIGHT = 1e-4


def look(model: nn.Module) -> dict[str, Norm]:
    """The norm layers of `model` by path. Leaves the model in evaluation mode."""
    layers = models.norms(model)
    # A batch norm that sits in evaluation mode while the model trains was put there by hand, to stay.
    by_hand = {path for path, layer in layers.items() if model.training and not layer.training}
    model.train()
    in_training = {path for path, layer in layers.items() if models.uses_batch_statistics(layer)} - by_hand
    undone = {path for path in by_hand if layers[path].training}
    model.eval()
    return {path: _norm(path, layer, in_training, path in undone) for path, layer in layers.items()}


def frozen_layers(model: nn.Module) -> frozenset[str]:
    """Paths of the modules that have parameters, none of which takes a gradient; none where no parameter does."""
    frozen = set()
    for path, module in model.named_modules():
        gradients = [parameter.requires_grad for parameter in module.parameters()]
        if gradients and not any(gradients):
            frozen.add(path)
    return frozenset() if "" in frozen else frozenset(frozen)


def is_norm_by_name(module: nn.Module) -> bool:
    """Whether it is a norm that is neither torch's nor ours, by the name of its class, with nothing inside it."""
    is_named = "norm" in type(module).__name__.lower() and not any(module.children())
    return is_named and models.norm_kind(module) is None and not type(module).__module__.startswith("torch.")


def dropping(model: nn.Module) -> tuple[str, ...]:
    """Paths of the dropout layers that are in training mode, now that the model is in evaluation mode."""
    return tuple(path for path, module in model.named_modules() if is_dropping(module))


def is_dropping(module: nn.Module) -> bool:
    """Whether it is a dropout layer in training mode that drops something."""
    return isinstance(module, _DropoutNd) and module.training and module.p > 0


def averaged(model: nn.Module) -> dict[str, str]:
    """Norms with running statistics inside a network that holds averaged weights, and the class that averages."""
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        counts = getattr(module, "n_averaged", None)
        if not isinstance(counts, Tensor) and type(module).__name__ not in AVERAGES:
            continue
        for below, layer in models.norms(module).items():
            if models.has_running_statistics(layer):
                found[f"{path}.{below}" if path else below] = type(module).__name__
    return found


def statistics(model: nn.Module) -> dict[str, tuple[Tensor, ...]]:
    """Copies of the running statistics of every module that has some, norm or not, by path."""
    found = {}
    for path, module in model.named_modules():
        buffers = dict(module.named_buffers(recurse=False))
        if kept := tuple(buffers[name].clone() for name in STATISTICS if name in buffers):
            found[path] = kept
    return found


def moved(before: dict[str, tuple[Tensor, ...]], after: dict[str, tuple[Tensor, ...]]) -> tuple[str, ...]:
    """Paths whose statistics are not the same; NaN is the same as NaN."""

    def is_same(a: Tensor, b: Tensor) -> bool:
        return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())

    return tuple(path for path, old in before.items() if not all(map(is_same, old, after.get(path, old))))


def _norm(path: str, layer: nn.Module, in_training: set[str], is_undone: bool) -> Norm:
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
        has_initial_affine=has_initial_affine(layer),
        takes_single_values=getattr(layer, "single_value", "error") == "running",
        is_toggled=is_batch and has_statistics and path in in_training and not _tracks(layer),
        is_debiased=getattr(layer, "debias", False) is True,
        is_undone=is_undone and is_batch,
        updates_always=getattr(layer, "update_running", None) is True,
        trains_affine=_trains_affine(layer),
        group_size=_group_size(layer, kind),
    )
    return _with_statistics(norm, layer) if has_statistics else norm


def _with_statistics(norm: Norm, layer: nn.Module) -> Norm:
    mean, var = models.running_statistics(layer)
    weight = getattr(layer, "weight", None)
    is_dead = var.abs() < DEAD_VARIANCE
    if isinstance(weight, Tensor) and weight.shape == var.shape:
        is_dead = is_dead | (weight.abs() < DEAD_WEIGHT * weight.abs().max())
    broken = ~(torch.isfinite(mean) & torch.isfinite(var))
    stored = {
        "channels": norm.channels or mean.numel(),
        "statistics_dtype": str(mean.dtype).removeprefix("torch."),
        "nonfinite": int(broken.sum()),
        "negative": int((var < 0).sum()),
        "has_initial_statistics": bool((mean == 0).all() and (var == 1).all()),
        "below_eps": int(((var >= DEAD_VARIANCE) & (var < (norm.eps or 0.0))).sum()),
        "dead": int(is_dead.sum()),
    }
    return Norm(**{**vars(norm), **stored})


def has_initial_affine(layer: nn.Module) -> bool:
    """See `Norm.has_initial_affine`."""
    weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
    # A bias that was never to be trained, as in front of a classifier for retrieval, says nothing.
    if bias is not None and (bias.requires_grad or bool(bias.any())):
        return not bool(bias.any())
    return weight is None or bool((weight == 1).all()) or bool((weight == 0).all())


def _tracks(layer: nn.Module) -> bool:
    return getattr(layer, "track_running_stats", True) is not False


def _trains_affine(layer: nn.Module) -> bool | None:
    """Whether weight or bias take a gradient. Ours may hold them back whatever requires_grad says."""
    gradients = [parameter.requires_grad for parameter in layer.parameters(recurse=False)]
    return any(gradients) and getattr(layer, "train_affine", True) is not False if gradients else None


def _group_size(layer: nn.Module, kind: str) -> int | None:
    groups, channels = getattr(layer, "num_groups", None), getattr(layer, "num_channels", None)
    shape = getattr(layer, "normalized_shape", None)
    if kind == "group" and isinstance(groups, int) and isinstance(channels, int):
        return channels // groups
    if kind in ("layer", "rms") and isinstance(shape, tuple | list):
        return math.prod(shape)
    return 1 if kind == "instance" else None
