"""Norms of somebody else's that square what they are given in float16, whose largest number is 65504.

Each is run once more, alone, in float32 on what it was given: where the outputs are not the same, it is the precision.
"""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from steadynorm.probe import state
from steadynorm.probe.facts import Call
from steadynorm.probe.samples import map_tensors, relative_difference, tensors_in
from steadynorm.probe.trace import Forward, Watcher, run, watching
from steadynorm.probe.training_facts import Overflow

# What may be squared in float16.
LARGEST_SQUARED = math.sqrt(torch.finfo(torch.float16).max)
# Relative to the largest value of the output in float32. Rounding in float16 is a thousandth, and what squares a mean
# far from zero loses more (SN501); an overflow makes outputs zero, infinite or NaN.
MATERIAL_CHANGE = 0.5


class _Collector(Watcher):
    """Keeps what the norms `paths` are given and what they make of it, of the first call in which that is so large."""

    def __init__(self, paths: frozenset[str]) -> None:
        super().__init__()
        self.paths = paths
        self.seen: dict[str, tuple[Any, Any]] = {}

    def leave(self, path: str, module: nn.Module, inputs: Any, output: Any) -> None:
        super().leave(path, module, inputs, output)
        if path in self.paths and path not in self.seen and _largest(inputs) > LARGEST_SQUARED:
            kept = map_tensors(Tensor.clone, inputs), map_tensors(Tensor.clone, output)
            self.seen[path] = kept


def overflows(model: nn.Module, batch: Any, forward: Forward, calls: Sequence[Call]) -> tuple[Overflow, ...]:
    """The norms that are not torch's whose output in float16 is another than in float32.

    Args:
        calls: of a pass over the batch; where no such norm was given float16 there is no other pass.
    """
    halves = {call.path for call in calls if call.input_dtype == "float16"}
    modules = model.named_modules()
    layers = {path: module for path, module in modules if path in halves and state.is_norm_by_name(module)}
    if not layers:
        return ()
    collector = _Collector(frozenset(layers))
    with watching(model, collector):
        run(model, batch, forward)
    found = []
    for path, (inputs, output) in collector.seen.items():
        change = _change(layers[path], inputs, output)
        if change >= MATERIAL_CHANGE:
            found.append(Overflow(path, type(layers[path]).__name__, _largest(inputs), change))
    return tuple(found)


def _largest(inputs: Any) -> float:
    """The largest magnitude of what is given in float16; 0 where nothing is, or something is not finite."""
    halves = [t for t in tensors_in(inputs) if t.dtype == torch.float16 and t.numel()]
    if not halves or not all(bool(t.isfinite().all()) for t in halves):
        return 0.0
    return max(float(t.abs().max()) for t in halves)


def _change(layer: nn.Module, inputs: Any, output: Any) -> float:
    """How far the output is from that of the layer in float32, relative to the largest value of that."""
    (args, kwargs), widened = inputs, copy.deepcopy(layer).float()
    widen: Callable[[Tensor], Tensor] = lambda t: t.float() if t.is_floating_point() else t  # noqa: E731
    try:
        with torch.no_grad():
            wide = widened(*map_tensors(widen, args), **map_tensors(widen, kwargs))
    except Exception:  # it does not take float32: then there is nothing to hold it against
        return 0.0
    pairs = [(a.float(), b) for a, b in zip(tensors_in(output), tensors_in(wide), strict=False)]
    if not all(bool(b.isfinite().all()) for _, b in pairs):
        return 0.0
    return max((relative_difference(b, a) for a, b in pairs), default=0.0)
