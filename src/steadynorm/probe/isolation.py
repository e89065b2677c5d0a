"""Does the output for one sample depend on the others? Change its batch mates, and look at every module.

One sample stays, its mates are swapped for others, the shape of the batch stays the same. On one shape a sample that
stands alone gives the same bits (60 architectures, float32 and bfloat16: not one bit differed), which comparing two
batch sizes would not. The output alone is not enough: a residual branch that starts at zero hides what happens in it.
And one place is not enough: a recurrence over the samples leaves the first as it is, a maximum the one that holds it.
So the first sample of a group stays once, and once the last.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count as count_up
from typing import Any

import torch
from torch import Tensor, nn

from steadynorm import models
from steadynorm.probe import effects
from steadynorm.probe.facts import Leak
from steadynorm.probe.samples import (
    ByTensor,
    join,
    map_tensors,
    readings,
    relative_difference,
    sample_count,
    shapes,
    take,
    tensors_in,
)
from steadynorm.probe.trace import Forward, NotPossible, Watcher, inputs_of, run, watching

# A prime: sizes inside a network are rarely multiples of it, so that a size is not mistaken for the samples.
GROUP = 5
# Where a repeated pass does not give the same bits (some kernels on a GPU), ten times its difference is the floor.
FLOOR_FACTOR = 10.0
# Below this a difference is rounding of float64 sums, not a leak.
SMALLEST_CHANGE = 1e-7

Readings = list[list[Tensor]]


@dataclass
class _Record:
    """What the sample that stays may be in the tensors into and out of one call."""

    path: str
    class_name: str
    parent: "_Record | None"
    inputs: Readings
    started: int
    outputs: Readings = field(default_factory=list)
    ended: int = 0


class _Recorder(Watcher):
    def __init__(self, count: int, place: int) -> None:
        super().__init__()
        self.count, self.place = count, place
        self.records: list[_Record] = []
        self._open: list[_Record] = []
        self._clock = count_up()
        # What one call gives is given to the next, and by the container that it is in.
        self._known = ByTensor[list[Tensor]]()

    def enter(self, path: str, module: nn.Module, inputs: Any) -> None:
        parent = self._open[-1] if self._open else None
        self._open.append(_Record(path, type(module).__name__, parent, self._read(inputs), next(self._clock)))
        super().enter(path, module, inputs)

    def leave(self, path: str, module: nn.Module, inputs: Any, output: Any) -> None:
        super().leave(path, module, inputs, output)
        record = self._open[len(self.active)]
        del self._open[len(self.active) :]
        record.outputs, record.ended = self._read(output), next(self._clock)
        self.records.append(record)

    def _read(self, value: Any) -> Readings:
        return [self._copies(tensor) for tensor in tensors_in(value)]

    def _copies(self, tensor: Tensor) -> list[Tensor]:
        """Copies, since later operations in place would change them; the same ones of what was seen before."""
        copies = self._known.get(tensor)
        if copies is None:
            copies = [part.clone() for part in readings(tensor, self.count, self.place)]
            self._known.set(tensor, copies)
        return copies


def leaks(
    model: nn.Module,
    batches: Sequence[Any],
    forward: Forward,
    task: effects.Task = effects.UNJUDGED,
    *,
    recalibrated: int = 0,
) -> tuple[Leak, ...]:
    """The innermost modules in which a sample meets its batch mates.

    Args:
        recalibrated: how many layers of the model the caller has given other statistics; recorded in each leak.

    Raises:
        NotPossible: the samples cannot be told apart, or the model takes another way for other data.
    """
    looks = [_look(model, batches, forward, is_last) for is_last in (False, True)]
    found: dict[str, tuple[_Record, float]] = {}
    for look in looks:
        for i, change in sorted(look.sources.items()):
            record = look.first[i]
            found[record.path] = record, max(change, found.get(record.path, (record, 0.0))[1])
    if not found:
        return ()
    tainted = {path for look in looks if look.sources for path in _tainted(model, look, forward)}
    effect = effects.of_mates(model, batches, forward, task)
    return tuple(
        Leak(
            path=path,
            class_name=record.class_name,
            change=change,
            output_change=max(look.hidden for look in looks),
            is_confirmed=path in tainted,
            effect=effect,
            recalibrated=recalibrated,
        )
        for path, (record, change) in found.items()
        if not any(inner.startswith(f"{path}." if path else "") for inner in found if inner != path)
    )


@dataclass
class _Look:
    """A sample at its place among others, the calls of that pass, and those in which it meets them, by index."""

    here: Any
    count: int
    place: int
    first: list[_Record]
    sources: dict[int, float]
    hidden: float


def _look(model: nn.Module, batches: Sequence[Any], forward: Forward, is_last: bool) -> _Look:
    """Two batches that share their first sample, or their last: what differs between the two passes for it."""
    here, there = _two_groups(batches, forward, is_last)
    count = sample_count(inputs_of(here, forward))
    assert count is not None
    place = count - 1 if is_last else 0
    first, again, other = (_record(model, batch, forward, count, place) for batch in (here, here, there))
    if not [r.path for r in first] == [r.path for r in again] == [r.path for r in other]:
        raise NotPossible("the model does not call the same modules for two batches of the same shape")
    floors = [SMALLEST_CHANGE + FLOOR_FACTOR * _change(a.outputs, b.outputs) for a, b in zip(first, again, strict=True)]
    hidden = _change(first[-1].outputs, other[-1].outputs)
    return _Look(here, count, place, first, _sources(first, other, floors), hidden if hidden > floors[-1] else 0.0)


def _two_groups(batches: Sequence[Any], forward: Forward, is_last: bool) -> tuple[Any, Any]:
    """Two batches of one shape that share their first sample, or their last, and no other as far as there are any."""
    batch = batches[0]
    count = sample_count(inputs_of(batch, forward))
    if count is None:
        raise NotPossible("the tensors of a batch differ in their first size, so its samples cannot be told apart")
    if count == 1:
        same = [b for b in batches if shapes(b) == shapes(batch)]
        if len(same) < 3:
            raise NotPossible("a batch holds a single sample: give batches of 2 or more")
        return join(same[0], same[1]), join(same[2], same[1]) if is_last else join(same[0], same[2])
    if count == 2:
        return batch, take(batch, [1, 1] if is_last else [0, 0])
    # Other samples, not the same ones in another order, which a mean over the samples would not notice.
    size = min(GROUP, (count + 1) // 2)
    mates = list(range(count - size + 1, count))
    return take(batch, list(range(size))), take(batch, [*mates, size - 1] if is_last else [0, *mates])


def _record(model: nn.Module, batch: Any, forward: Forward, count: int, place: int) -> list[_Record]:
    recorder = _Recorder(count, place)
    with watching(model, recorder):
        run(model, batch, forward)
    return recorder.records


def _sources(first: list[_Record], other: list[_Record], floors: list[float]) -> dict[int, float]:
    """The innermost calls in which the sample meets its mates, by index, with how much it changes there.

    Either the inputs of a call agree and its outputs do not, or a module inside it is given something that disagrees
    and that nothing before it explains: then it arose in the call's own code, whatever becomes of it later.
    """
    came_in = [_change(a.inputs, b.inputs) for a, b in zip(first, other, strict=True)]
    went_out = [_change(a.outputs, b.outputs) for a, b in zip(first, other, strict=True)]
    index = {id(record): i for i, record in enumerate(first)}
    found: dict[int, float] = {}
    for i, record in enumerate(first):
        if came_in[i] <= SMALLEST_CHANGE and went_out[i] > floors[i]:
            found[i] = went_out[i]
        if came_in[i] > floors[i] and record.parent is not None:
            above = index.get(id(record.parent))
            before = [
                went_out[j] > floors[j]
                for j, sibling in enumerate(first)
                if sibling.parent is record.parent and sibling.ended < record.started
            ]
            if above is not None and came_in[above] <= SMALLEST_CHANGE and not any(before):
                found[above] = max(found.get(above, 0.0), came_in[i])
    return {i: found[i] for i in found if not any(_is_inside(first[j], first[i]) for j in found)}


def _is_inside(inner: _Record, outer: _Record) -> bool:
    parent = inner.parent
    while parent is not None and parent is not outer:
        parent = parent.parent
    return parent is outer


def _change(a: Readings, b: Readings) -> float:
    """Largest relative difference over all tensors, each in the reading that makes it smallest."""
    return max(
        (min(map(relative_difference, x, y), default=0.0) for x, y in zip(a, b, strict=False)),
        default=0.0,
    )


def _tainted(model: nn.Module, look: _Look, forward: Forward) -> set[str]:
    """Modules that a NaN in the other samples reaches the sample in, while it is free of it in their inputs.

    A second witness only: NaN also crosses where other samples are multiplied by zero, which is no dependence.
    """

    def poison(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point() or not tensor.dim() or tensor.shape[0] != look.count:
            return tensor
        poisoned = torch.full_like(tensor, torch.nan)
        poisoned[look.place] = tensor[look.place]
        return poisoned

    put_back = models.remember(model)  # a norm that is left in training mode would remember the NaN
    try:
        records = _record(model, map_tensors(poison, look.here), forward, look.count, look.place)
    except Exception:  # a model may refuse NaN: then there is one witness
        return set()
    finally:
        put_back()
    return {r.path for r in records if _is_nan(r.outputs) and not _is_nan(r.inputs)}


def _is_nan(found: Readings) -> bool:
    return any(parts and all(bool(part.isnan().any()) for part in parts) for parts in found)
