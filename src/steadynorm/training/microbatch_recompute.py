"""What autograd saves for micro-batches, computed again in the backward pass.

Once the Moments of every meeting are known, a micro-batch can go through the model on its own. What it saves is counted
in the forward pass and let go, but for the last of it. When the backward pass asks for something that was let go, the
micro-batch goes again from the start through the window in which that was saved, and keeps what the window saves: a
share of the whole. The windows are asked for from the last to the first.
"""

import weakref
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from steadynorm import functional
from steadynorm.functional import Part, Reduction
from steadynorm.layers import lockstep
from steadynorm.moments import Moments
from steadynorm.training.microbatch_lockstep import Arrival, Memory
from steadynorm.training.microbatch_offload import address, has_storage
from steadynorm.training.microbatch_state import State, exchange, uncompiled

WINDOWS = 4
"""Into how many windows, of about the same bytes, the forward pass is cut. A fourth of what is saved is there at a
time, and one and a half forward passes are run again: 3/4 + 2/4 + 1/4, since the last window is kept."""


class Saved:
    """What is in the graph in place of a tensor: the tensor while its window is there."""

    def __init__(self, memory: "Recompute", lane: int, unit: int, tensor: Tensor) -> None:
        self.memory, self.lane, self.unit = memory, lane, unit
        self.geometry = tensor.size(), tensor.stride(), tensor.storage_offset()
        self.nbytes = tensor.nbytes
        self.tensor: Tensor | None = None
        self.version = 0
        self.fill(tensor)

    def fill(self, tensor: Tensor) -> None:
        """Keep `tensor`, or the tensor that has its memory."""
        # Detached, or the output of a node would keep the node that keeps it.
        self.tensor = tensor.detach().as_strided(*self.geometry)
        self.version = self.tensor._version

    def get(self) -> Tensor:
        """The values that were saved."""
        if self.tensor is None:
            self.memory.compute_again(self.lane, self.unit)
        if self.tensor is None:
            raise _took_another_way()
        if self.tensor._version != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: a"
                f" tensor {tuple(self.geometry[0])} is at version {self.tensor._version}; expected version"
                f" {self.version} instead."
            )
        return self.tensor


class Meeting(NamedTuple):
    """A layer where all micro-batches met: what each needs to go through it on its own."""

    layer: nn.Module
    moments: Moments | None
    requires_grad: bool
    saved: list[list[tuple[str, "weakref.ref[Saved]"]]]
    """For each micro-batch what the layer saved of it: x, residual, mask or y."""


class Recompute(Memory):
    """Unit number u of a micro-batch is what it saves between meetings u − 1 and u, and in meeting u."""

    def __init__(self, resident: Iterable[Tensor], calls: Sequence[Callable[[], Any]]) -> None:
        self.resident = {address(tensor): tensor for tensor in resident if has_storage(tensor)}
        self.calls = calls
        self.states: list[State] = []
        self.meetings: list[Meeting] = []
        # By unit and micro-batch, in the order in which they were saved.
        self.units: list[list[list[weakref.ref[Saved]]]] = [self._unit()]
        self.random: list[list[Any]] = [[] for _ in calls]
        self.sizes: list[int] = []
        self.kept_from = 0

    def begin(self, lane: int, state: State) -> State:
        """Every micro-batch with hooks of its own."""
        self.states.append(state)
        return state.inside((lambda tensor: self._pack(lane, tensor), _unpack))

    def resumed(self, lane: int) -> None:
        """Remember the random state of each unit."""
        state, before = _random_state(), self.random[lane]
        is_same = bool(before) and all(torch.equal(a, b) for a, b in zip(state, before[-1], strict=True))
        before.append(before[-1] if is_same else state)

    def normalize_together(self, arrivals: Sequence[Arrival]) -> tuple[list[Tensor], Moments]:
        """As ever, and with a note of what is saved."""
        unit, found = len(self.meetings), list[Saved]()

        def pack(tensor: Tensor) -> Any:
            tensor = tensor.detach()
            if self._is_resident(tensor):
                return tensor
            found.append(Saved(self, 0, unit, tensor))
            return found[-1]

        with saved_tensors_hooks(pack, _unpack):
            ys, moments = super().normalize_together(arrivals)
        owners: dict[int, tuple[int, str]] = {}
        for lane, (arrival, y) in enumerate(zip(arrivals, ys, strict=True)):
            assert arrival.part is not None
            for name, tensor in (("y", y), *zip(Part._fields, arrival.part, strict=True)):
                if tensor is not None and has_storage(tensor):
                    owners[address(tensor)] = lane, name
        meeting = Meeting(arrivals[0].layer, moments, ys[0].requires_grad, [[] for _ in arrivals])
        for saved in found:
            assert saved.tensor is not None
            lane, name = owners.get(address(saved.tensor), (0, ""))
            # What belongs to no micro-batch, as the statistics, stays.
            if name:
                saved.lane = lane
                meeting.saved[lane].append((name, weakref.ref(saved)))
        self._met(meeting)
        return ys, moments

    def pooled(self, layer: nn.Module) -> None:
        """A meeting that saves nothing."""
        self._met(Meeting(layer, None, False, [[] for _ in self.calls]))

    def end(self) -> None:
        """The last unit has no meeting, and is kept: the backward pass begins with it."""
        self.sizes.append(sum(saved.nbytes for saved in self._alive(len(self.sizes))))

    def compute_again(self, lane: int, unit: int) -> None:
        """Fill what one micro-batch saved in the window around `unit`."""
        again = Again(self, lane, *self._window(unit))
        before, random = exchange(self.states[lane].inside((again.pack, _never))), _random_state()
        try:
            with lockstep.entered(again), uncompiled():
                _set_random_state(self.random[lane][0])
                self.calls[lane]()
        except _EnoughError:
            pass
        finally:
            _set_random_state(random)
            exchange(before)

    def _pack(self, lane: int, tensor: Tensor) -> Any:
        tensor = tensor.detach()
        if self._is_resident(tensor):
            return tensor
        saved = Saved(self, lane, len(self.units) - 1, tensor)
        self.units[-1][lane].append(weakref.ref(saved))
        return saved

    def _is_resident(self, tensor: Tensor) -> bool:
        return not has_storage(tensor) or address(tensor) in self.resident

    def _unit(self) -> list[list["weakref.ref[Saved]"]]:
        return [[] for _ in self.calls]

    def _met(self, meeting: Meeting) -> None:
        self.meetings.append(meeting)
        self._close()
        self.units.append(self._unit())

    def _close(self) -> None:
        """Let go of the first units, until what is kept is the share of a window."""
        self.sizes.append(sum(saved.nbytes for saved in self._alive(len(self.sizes))))
        while sum(self.sizes[self.kept_from :]) * WINDOWS > sum(self.sizes):
            for saved in self._alive(self.kept_from):
                saved.tensor = None
            self.kept_from += 1

    def _alive(self, unit: int) -> list[Saved]:
        references = [reference for lane in self.units[unit] for reference in lane]
        if unit < len(self.meetings):
            references += [reference for lane in self.meetings[unit].saved for _, reference in lane]
        return [saved for reference in references if (saved := reference()) is not None]

    def _window(self, unit: int) -> tuple[int, int]:
        """The window around a unit that was let go: units from the first up to the second number."""
        sizes = self.sizes[: self.kept_from]
        share = sum(sizes) / (WINDOWS - 1)
        # By where the middle of a unit lies in the bytes of all of them.
        middles = (before - size / 2 for before, size in zip(accumulate(sizes), sizes, strict=True))
        numbers = [int(middle / share) for middle in middles]
        start = numbers.index(numbers[unit])
        return start, start + numbers.count(numbers[unit])


class Again:
    """The lockstep of one micro-batch that goes a second time, alone, up to the end of a window."""

    def __init__(self, memory: Recompute, lane: int, start: int, end: int) -> None:
        self.memory, self.lane, self.start, self.end = memory, lane, start, end
        self.unit = self.place = 0

    def pack(self, tensor: Tensor) -> Any:
        """Fill what was saved at this place; nothing of this graph is ever asked for."""
        tensor = tensor.detach()
        if self.memory._is_resident(tensor):
            return None
        expected = self.memory.units[self.unit][self.lane]
        if self.place >= len(expected):
            raise _took_another_way()
        saved = expected[self.place]()
        self.place += 1
        if saved is not None and saved.tensor is None and self.unit >= self.start:
            if tensor.size() != saved.geometry[0] or tensor.stride() != saved.geometry[1]:
                raise _took_another_way()
            saved.fill(tensor)
        return None

    def normalize(
        self,
        layer: nn.Module,
        part: Part,
        weight: Tensor | None,
        bias: Tensor | None,
        *,
        eps: float,
        activation: str | None,
        reduction: Reduction | None,
    ) -> tuple[Tensor, None]:
        """y of this micro-batch by the statistics that are known."""
        meeting = self._meeting(layer)
        with torch.no_grad():
            y, _ = functional.normalize_batch(
                part.x,
                weight,
                bias,
                eps=eps,
                residual=part.residual,
                activation=activation,
                mask=part.mask,
                moments=meeting.moments,
            )
        if self.unit >= self.start:
            for name, reference in meeting.saved[self.lane]:
                saved = reference()
                if saved is not None and saved.tensor is None:
                    saved.fill(y if name == "y" else getattr(part, name))
        self._go_on()
        if meeting.requires_grad:
            y = _Leading.apply(torch.empty(0, requires_grad=True), [y])
        return y, None

    def pool(self, layer: nn.Module, found: Moments, reduction: Reduction | None) -> None:
        """It was remembered in the forward pass."""
        self._meeting(layer)
        self._go_on()

    def _meeting(self, layer: nn.Module) -> Meeting:
        meetings = self.memory.meetings
        if self.unit >= len(meetings) or meetings[self.unit].layer is not layer:
            raise _took_another_way()
        return meetings[self.unit]

    def _go_on(self) -> None:
        if self.place != len(self.memory.units[self.unit][self.lane]):
            raise _took_another_way()
        self.unit += 1
        self.place = 0
        if self.unit == self.end:
            raise _EnoughError
        _set_random_state(self.memory.random[self.lane][self.unit])


class _EnoughError(BaseException):
    """The window is full. No ``except Exception`` of a model is to catch it."""


class _Leading(torch.autograd.Function):
    """A tensor that leads somewhere, so that what comes after it saves what it saved the first time."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, held: list[Tensor]) -> Tensor:
        return held.pop()


def _unpack(saved: Any) -> Tensor:
    return saved.get() if isinstance(saved, Saved) else saved


def _never(saved: Any) -> Tensor:
    raise RuntimeError("a backward pass inside the forward pass cannot be run with memory='recompute'.")


def _random_state() -> list[Tensor]:
    states = [torch.get_rng_state()]
    if torch.cuda.is_initialized():
        states.append(torch.cuda.get_rng_state())
    return states


def _set_random_state(states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1])


def _took_another_way() -> RuntimeError:
    return RuntimeError(
        "the forward pass of a micro-batch took another way when it was computed again for the backward pass: what it"
        " does must depend on its inputs and on torch's random numbers alone, or memory='keep' is to be used."
    )
