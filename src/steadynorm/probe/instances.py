"""What an instance norm that tracks running statistics does in evaluation, against one that does not."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from steadynorm import models
from steadynorm.probe import effects
from steadynorm.probe.effects import Task
from steadynorm.probe.facts import Effect, Norm
from steadynorm.probe.trace import Forward


def tracking(norms: Mapping[str, Norm]) -> list[str]:
    """Paths of the instance norms that evaluate by running statistics."""
    return [path for path, norm in norms.items() if norm.kind == "instance" and norm.has_statistics]


def gap(model: nn.Module, batches: Sequence[Any], forward: Forward, task: Task, paths: Sequence[str]) -> Effect:
    """Of normalising each sample by itself in the layers `paths`, as they do in training; in evaluation mode."""
    layers: list[Any] = [model.get_submodule(path) for path in paths]
    kept = [(layer, models.running_statistics(layer), layer.track_running_stats) for layer in layers]

    def state(is_stored: bool) -> Callable[[], None]:
        def put() -> None:
            for layer, (mean, var), tracks in kept:
                # With statistics in place torch's layer would move them.
                layer._buffers["running_mean"], layer._buffers["running_var"] = (
                    (mean, var) if is_stored else (None, None)
                )
                layer.track_running_stats = tracks if is_stored else False

        return put

    try:
        (found,) = effects.between(model, batches, forward, [state(True)], state(False), task=task)
    finally:
        state(True)()
    return found
