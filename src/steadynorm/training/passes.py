"""Passes of data through a model to see what reaches its batch norms, in step with other processes."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from steadynorm import models
from steadynorm.errors import DistributedError, InputError, NonFiniteStatisticsError
from steadynorm.moments import Moments
from steadynorm.samples import tensors_in
from steadynorm.training.evaluation import evaluation, on_device
from steadynorm.training.layer_inputs import FEWEST_BATCHES, LayerInputs, Pool, merge_pools
from steadynorm.training.processes import gathered
from steadynorm.training.statistics import put_

Method = Literal["one_pass", "layer_by_layer"]
METHODS = ("one_pass", "layer_by_layer")
Batches = Iterable[Any] | Callable[[], Iterable[Any]]
Forward = Callable[[nn.Module, Any], Any]
Progress = Callable[[int, int | None], None]
"""Called with the batches done, and of how many; None where the data has no length."""

# How often processes exchange all statistics to decide whether they are known well enough, in batches.
BATCHES_BETWEEN_LOOKS = FEWEST_BATCHES


def check_options(method: str, samples: int | None, tolerance: float | None, batches: Batches) -> None:
    """Raise InputError where an option or the data cannot be used."""
    if method not in METHODS:
        raise InputError(f"method must be one of {', '.join(map(repr, METHODS))}, got {method!r}.")
    if samples is not None and not samples > 0:
        raise InputError(f"samples must be positive, or None for all there are, got {samples}.")
    if tolerance is not None and not tolerance > 0:
        raise InputError(f"tolerance must be positive, a standard error in deviations such as 0.01, got {tolerance}.")
    if isinstance(batches, Tensor) or not (callable(batches) or isinstance(batches, Iterable)):
        raise InputError(
            f"batches is a {type(batches).__name__}, expected an iterable of batches or a function that gives one:"
            " a DataLoader, a list, or lambda: my_batches()."
        )
    if method == "layer_by_layer" and isinstance(batches, Iterator):
        raise InputError(
            "method='layer_by_layer' goes through the data once for every layer, and an iterator can be gone through"
            " once: give a list, a DataLoader, or a function that returns the iterator."
        )


@dataclass
class _State:
    """What one process tells the others after each batch."""

    samples: int
    batches: int
    has_ended: bool
    failure: str | None = None
    pools: dict[str, Pool] | None = None


class Run:
    """Passes over the data, in step with other processes; see `recalibrate_` for the arguments.

    `correct` turns the Moments of one call into those by which the layer normalises; as they are by default.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        batches: Batches,
        forward: Forward,
        group: Any = None,
        progress: Progress | None = None,
        samples: int | None = None,
        tolerance: float | None = None,
        correct: Callable[[str, Moments, int], tuple[Tensor, Tensor] | None] | None = None,
    ) -> None:
        self.model, self.layers, self.batches, self.forward = model, layers, batches, forward
        self.group, self.progress, self.samples, self.tolerance = group, progress, samples, tolerance
        self.correct = correct or _of_this_batch
        self.samples_seen, self.batches_seen, self.passes, self.stopped = 0, 0, 0, ""
        self.steps, self.expected_passes, self.batch = 0, 1, 0

    def take(self, method: Method, finish: Callable[[str, Pool], Moments] | None = None) -> dict[str, Pool]:
        """What reaches the layers, by path; the model is afterwards as it was.

        Args:
            finish: for "layer_by_layer", from what reached a layer to its new statistics; as they are by default.

        Raises:
            InputError: no layer was reached.
        """
        with evaluation(self.model, self.batches):
            pools = self._pass(self.layers, None) if method == "one_pass" else self._layer_by_layer(finish)
        if not pools:
            raise InputError("no batch norm was called with a batch (N, C, *): nothing was changed.")
        return pools

    def about(self, left_out: dict[str, str], pools: dict[str, Pool]) -> dict[str, Any]:
        """What a report says of the passes."""
        never = {path: "was never called" for path in self.layers if path not in pools}
        return {
            "left_out": left_out | never,
            "samples": self.samples_seen,
            "batches": self.batches_seen,
            "passes": self.passes,
            "stopped": self.stopped,
        }

    def _layer_by_layer(self, finish: Callable[[str, Pool], Moments] | None) -> dict[str, Pool]:
        """One layer a pass, in the order in which they run, each behind layers with their new statistics.

        A layer that is called again behind itself normalises by its batch there.
        """
        self.expected_passes = len(self.layers)
        found: dict[str, Pool] = {}
        first = self._pass(self.layers, 0)
        self.expected_passes = max(len(first), 1)
        for place, path in enumerate(first):
            pool = first[path] if place == 0 else self._pass({path: self.layers[path]}, 0).get(path)
            if pool is not None:
                new = pool.all_values if finish is None else finish(path, pool)
                found[path] = pool
                put_(self.layers[path], new.mean, new.unbiased_var)
        return found

    def _pass(self, layers: Mapping[str, nn.Module], judged: int | None) -> dict[str, Pool]:
        """What reaches `layers` in one pass, from all processes; only layer number `judged` says when it may end."""
        self.passes += 1
        inputs = LayerInputs(layers, lambda path, batch: self._put(path, batch, inputs.samples or 1))
        before = {path: [t.clone() for t in models.running_statistics(layer)] for path, layer in layers.items()}
        state, steps = _State(0, 0, False), self._steps(inputs)
        with inputs.watching():
            while True:
                error = self._advance(state, steps)
                self._share_pools(state, inputs)
                states = gathered(state, self.group, "recalibrate_")
                self._raise_failures(states, error)
                if self._is_done(states, judged):
                    break
        state.pools = {path: pool.to_cpu() for path, pool in inputs.pools.items()}
        states = gathered(state, self.group, "recalibrate_")
        for path, (mean, var) in before.items():
            put_(layers[path], mean, var)
        return _merged(states)

    def _put(self, path: str, batch: Moments, samples: int) -> None:
        if not bool((torch.isfinite(batch.mean) & torch.isfinite(batch.var)).all()):
            raise NonFiniteStatisticsError(
                f"{path or 'the layer'} got statistics that are not finite from batch number {self.batch} (from 0): it"
                " holds NaN or infinite values, or made some. No statistic was changed."
            )
        statistics = self.correct(path, batch, samples)
        if statistics is not None:
            put_(self.layers[path], *statistics)

    def _steps(self, inputs: LayerInputs) -> Iterator[int]:
        """Run one batch after the other; the samples of each."""
        device = next((t.device for t in (*self.model.parameters(), *self.model.buffers())), None)
        for number, batch in enumerate(self.batches() if callable(self.batches) else self.batches):
            self.batch = number
            batch = batch if device is None else on_device(device, batch)
            inputs.begin(next((tensor.shape[0] for tensor in tensors_in(batch) if tensor.dim()), None))
            self.forward(self.model, batch)
            inputs.end()
            yield inputs.samples or 0

    def _advance(self, state: _State, steps: Iterator[int]) -> Exception | None:
        """Run one more batch, if there is one. What goes wrong is told to the other processes before it is raised."""
        if state.has_ended:
            return None
        try:
            samples = next(steps, None)
            if samples is None:
                state.has_ended = True
                return None
            state.samples += samples
            state.batches += 1
            self.steps += 1
            if self.progress is not None:
                self.progress(self.steps, self._expected_steps())
        except Exception as error:
            state.failure = f"{type(error).__name__}: {error}"
            return error
        return None

    def _expected_steps(self) -> int | None:
        try:
            each = len(self.batches)  # type: ignore[arg-type]
        except TypeError:
            return None
        return each * self.expected_passes

    def _share_pools(self, state: _State, inputs: LayerInputs) -> None:
        """Every few batches, and at the end, everything there is travels with the state: it decides about the end."""
        is_time = state.batches % BATCHES_BETWEEN_LOOKS == 0 or state.has_ended
        state.pools = None
        if self.tolerance is not None and is_time and state.failure is None:
            state.pools = {path: pool.to_cpu() for path, pool in inputs.pools.items()}

    def _raise_failures(self, states: list[_State], error: Exception | None) -> None:
        if error is not None:
            raise error
        for rank, state in enumerate(states):
            if state.failure is not None:
                raise DistributedError(
                    f"process {rank} of {len(states)} failed with {state.failure}: no statistic was changed on any."
                )

    def _is_done(self, states: list[_State], judged: int | None) -> bool:
        self.samples_seen, self.batches_seen = sum(s.samples for s in states), sum(s.batches for s in states)
        if self.samples is not None and self.samples_seen >= self.samples:
            self.stopped = "samples"
            return True
        if self._is_precise(states, judged):
            self.stopped = "tolerance"
            return True
        if not all(state.has_ended for state in states):
            return False
        self.stopped = "end of data"
        if not self.batches_seen:
            raise InputError("batches is empty: expected at least one; is there enough data for the batch size?")
        if self.samples is not None:
            raise InputError(
                f"the data ended after {self.samples_seen} samples, expected samples={self.samples}: give more data,"
                " or samples=None for all there is. No statistic was changed."
            )
        return True

    def _is_precise(self, states: list[_State], judged: int | None) -> bool:
        if self.tolerance is None or self.batches_seen < FEWEST_BATCHES or any(s.pools is None for s in states):
            return False
        pools = list(_merged(states).items())
        pools = pools if judged is None else pools[judged : judged + 1]
        return bool(pools) and all(standard_error(self.layers[path], pool) <= self.tolerance for path, pool in pools)


def _of_this_batch(path: str, batch: Moments, samples: int) -> tuple[Tensor, Tensor] | None:
    """What a layer normalises by in training; one value has no variance, there the stored statistics stay."""
    return (batch.mean, batch.var) if bool((torch.as_tensor(batch.count) > 1).all()) else None


def _merged(states: list[_State]) -> dict[str, Pool]:
    """What all processes saw, in the order of the first that called each layer, added up in the order of processes."""
    found: dict[str, list[Pool]] = {}
    for state in states:
        for path, pool in (state.pools or {}).items():
            found.setdefault(path, []).append(pool)
    return {path: merge_pools(pools) for path, pools in found.items()}


def standard_error(layer: nn.Module, pool: Pool) -> float:
    """The standard error of the statistics of a layer, in deviations, of its worst channel."""
    return float(pool.standard_error(float(getattr(layer, "eps", 0.0))).max())
