"""Does the output for one sample depend on the others? Change its batch mates, and look at every module.

One sample stays, its mates are swapped for others, the shape of the batch stays the same. On one shape a sample that
stands alone gives the same bits (60 architectures, float32 and bfloat16: not one bit differed), which comparing two
batch sizes would not. The output alone is not enough: a residual branch that starts at zero hides what happens in it.
And one place is not enough: a recurrence over the samples leaves the first as it is, a maximum the one that holds it,
places that are given in order the first and, once they are taken, the last. So the first sample of a group stays once,
once the last, and where nothing is found the second; and then once more with ones in place of weights that are zero.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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

# Places of a group at which a sample stays while its mates are swapped.
FIRST, SECOND, LAST = 0, 1, -1

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
        self._open.append(_Record(path, module._get_name(), parent, self._read(inputs), next(self._clock)))
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
    looks = _looks(model, batches, forward, (FIRST, LAST))
    if not any(look.sources for look in looks):
        looks += _looks(model, batches, forward, (SECOND,), is_needed=False)
    hidden = max(look.hidden for look in looks)
    if not any(look.sources for look in looks) and (zeros := _zeros(model)):
        with _as_ones(zeros):
            looks = _looks(model, batches, forward, (FIRST, LAST), is_needed=False)
    found: dict[str, tuple[_Record, float]] = {}
    for look in looks:
        for i, change in sorted(look.sources.items()):
            record = look.first[i]
            found[record.path] = record, max(change, found.get(record.path, (record, 0.0))[1])
    if not found:
        return ()
    tainted = {path for look in looks for path in look.tainted}
    effect = effects.of_mates(model, batches, forward, task)
    return tuple(
        Leak(
            path=path,
            class_name=record.class_name,
            change=change,
            output_change=hidden,
            is_confirmed=path in tainted,
            effect=effect,
            recalibrated=recalibrated,
        )
        for path, (record, change) in found.items()
        if not any(inner.startswith(f"{path}." if path else "") for inner in found if inner != path)
    )


def _zeros(model: nn.Module) -> list[Tensor]:
    """The parameters that are zero throughout. Those of another class, as quantised ones, are let be."""
    plain = (parameter for parameter in model.parameters() if type(parameter) is nn.Parameter)
    return [p for p in plain if p.is_floating_point() and p.numel() and not p.any()]


@contextmanager
def _as_ones(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Ones in parameters: what a branch that begins at zero would let through."""
    before = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for parameter in parameters:
            parameter.fill_(1)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)


@dataclass
class _Look:
    """A sample at its place among others, and the calls of that pass; those in which it meets them, by index.

    `tainted` are the modules of the second witness, `hidden` is the change of the model's output.
    """

    here: Any
    count: int
    place: int
    first: list[_Record]
    sources: dict[int, float]
    hidden: float
    tainted: set[str] = field(default_factory=set)


def _looks(
    model: nn.Module, batches: Sequence[Any], forward: Forward, places: Sequence[int], *, is_needed: bool = True
) -> list[_Look]:
    """What a sample at each of the places meets; a place that says nothing is left out, but for all if `is_needed`."""
    found, refused = [], None
    for place in places:
        try:
            look = _look(model, batches, forward, place)
        except NotPossible as reason:
            refused = reason
            continue
        if look.sources:
            look.tainted = _tainted(model, look, forward)
        found.append(look)
    if refused is not None and is_needed and not found:
        raise refused
    return found


def _look(model: nn.Module, batches: Sequence[Any], forward: Forward, place: int) -> _Look:
    """Two batches that share the sample at one place: what differs between the two passes for it."""
    here, there, place = _two_groups(batches, forward, place)
    count = sample_count(inputs_of(here, forward))
    assert count is not None
    first, again, other = (_record(model, batch, forward, count, place) for batch in (here, here, there))
    if not [r.path for r in first] == [r.path for r in again] == [r.path for r in other]:
        raise NotPossible("the model does not call the same modules for two batches of the same shape")
    floors = [SMALLEST_CHANGE + FLOOR_FACTOR * _change(a.outputs, b.outputs) for a, b in zip(first, again, strict=True)]
    hidden = _change(first[-1].outputs, other[-1].outputs)
    return _Look(here, count, place, first, _sources(first, other, floors), hidden if hidden > floors[-1] else 0.0)


def _two_groups(batches: Sequence[Any], forward: Forward, place: int) -> tuple[Any, Any, int]:
    """Two batches of one shape that share one sample, and no other as far as there are any; and its place in them."""
    batch = batches[0]
    count = sample_count(inputs_of(batch, forward))
    if count is None:
        raise NotPossible("the tensors of a batch differ in their first size, so its samples cannot be told apart")
    if count == 1:
        same = [b for b in batches if shapes(b) == shapes(batch)]
        if len(same) < 3:
            raise NotPossible("a batch holds a single sample: give batches of 2 or more")
        here, there = (same[0], same[1]), (same[0], same[2]) if place == FIRST else (same[2], same[1])
        return join(*here), join(*there), min(abs(place), 1)
    if count == 2:
        place = min(abs(place), 1)
        return batch, take(batch, [place, place]), place
    # Other samples, not the same ones in another order, which a mean over the samples would not notice.
    size = min(GROUP, (count + 1) // 2)
    place %= size
    others = list(range(count - size + 1, count))
    others.insert(place, place)
    return take(batch, list(range(size))), take(batch, others), place


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
