"""Does padding enter the statistics of a norm? The same sequences, padded further, must come out the same.

Sequences of several lengths, filled up with one value, are filled up by half as much again, and their masks too. A
norm that is given the same at the places that hold data, and makes something else of it, counts the padding. Comparing
values instead of lengths would accuse convolutions, which see padding at every border (0.1 to 0.4 in a masked network).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from steadynorm.probe.drift import training_mode
from steadynorm.probe.effects import Spread, rows
from steadynorm.probe.facts import Norm
from steadynorm.probe.samples import map_tensors, sample_count, tensors_in
from steadynorm.probe.trace import Forward, ForwardRaised, Watcher, inputs_of, run, watching
from steadynorm.probe.training_facts import Padding

# Shorter sequences, and fewer of them, are no sign of padding; nor are images with a plain border: only (N, C, L),
# (N, L, C) and (N, L) are looked at.
FEWEST_PLACES, FEWEST_LENGTHS, LEAST_SHARE = 8, 3, 0.25
# Relative change of what a norm is given that counts as none (a convolution at the border), and of what it makes of it.
SAME, CHANGED = 0.02, 0.05


def padding(model: nn.Module, batch: Any, forward: Forward, norms: Mapping[str, Norm]) -> Padding | None:
    """The first norm that counts padding in evaluation, and in training; None where there is no padding to be seen."""
    inputs = inputs_of(batch, forward)
    count = sample_count(inputs)
    found = next((p for t in tensors_in(inputs) if count and (p := _padded(t)) is not None), None)
    if found is None or count is None:
        return None
    axis, size, lengths = found
    longest = [int(i) for i in torch.nonzero(lengths >= size // 2).flatten()]
    far = int(lengths.argmin())
    longer = map_tensors(lambda t: _extended(t, axis, size, count, far), batch)
    try:
        evaluating = _culprit(model, (batch, longer), forward, norms, longest)
        spread = Spread()
        before, after = (run(model, b, forward) for b in (batch, longer))
        shorter, taller = rows(before, count), rows(after, count)
        if shorter.shape == taller.shape:
            spread.add(taller, shorter)
        with training_mode(model, [path for path, norm in norms.items() if norm.learns]):
            training = _culprit(model, (batch, longer), forward, norms, longest)
    except ForwardRaised:
        return None  # a longest length, as positions have it
    change = spread.relative_square**0.5 if spread.values else None
    return Padding(size, int(lengths.min()), evaluating, training if training != evaluating else "", change)


def _padded(x: Tensor) -> tuple[int, int, Tensor] | None:
    """Axis, its size and the lengths (N,) of sequences that are filled up at their ends with one value."""
    if not (x.dim() == 3 and x.is_floating_point()) and not (x.dim() == 2 and x.dtype == torch.long):
        return None
    for axis in range(x.dim() - 1, 0, -1):
        places = x.movedim(axis, 1).flatten(2) if x.dim() == 3 else x[..., None]
        if places.shape[1] < FEWEST_PLACES:
            continue
        value = places[:, -1].flatten().mode().values
        is_filled = (places == value).all(2)
        run_lengths = is_filled.flip(1).long().cumprod(1).sum(1)
        lengths = places.shape[1] - run_lengths
        inside = int(is_filled.sum() - run_lengths.sum()) / is_filled.numel()
        is_plausible = int(lengths.min()) > 0 and inside < 0.05
        if is_plausible and len(lengths.unique()) >= FEWEST_LENGTHS and (run_lengths > 0).float().mean() >= LEAST_SHARE:
            return axis, places.shape[1], lengths
    return None


def _extended(tensor: Tensor, axis: int, size: int, count: int, far: int) -> Tensor:
    """A tensor of the batch, longer by half: with what it holds at the last place of the shortest sequence."""
    place = axis if tensor.dim() > axis and tensor.shape[axis] == size else 1
    if tensor.dim() < 2 or tensor.shape[0] != count or tensor.shape[place] != size:
        return tensor
    fill = tensor[far : far + 1].narrow(place, size - 1, 1).expand_as(tensor.narrow(place, 0, 1))
    return torch.cat([tensor, fill.repeat_interleave(size // 2, place)], place)


class _Seen(Watcher):
    """First input and output of every norm."""

    def __init__(self, norms: Mapping[str, Norm]) -> None:
        super().__init__()
        self.norms = norms
        self.seen: dict[str, tuple[Tensor, Tensor]] = {}

    def leave(self, path: str, module: nn.Module, inputs: Any, output: Any) -> None:
        super().leave(path, module, inputs, output)
        given, made = next(tensors_in(inputs), None), next(tensors_in(output), None)
        if path in self.norms and given is not None and made is not None and path not in self.seen:
            self.seen[path] = given.detach().clone(), made.detach().clone()


def _culprit(
    model: nn.Module, pair: Sequence[Any], forward: Forward, norms: Mapping[str, Norm], samples: Sequence[int]
) -> str:
    """The first norm that makes something else of the same, when the sequences are padded further; empty if none."""
    seen = []
    for batch in pair:
        watcher = _Seen(norms)
        with watching(model, watcher):
            run(model, batch, forward)
        seen.append(watcher.seen)
    for path, (given, made) in seen[0].items():
        if path not in seen[1]:
            continue
        changes = [_change(a, b, samples) for a, b in zip((given, made), seen[1][path], strict=True)]
        if None not in changes and (changes[0] or 0.0) <= SAME and (changes[1] or 0.0) >= CHANGED:
            return path
    return ""


def _change(a: Tensor, b: Tensor, samples: Sequence[int]) -> float | None:
    """Relative change in the first quarter of the places of the longer sequences; None where no axis grew."""
    grown = [axis for axis in range(a.dim()) if a.shape[axis] != b.shape[axis]]
    if a.dim() != b.dim() or len(grown) != 1 or max(samples, default=0) >= min(a.shape[0], b.shape[0]):
        return None
    places = max(1, a.shape[grown[0]] // 4)
    x, y = (t.double()[list(samples)].narrow(grown[0], 0, places) for t in (a, b))
    return float((x - y).square().mean().sqrt() / x.std().clamp(min=1e-12))
