"""Micro-batches in lock-step: each runs in a greenlet, up to a layer that needs the statistics of all of them."""

import contextvars
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn

from steadynorm import functional, moments
from steadynorm.errors import DegenerateStatisticsError, InputError
from steadynorm.functional import Part, Reduction
from steadynorm.layers import lockstep
from steadynorm.layers.batch import BatchNorm
from steadynorm.layers.domain import DomainBatchNorm
from steadynorm.moments import Moments
from steadynorm.training.microbatch_state import State, exchange, uncompiled, unshared

Call = Callable[[], Any]
"""What is done with one micro-batch: usually the model, with everything it is called with."""
CHECKPOINT = "torch.utils.checkpoint"


class Arrival(NamedTuple):
    """A micro-batch at a layer: either `part`, which is to be normalised, or `found`, which is to be pooled."""

    layer: nn.Module
    reduction: Reduction | None
    part: Part | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 0.0
    activation: str | None = None
    found: Moments | None = None


class Memory:
    """How what autograd saves is kept until the backward pass: here, as it is."""

    def begin(self, lane: int, state: State) -> State:
        """The state in which a micro-batch begins, where that of the caller is `state`."""
        return state

    def resumed(self, lane: int) -> None:
        """A micro-batch is about to go on."""

    def normalize_together(self, arrivals: Sequence[Arrival]) -> tuple[list[Tensor], Moments]:
        """y of every part, and the Moments of all."""
        first = arrivals[0]
        parts = [arrival.part for arrival in arrivals if arrival.part is not None]
        rest: dict[str, Any] = {"eps": first.eps, "activation": first.activation, "reduction": first.reduction}
        return functional.normalize_together(parts, first.weight, first.bias, **rest)

    def pooled(self, layer: nn.Module) -> None:
        """All have met at a layer that does not normalise by them."""

    def end(self) -> None:
        """All have come to their end."""


class Lane:
    """One micro-batch on its way through the model."""

    def __init__(self, call: Call, hub: greenlet, state: State) -> None:
        self.greenlet = greenlet(call, hub)
        self.greenlet.gr_context = contextvars.copy_context()
        self.state = state
        self.answer: Any = None
        self.result: Any = None

    def resume(self) -> Arrival | None:
        """Run until the next layer, or to the end: then the result is there."""
        before = exchange(self.state)
        try:
            arrived = self.greenlet.switch()
        finally:
            self.state = exchange(before)
        if self.greenlet.dead:
            self.result = arrived
            return None
        assert isinstance(arrived, Arrival)
        return arrived

    def end(self) -> None:
        """Leave the forward pass where it is, through its context managers and ``finally`` clauses."""
        if not self.greenlet:
            return
        before = exchange(self.state)
        try:
            self.greenlet.throw()
        except Exception:
            # Whatever a clean-up raises: the error that ends all of them is the one to be seen.
            pass
        finally:
            exchange(before)


class Together:
    """The lockstep of one batch."""

    def __init__(self, calls: Sequence[Call], names: Callable[[nn.Module], str], memory: Memory) -> None:
        self.hub = getcurrent()
        self.names, self.memory = names, memory
        self.unshared = unshared()
        state = exchange()
        self.lanes = [Lane(call, self.hub, memory.begin(i, state)) for i, call in enumerate(calls)]
        self.is_over = False

    def run(self) -> list[Any]:
        """The results of all calls, in their order.

        Raises:
            InputError: they do not come to the same layers.
        """
        try:
            with lockstep.entered(self), uncompiled():
                while True:
                    arrivals = self._same([self._resume(i) for i in range(len(self.lanes))])
                    if not arrivals:
                        break
                    self._meet(arrivals)
                    del arrivals  # or what has been normalised would stay until all have gone on
        finally:
            self.is_over = True
            for lane in self.lanes:
                lane.end()
        self.memory.end()
        return [lane.result for lane in self.lanes]

    def _resume(self, lane: int) -> Arrival | None:
        self.memory.resumed(lane)
        return self.lanes[lane].resume()

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
    ) -> tuple[Tensor, Moments | None]:
        """Hand the part over and wait: see `layers.lockstep.Lockstep`."""
        answer: tuple[Tensor, Moments | None] = self._wait(
            Arrival(layer, reduction, part, weight, bias, eps, activation)
        )
        return answer

    def pool(self, layer: nn.Module, found: Moments, reduction: Reduction | None) -> Moments | None:
        """Hand the Moments over and wait."""
        answer: Moments | None = self._wait(Arrival(layer, reduction, found=found))
        return answer

    def _wait(self, arrival: Arrival) -> Any:
        lane = next((lane for lane in self.lanes if lane.greenlet is getcurrent()), None)
        if self.is_over or lane is None:
            raise GreenletExit
        self._ensure_can_wait(arrival.layer)
        self.hub.switch(arrival)
        answer, lane.answer = lane.answer, None
        return answer

    def _ensure_can_wait(self, layer: nn.Module) -> None:
        why = why_not_together(layer)
        if why is not None:
            raise InputError(f"{self.names(layer)} {why}")
        if torch._C._current_graph_task_id() != -1:
            raise InputError(
                f"{self.names(layer)} is called inside a backward pass inside the forward pass, where micro-batches"
                " cannot wait for one another: take that backward pass out of the forward pass."
            )
        if unshared() != self.unshared:
            raise InputError(
                f"{self.names(layer)} is called inside an inference mode, a function or dispatch mode, a functional"
                " transform or a CUDA stream that the forward pass of a micro-batch has entered: enter it around all"
                " of them."
            )
        if _is_inside_checkpoint():
            raise InputError(
                f"{self.names(layer)} is called inside {CHECKPOINT}, which would compute it again from one micro-batch"
                ' alone: leave the checkpoint out, and save memory by microbatch(..., memory="recompute").'
            )

    def _same(self, arrivals: Sequence[Arrival | None]) -> list[Arrival]:
        """`arrivals`, if they are all at one layer in the same way; none if all have finished."""
        first = arrivals[0]
        if not any(arrivals):
            return []
        for i, arrival in enumerate(arrivals):
            is_same = (
                first is not None
                and arrival is not None
                and arrival.layer is first.layer
                and (arrival.part is None) == (first.part is None)
            )
            if not is_same or self.lanes[i].state.grad != self.lanes[0].state.grad:
                raise InputError(
                    f"micro-batches took different paths: number 0 {self._where(0, first)}, number {i}"
                    f" {self._where(i, arrival)}. To be normalised as one batch they have to come to the same batch"
                    " norm layers in the same order and grad mode: choices that depend on data or on chance have to"
                    " be made before, for the whole batch."
                )
        return [arrival for arrival in arrivals if arrival is not None]

    def _where(self, lane: int, arrival: Arrival | None) -> str:
        if arrival is None:
            return "has finished"
        grad = "" if self.lanes[lane].state.grad else " under no_grad"
        return f"waits at {self.names(arrival.layer)}{grad}"

    def _meet(self, arrivals: list[Arrival]) -> None:
        """Give every lane its answer."""
        first = arrivals[0]
        if first.part is None:
            self.lanes[0].answer = self._pooled(arrivals)
            self.memory.pooled(first.layer)
            return
        # As in the first lane, whose grad mode is that of all.
        before = exchange(self.lanes[0].state)
        try:
            ys, found = self.memory.normalize_together(arrivals)
        finally:
            exchange(before)
        if isinstance(found.count, int) and found.count == 1 and first.layer.training:
            raise DegenerateStatisticsError(
                f"{self.names(first.layer)} expected more than one value per channel in training, got one in all"
                " micro-batches together, whose variance is zero: give a larger batch."
            )
        for lane, y in zip(self.lanes, ys, strict=True):
            lane.answer = (y, found if lane is self.lanes[0] else None)

    def _pooled(self, arrivals: list[Arrival]) -> Moments | None:
        reduction = arrivals[0].reduction
        pooled = moments.merge([arrival.found for arrival in arrivals if arrival.found is not None])
        if reduction is not None:
            pooled = reduction.merge(pooled)
        # Fewer than two values say nothing about a variance.
        return None if isinstance(pooled.count, int) and pooled.count < 2 else pooled


def why_not_together(layer: nn.Module) -> str | None:
    """Why the micro-batches of a batch cannot be put together in `layer`; None if they can."""
    if isinstance(layer, DomainBatchNorm) and layer.num_domains > 1:
        return (
            "normalises the domains of a batch one by one, and a micro-batch may lack one: use it without microbatch."
        )
    if isinstance(layer, BatchNorm) and type(layer)._by_batch is not BatchNorm._by_batch:
        return (
            f"is a {type(layer).__name__}, whose statistics are not those of the whole batch: micro-batches cannot be"
            " put together in it. Use a BatchNorm, freeze it, or use it without microbatch."
        )
    return None


def _is_inside_checkpoint() -> bool:
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == CHECKPOINT:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
