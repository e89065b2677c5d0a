"""One training step as a monitor sees it: what reached the norms and what became of their statistics.

Nothing here waits for a device: readings stay where they were computed until they are asked for.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from steadynorm import models, moments
from steadynorm.moments import Moments
from steadynorm.samples import tensors_in
from steadynorm.training.layer_inputs import normalized_input, of_rows

READINGS = ("divergence", "chance", "batch is finite", "statistics are finite")
# Two halves of fewer samples say next to nothing of what chance does.
FEWEST_SAMPLES = 4


@dataclass
class Seen:
    """What one norm did in one step.

    Args:
        values: behind each statistic, in the call with the fewest; None where it never used those of the batch.
        evaluated: calls with gradients in which it used its running statistics.
        forward_updates, backward_updates: of the running statistics, and those of them inside a backward pass.
    """

    values: int | None = None
    evaluated: int = 0
    forward_updates: int = 0
    backward_updates: int = 0


@dataclass
class Glimpse:
    """What was seen of one step.

    Args:
        step: its number.
        norms: by path, in the order of their first call.
        forwards, learned: of the whole model in training mode; those of them that a gradient came back to.
        evaluating: forwards of the whole model in evaluation mode that a gradient came back to.
        updating: forwards in training mode that nothing came back to and that moved running statistics.
        unseen: paths of norms that could not be looked at, and why.
    """

    step: int
    norms: dict[str, Seen] = field(default_factory=dict)
    forwards: int = 0
    learned: int = 0
    evaluating: int = 0
    updating: int = 0
    unseen: dict[str, str] = field(default_factory=dict)
    readings: "Readings | None" = None


class Readings:
    """Numbers of several layers on their way to the host."""

    def __init__(self, found: Mapping[str, Tensor]) -> None:
        self.paths = list(found)
        stacked = torch.stack(list(found.values()))
        self.event: torch.cuda.Event | None = None
        if stacked.is_cuda:
            self.values = torch.empty(stacked.shape, dtype=stacked.dtype, pin_memory=True)
            self.values.copy_(stacked, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()
        else:
            self.values = stacked

    @property
    def is_here(self) -> bool:
        """Whether the numbers can be read without waiting."""
        return self.event is None or self.event.query()

    def by_path(self) -> dict[str, dict[str, float]]:
        """The numbers, by path and name; waits for them where they are not here."""
        if self.event is not None:
            self.event.synchronize()
        return {
            path: dict(zip(READINGS, row, strict=True))
            for path, row in zip(self.paths, self.values.tolist(), strict=True)
        }


class Looking:
    """Hooks on a model for the length of one step."""

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module], step: int) -> None:
        self.model, self.layers, self.seen = model, dict(layers), Glimpse(step)
        self._found: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        self._open: dict[str, tuple[int, bool]] = {}
        self._before_model: int | None = None
        self._moved_without: list[Callable[[], bool]] = []

    def start(self) -> None:
        """Put the hooks on; none is left where one cannot be put on."""
        try:
            for path, layer in self.layers.items():
                self._handles.append(layer.register_forward_pre_hook(self._before(path), with_kwargs=True))
                self._handles.append(layer.register_forward_hook(self._after(path)))
            self._handles.append(self.model.register_forward_pre_hook(self._model_before()))
            self._handles.append(self.model.register_forward_hook(self._model_after()))
        except BaseException:
            self.stop()
            raise

    def stop(self) -> Glimpse:
        """Take the hooks off, and send the readings to the host."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for path in list(self._open):
            self._count(path)
        self.seen.updating = sum(is_extra() for is_extra in self._moved_without)
        self._moved_without.clear()
        if self._found:
            self.seen.readings = Readings(self._found)
            self._found = {}
        return self.seen

    def _before(self, path: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: Any, kwargs: Any) -> None:
            # Compiled now, a look would stay for ever. A copy of the model may be made in the middle of a step.
            if torch.compiler.is_compiling() or layer is not self.layers[path]:
                return
            seen = self.seen.norms.setdefault(path, Seen())
            self._count(path)  # of a call that never ended: a recomputation stops where it has what it needs
            self._open[path] = updates_of(layer), is_in_backward()
            if is_in_backward():
                return
            if not models.uses_batch_statistics(layer):
                seen.evaluated += torch.is_grad_enabled()
            elif path not in self._found:
                try:
                    self._look(path, layer, args, kwargs)
                except Exception as error:  # no look is worth a training run
                    self.seen.unseen[path] = f"{type(error).__name__}: {error}"

        return hook

    def _after(self, path: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: Any, output: Any) -> None:
            if not torch.compiler.is_compiling() and layer is self.layers[path]:
                self._count(path)

        return hook

    def _count(self, path: str) -> None:
        """Add what the open call of a norm did to its statistics."""
        if path not in self._open:
            return
        before, was_in_backward = self._open.pop(path)
        updates = updates_of(self.layers[path]) - before
        if was_in_backward:
            self.seen.norms[path].backward_updates += updates
        else:
            self.seen.norms[path].forward_updates += updates

    @torch.no_grad()
    def _look(self, path: str, layer: nn.Module, args: Any, kwargs: Any) -> None:
        x, mask = normalized_input(layer, args, kwargs)
        if x.dim() < 2 or not x.numel() or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
            return
        seen = self.seen.norms[path]
        values = x.numel() // x.shape[1]
        seen.values = values if seen.values is None else min(seen.values, values)
        rows = of_rows(x.detach(), mask)
        batch = moments.merge_rows(rows)
        unknown = torch.full_like(batch.mean[0], torch.nan)
        chance = unknown
        if len(rows.mean) >= FEWEST_SAMPLES:
            halves = [moments.merge_rows(_every_second(rows, first)) for first in (0, 1)]
            chance = _divergence(halves[0], halves[1], _eps(layer))
        divergence, are_finite = unknown, torch.ones_like(unknown)
        if models.has_running_statistics(layer):
            mean, var = (statistic.to(batch.mean) for statistic in models.running_statistics(layer))
            are_finite = (mean.isfinite() & var.isfinite()).all().to(unknown)
            if mean.shape == batch.mean.shape:
                divergence = _divergence(Moments(mean, var, 1), batch, _eps(layer))
        is_finite = (batch.mean.isfinite() & batch.var.isfinite()).all().to(unknown)
        self._found[path] = torch.stack([divergence, chance, is_finite, are_finite])

    def _model_before(self) -> Callable[..., None]:
        def hook(model: nn.Module, args: Any) -> None:
            if not torch.compiler.is_compiling() and model is self.model and not is_in_backward():
                self._before_model = sum(map(updates_of, self.layers.values()))

        return hook

    def _model_after(self) -> Callable[..., None]:
        def hook(model: nn.Module, args: Any, output: Any) -> None:
            if torch.compiler.is_compiling() or model is not self.model or self._before_model is None:
                return
            if is_in_backward():
                return
            moved, self._before_model = sum(map(updates_of, self.layers.values())) - self._before_model, None
            self.seen.forwards += model.training
            came_back: list[bool] = []

            def note(gradient: Tensor) -> None:
                if not came_back:
                    came_back.append(True)
                    self.seen.learned += model_was_training
                    self.seen.evaluating += not model_was_training

            model_was_training = model.training
            given = list(tensors_in(output))
            for tensor in given:
                if tensor.requires_grad:
                    self._handles.append(tensor.register_hook(note))
            if model.training and moved > 0 and given:
                self._moved_without.append(lambda: not came_back)

        return hook


def is_in_backward() -> bool:
    """Whether this runs inside a backward pass, as a recomputation does."""
    return torch._C._current_graph_task_id() != -1


def updates_of(layer: nn.Module) -> int:
    """How often the running statistics were moved since the layer was made, read without waiting for the device."""
    count = getattr(layer, "num_batches_tracked", None)
    return count._version if isinstance(count, Tensor) and not count.is_inference() else 0


def _eps(layer: nn.Module) -> float:
    eps = getattr(layer, "eps", 0.0)
    return eps if isinstance(eps, float) else 0.0


def _every_second(rows: Moments, first: int) -> Moments:
    count = rows.count if isinstance(rows.count, int) else rows.count[first::2]
    return Moments(rows.mean[first::2], rows.var[first::2], count)


def _divergence(a: Moments, b: Moments, eps: float) -> Tensor:
    """Jeffreys' divergence of two normal distributions, mean over channels: see `probe.drift.divergence`."""
    var_a, var_b = a.var + eps, b.var + eps
    ratio, shift = var_a / var_b, (a.mean - b.mean).square()
    return ((ratio + 1 / ratio - 2 + shift * (1 / var_a + 1 / var_b)) / 2).mean()
