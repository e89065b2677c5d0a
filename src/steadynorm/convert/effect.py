"""What a conversion does to the outputs of a model, on batches that run before and after it."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steadynorm.errors import InputError
from steadynorm.samples import sample_count, tensors_in
from steadynorm.training.evaluation import call, evaluation, on_device

Forward = Callable[[nn.Module, Any], Any]
Loss = Callable[[Any, Any], Any]


@dataclass(frozen=True, repr=False)
class Effect:
    """How far the outputs of a converted model are from what they were, in evaluation.

    Args:
        relative: of each output, sqrt(Σ |new − old|² / Σ |old|²); of integers and booleans the share that differs.
            Infinite where shapes differ.
        loss_before, loss_after: mean over the samples, where there is a loss.
        samples: that ran through the model.
    """

    relative: tuple[float, ...]
    samples: int
    loss_before: float | None = None
    loss_after: float | None = None

    def __repr__(self) -> str:
        each = ", ".join(f"{value:.2g}" for value in self.relative)
        lines = [f"outputs differ by {each} of their size, over {self.samples} samples in evaluation"]
        if self.loss_before is not None and self.loss_after is not None:
            lines.append(f"loss {self.loss_before:.4g} before, {self.loss_after:.4g} after")
        return "\n".join(lines)


@dataclass(frozen=True)
class Outputs:
    """What a model gave for all batches: its tensors, batch by batch, on the CPU; the loss, and the samples."""

    tensors: list[list[Tensor]]
    loss: float | None
    samples: int


class Examples:
    """Batches, and how a model is run on them.

    Args:
        batches: gone through several times, and so kept in memory.
        forward: called as forward(model, batch).
        loss: called as loss(output, batch); a scalar, the mean over the samples.
    """

    def __init__(self, batches: Iterable[Any], forward: Forward | None = None, loss: Loss | None = None) -> None:
        if isinstance(batches, Tensor) or not isinstance(batches, Iterable):
            kind = type(batches).__name__
            raise InputError(f"convert_ got batches of {kind}, expected an iterable of them: a DataLoader, or a list.")
        self.batches: Sequence[Any] = [*batches]
        if not self.batches:
            raise InputError("convert_ got batches without a batch: give examples of what the model will see.")
        self.forward, self.loss = forward or call, loss

    def run(self, model: nn.Module) -> Outputs:
        """What `model` gives in evaluation; it is afterwards as it was."""
        tensors, losses, weights = [], [], []
        with evaluation(model, self.batches):
            for batch in self.moved(model):
                output = self.forward(model, batch)
                tensors.append([tensor.cpu() for tensor in tensors_in(output)])
                weights.append(sample_count(batch) or _first_size(batch))
                if self.loss is not None:
                    losses.append(float(self.loss(output, batch)))
        samples = sum(weights)
        pairs = zip(losses, weights, strict=True) if losses else ()
        loss = sum(one * weight for one, weight in pairs) / max(samples, 1) if losses else None
        return Outputs(tensors, loss, samples)

    def moved(self, model: nn.Module) -> Iterable[Any]:
        """The batches, each on the device of the model."""
        device = next((t.device for t in (*model.parameters(), *model.buffers())), None)
        return (batch if device is None else on_device(device, batch) for batch in self.batches)


def effect(before: Outputs, after: Outputs) -> Effect:
    """How far `after` is from `before`."""
    counts = {len(tensors) for outputs in (before, after) for tensors in outputs.tensors}
    if len(counts) > 1:
        return Effect((math.inf,), before.samples, before.loss, after.loss)
    olds, news = (list(zip(*outputs.tensors, strict=True)) for outputs in (before, after))
    relative = tuple(_relative(old, new) for old, new in zip(olds, news, strict=True))
    return Effect(relative, before.samples, before.loss, after.loss)


def _relative(old: Sequence[Tensor], new: Sequence[Tensor]) -> float:
    if [one.shape for one in old] != [one.shape for one in new]:
        return math.inf
    if not (old[0].is_floating_point() or old[0].is_complex()):
        differing = sum(int((a != b).sum()) for a, b in zip(old, new, strict=True))
        return differing / max(sum(a.numel() for a in old), 1)
    wide = torch.complex128 if old[0].is_complex() else torch.float64
    distance = sum(float((b.to(wide) - a.to(wide)).abs().square().sum()) for a, b in zip(old, new, strict=True))
    size = sum(float(a.to(wide).abs().square().sum()) for a in old)
    return math.sqrt(distance / size) if size else (math.inf if distance else 0.0)


def _first_size(batch: Any) -> int:
    return next((tensor.shape[0] for tensor in tensors_in(batch) if tensor.dim()), 1)
