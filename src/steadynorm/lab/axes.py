"""What the lab varies: the batch size and the norm, as data, and how a norm is put into a model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from steadynorm import models
from steadynorm.errors import InputError
from steadynorm.layers import BatchNorm1d, BatchNorm2d, BatchNorm3d
from steadynorm.layers.factory import group_count


@dataclass(frozen=True)
class Cell:
    """One training run of a grid: the value of each axis, and the seed."""

    norm: str
    batch_size: int
    seed: int

    @property
    def parameters(self) -> dict[str, int | str]:
        """The value of each axis, without the seed."""
        return {"norm": self.norm, "batch_size": self.batch_size}


def grid(*, norms: Sequence[str], batch_sizes: Sequence[int], seeds: int) -> list[Cell]:
    """Every cell, seed by seed, so that a run that is stopped has seen the whole grid with fewer seeds.

    Raises:
        InputError: an axis is empty, or a value of it makes no sense.
    """
    for name in norms:
        if name not in NORMS:
            raise InputError(f"there is no norm '{name}': choose from {', '.join(NORMS)}.")
    for size in batch_sizes:
        if size < 1:
            raise InputError(f"a batch size of {size} was given: expected whole numbers from 1 on.")
    if seeds < 1:
        raise InputError(f"{seeds} seeds were given: expected at least 1, and 3 for a verdict to stand on.")
    if not norms or not batch_sizes:
        raise InputError("an axis is empty: give at least one norm and one batch size.")
    sizes = sorted(set(batch_sizes))
    return [Cell(norm, size, seed) for seed, size, norm in product(range(seeds), sizes, dict.fromkeys(norms))]


class ChannelScale(nn.Module):
    """What a batch norm leaves when it stops normalizing: y = weight · x + bias per channel.

    The scale and the shift stay, since the layers before a norm usually have no bias: taking them too would compare
    two things at once. x is (N, C, *).
    """

    def __init__(self, num_features: int, *, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Scale and shift each channel of x (N, C, *)."""
        shape = (1, -1, *(1,) * (x.dim() - 2))
        y = x * self.weight.view(shape)
        return y if self.bias is None else y + self.bias.view(shape)


def set_norm(model: nn.Module, norm: str) -> nn.Module:
    """Replace every batch norm of `model` by `norm`, in place; a layer that is used twice is replaced by one layer.

    ``batch`` leaves the model as it is, ``group`` and ``layer`` normalize each sample (layer over all its channels and
    positions), ``none`` keeps only the scale and the shift. Weight, bias, device, dtype and mode are taken over.

    Returns: the model; another object only if it was itself a batch norm.

    Raises:
        InputError: the model has no batch norm, or one that does more than normalize.
    """
    make = NORMS[norm]
    if make is None:
        return model
    found = {path: old for path, old in models.norms(model).items() if isinstance(old, _BatchNorm)}
    if not found:
        raise InputError(f"the model has no batch norm that {norm} norm could take the place of: compare only 'batch'.")
    for path, old in found.items():
        _ensure_plain(path, old)
        model = models.replace(model, old, _taking_over(old, make(old)))
    return model


def _group(old: _BatchNorm) -> nn.Module:
    return nn.GroupNorm(group_count(old.num_features), old.num_features, old.eps, old.affine)


def _layer(old: _BatchNorm) -> nn.Module:
    return nn.GroupNorm(1, old.num_features, old.eps, old.affine)


def _none(old: _BatchNorm) -> nn.Module:
    return ChannelScale(old.num_features, bias=old.bias is not None) if old.affine else nn.Identity()


NORMS: dict[str, Callable[[_BatchNorm], nn.Module] | None] = {
    "batch": None,
    "group": _group,
    "layer": _layer,
    "none": _none,
}


def _ensure_plain(path: str, old: _BatchNorm) -> None:
    """Refuse a layer that a replacement would silently take something away from."""
    if is_lazy(old.weight) or (old.running_mean is not None and is_lazy(old.running_mean)):
        raise InputError(f"{path} is lazy and does not know its channels yet: run one batch through it in model().")
    plain = (BatchNorm1d, BatchNorm2d, BatchNorm3d)
    ours = type(old) in plain and getattr(old, "activation", None) is None
    if not ours and type(old).forward not in (_BatchNorm.forward, nn.SyncBatchNorm.forward):
        raise InputError(
            f"{path} is a {type(old).__name__}, which does more than normalize: only 'batch' can be compared, "
            "or write the model with a plain batch norm."
        )


def _taking_over(old: _BatchNorm, new: nn.Module) -> nn.Module:
    """`new` with the weight, bias, device, dtype and mode of `old`; a batch norm without bias leaves none."""
    if old.affine:
        new.weight = old.weight
        new.bias = old.bias
    return new.train(old.training)
