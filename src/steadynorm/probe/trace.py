"""Passes through a model with a watcher at every module: which calls happen, and which tensor comes from where."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from steadynorm.errors import SteadynormError
from steadynorm.probe.axes import axes
from steadynorm.probe.facts import Call
from steadynorm.probe.hard_coded import BatchNormCalls
from steadynorm.probe.offsets import offset
from steadynorm.probe.samples import ByTensor, tensors_in
from steadynorm.probe.state import is_dropping
from steadynorm.probe.training_facts import Axes

Forward = Callable[[nn.Module, Any], Any]
"""How a model is called on a batch: `recipe.call`."""

# Every pass starts from the same random numbers, so that two passes differ only in what we changed.
PASS_SEED = 0


class NotPossible(Exception):
    """This part of the examination cannot be done on this model or this data, and why."""


class ForwardRaised(Exception):
    """The model's forward raised; the cause is chained."""


class Watcher:
    """Sees the calls of a model. `active` are the paths of the modules whose forward is running, outermost first."""

    def __init__(self) -> None:
        self.active: list[str] = []

    def enter(self, path: str, module: nn.Module, inputs: Any) -> None:
        """A call begins; `inputs` are its arguments, positional and by keyword."""
        self.active.append(path)

    def leave(self, path: str, module: nn.Module, inputs: Any, output: Any) -> None:
        """A call ends."""
        # Calls that raised and were caught by their parent never left.
        while self.active and self.active.pop() != path:
            pass


@contextmanager
def watching(model: nn.Module, watcher: Watcher) -> Iterator[None]:
    """`watcher` sees every call of every module of `model`, leaf or not: functional code lives in the parents."""
    handles = []

    def before(path: str) -> Callable[..., None]:
        return lambda module, args, kwargs: watcher.enter(path, module, (args, kwargs))

    def after(path: str) -> Callable[..., None]:
        return lambda module, args, kwargs, output: watcher.leave(path, module, (args, kwargs), output)

    try:
        for path, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(before(path), with_kwargs=True))
            handles.append(module.register_forward_hook(after(path), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def seed() -> None:
    """The random numbers of a pass, the same for every pass."""
    if torch.accelerator.is_available():
        torch.manual_seed(PASS_SEED)
    else:
        # 0.5 ms less, more than many a layer takes: where there is no device, each seed is kept, with its traceback.
        torch.default_generator.manual_seed(PASS_SEED)


def run(model: nn.Module, batch: Any, forward: Forward) -> Any:
    """The output for a batch, without gradients and always with the same random numbers.

    Raises:
        ForwardRaised: the model's own code raised.
    """
    seed()
    try:
        with torch.no_grad():
            return forward(model, batch)
    except Exception as error:
        # Whoever calls the model may have put the error into a sentence; the cause is what happened in the model.
        is_sentence = isinstance(error, SteadynormError) and isinstance(error.__cause__, Exception)
        raise ForwardRaised from error.__cause__ if is_sentence else error


class _Given(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return args, kwargs


def inputs_of(batch: Any, forward: Forward) -> Any:
    """What a model is given of a batch."""
    return forward(_Given(), batch)


def trace(model: nn.Module, batch: Any, forward: Forward) -> tuple[tuple[Call, ...], Any, tuple[str, ...]]:
    """The calls of one pass, in the order in which they end, the output, and where batch norm is hard-coded."""
    tracer, modules = _Tracer(), dict(model.named_modules())
    calls = BatchNormCalls(lambda: tracer.active, modules)
    # What was compiled was compiled without the mode, and would be compiled again for it.
    is_compiled = any(hasattr(module, "_orig_mod") for module in modules.values())
    with watching(model, tracer), nullcontext() if is_compiled else calls:
        output = run(model, batch, forward)
    return tuple(tracer.calls), output, tuple(calls.found)


class _Tracer(Watcher):
    """Knows a tensor again by its identity and its version: order of execution says nothing about who feeds whom."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._producers: list[str] = []
        self._offsets: list[float | None] = []
        self._axes: list[Axes | None] = []
        self._made = ByTensor[str]()

    def enter(self, path: str, module: nn.Module, inputs: Any) -> None:
        given = next(tensors_in(inputs), None)
        self._producers.append("" if given is None else self._producer(given))
        self._offsets.append(None if given is None else offset(module, given))
        self._axes.append(None if given is None else axes(module, given))
        super().enter(path, module, inputs)

    def leave(self, path: str, module: nn.Module, inputs: Any, output: Any) -> None:
        super().leave(path, module, inputs, output)
        depth = len(self.active)
        given, made = next(tensors_in(inputs), None), next(tensors_in(output), None)
        self.calls.append(
            Call(
                path,
                type(module).__name__,
                producer=self._producers[depth],
                input_shape=() if given is None else tuple(given.shape),
                output_shape=() if made is None else tuple(made.shape),
                input_dtype="" if given is None else str(given.dtype).removeprefix("torch."),
                offset=self._offsets[depth],
                axes=self._axes[depth],
                is_training=module.training,
                drops=is_dropping(module),
                maker=path if made is None else self._producer(made) or path,
            )
        )
        del self._producers[depth:], self._offsets[depth:], self._axes[depth:]
        for tensor in tensors_in(output):
            # What a container or an identity hands on is still what the layer inside or before it made.
            maker = self._producer(tensor)
            is_handed_on = maker.startswith(f"{path}.") if path else bool(maker)
            if not is_handed_on and not (maker and isinstance(module, nn.Identity)):
                self._made.set(tensor, path)

    def _producer(self, tensor: Tensor) -> str:
        return self._made.get(tensor) or ""
