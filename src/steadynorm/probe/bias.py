"""Who feeds the norm layers: biases that they take out again, and how many values stand behind a statistic."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from steadynorm import models
from steadynorm.probe.drift import training_mode
from steadynorm.probe.facts import Call, DeadBias, Norm, Values
from steadynorm.probe.samples import relative_difference, sample_count, take, tensors_in
from steadynorm.probe.state import is_norm_by_name
from steadynorm.probe.trace import Forward, Watcher, inputs_of, run, watching

# A bias that matters moves something by a tenth or more when it is moved by a deviation; rounding, by far less.
DEAD_CHANGE = 1e-2
DEAD_CHANGE_LOW_PRECISION = 1e-1
# The samples that a batch needs for its statistics to be more than a coincidence.
SAMPLES = 16


def values(calls: Sequence[Call], norms: Mapping[str, Norm], samples: int) -> dict[str, Values]:
    """Values per statistic and sample of the batch norms, of each the call with the fewest."""
    found: dict[str, Values] = {}
    for call in calls:
        norm = norms.get(call.path)
        if norm is None or norm.kind not in ("batch", "sync") or len(call.input_shape) < 2:
            continue
        shape = call.input_shape
        per_sample = shape[0] * math.prod(shape[2:]) / samples
        if call.path not in found or per_sample < found[call.path].per_sample:
            found[call.path] = Values(call.path, per_sample)
    return found


def bare_layer(model: nn.Module, calls: Sequence[Call], norms: Mapping[str, Norm]) -> str:
    """The first layer with a matrix of weights, where no norm is before it; else empty."""
    for call in calls:
        if call.path in norms:
            return ""
        module = model.get_submodule(call.path)
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) or is_norm_by_name(module):
            return ""
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() > 1:
            return call.path
    return ""


def dead(
    model: nn.Module, batch: Any, forward: Forward, norms: Mapping[str, Norm], calls: Sequence[Call]
) -> tuple[DeadBias, ...]:
    """Biases that a norm takes out again in training.

    A bias is a candidate if every output of its layer goes, untouched, into one norm that subtracts the mean of the
    channel; it is dead if moving it changes nothing else: something else may read the layer's output too.
    """
    pairs = _pairs(model, norms, calls)
    count = sample_count(inputs_of(batch, forward))
    if not pairs or count is None:
        return ()
    few = take(batch, list(range(min(count, SAMPLES))))
    learning = [path for path, norm in norms.items() if norm.learns]
    with training_mode(model, learning):
        together = _change(model, few, forward, pairs, norms)
        if together is None:
            return ()
        if together < _limit(model):
            changes = dict.fromkeys(pairs, together)
        else:
            changes = {p: _change(model, few, forward, {p: n}, norms) or math.inf for p, n in pairs.items()}
    return tuple(
        DeadBias(producer, pairs[producer], change, 1.0, _bias(model, producer).numel())
        for producer, change in changes.items()
        if change < _limit(model)
    )


def _pairs(model: nn.Module, norms: Mapping[str, Norm], calls: Sequence[Call]) -> dict[str, str]:
    """Layers with a bias, and the norm that all their outputs go into, and that gets nothing else."""
    removing = {p for p, n in norms.items() if n.learns or n.kind == "instance"}
    removing |= {p for p, n in norms.items() if n.kind in ("batch", "sync") and not n.has_statistics}
    made: dict[str, int] = {}
    fed: dict[str, list[str]] = {}
    for call in calls:
        made[call.path] = made.get(call.path, 0) + 1
        if call.path in removing:
            fed.setdefault(call.path, []).append(call.producer)
    pairs = {}
    for norm, producers in fed.items():
        producer = producers[0]
        if not producer or set(producers) != {producer} or made[producer] != len(producers):
            continue
        layer = model.get_submodule(producer)
        if isinstance(layer, _ConvNd | nn.Linear) and layer.bias is not None:
            channels = norms[norm].channels
            if channels is None or channels == layer.bias.numel():
                pairs[producer] = norm
    return pairs


def _limit(model: nn.Module) -> float:
    low = any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters())
    return DEAD_CHANGE_LOW_PRECISION if low else DEAD_CHANGE


def _bias(model: nn.Module, path: str) -> Tensor:
    bias = model.get_submodule(path).bias
    assert isinstance(bias, Tensor)
    return bias


class _Outputs(Watcher):
    """The outputs of the norm layers and of the model, and the deviation of what the producers make."""

    def __init__(self, norms: Mapping[str, Norm], producers: Mapping[str, str]) -> None:
        super().__init__()
        self.norms, self.producers = norms, producers
        self.outputs: list[Tensor] = []
        self.deviations: dict[str, float] = {}

    def leave(self, path: str, module: nn.Module, inputs: Any, output: Any) -> None:
        super().leave(path, module, inputs, output)
        if path in self.producers:
            self.deviations[path] = float(next(tensors_in(output)).double().std())
        if not path or path in self.norms:
            self.outputs += [t.clone() for t in tensors_in(output) if t.is_floating_point()]


def _change(
    model: nn.Module, batch: Any, forward: Forward, pairs: Mapping[str, str], norms: Mapping[str, Norm]
) -> float | None:
    """Largest relative change of any norm's or the model's output when the biases move by a deviation; None if NaN."""
    before, after = _Outputs(norms, pairs), _Outputs(norms, pairs)
    with watching(model, before):
        run(model, batch, forward)
    put_back = models.remember(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for producer in pairs:
            bias = _bias(model, producer)
            step = torch.randn(bias.shape, generator=generator) * before.deviations[producer]
            bias.add_(step.to(bias))
    try:
        with watching(model, after):
            run(model, batch, forward)
    finally:
        put_back()
    change = 0.0
    for a, b in zip(before.outputs, after.outputs, strict=True):
        change = max(change, relative_difference(a, b))
    return change if math.isfinite(change) else None
