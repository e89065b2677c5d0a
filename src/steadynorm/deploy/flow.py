"""Where the tensors of a model come from and where they go, recorded while it runs.

A tensor is known by its storage, so that its views, in-place changes and aliases are uses of the same thing. Two modes
of torch watch: one sees every function that Python calls on a tensor, the other every operator that runs, from
whatever language. What neither is told is a read that goes through neither, by a pointer that was kept from before.
"""

import gc
import inspect
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from steadynorm import models
from steadynorm.deploy import reads
from steadynorm.recipe import seeded
from steadynorm.samples import tensors_in

Forward = Callable[[nn.Module, Any], Any]
Key = int
"""The address of a storage; it is not given out again as long as somebody holds a weak reference."""

SEED = 0
# Arguments that say how large the output of a layer is to be, and nothing of its values.
SHAPING = {"output_size"}


@dataclass(frozen=True)
class Geometry:
    """How a tensor lies in its storage."""

    key: Key
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    @property
    def reach(self) -> int:
        """How many places of the storage it takes to hold the last of it."""
        return self.offset + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True)) + 1


@dataclass
class Call:
    """One call of a unit: of a layer whose inside is known.

    Args:
        path: of the unit.
        number: how many uses and calls were seen before it.
        given: its first argument, where that was a tensor.
        others: what else it was given, by name.
        made: its output.
        is_fresh: whether nobody had seen the storage of its output before.
    """

    path: str
    number: int
    given: Geometry | None
    others: tuple[str, ...]
    made: Geometry | None = None
    is_fresh: bool = False


@dataclass(frozen=True)
class Use:
    """One read or change of a storage: by a call of a unit, or by code that is not inside of one."""

    number: int
    what: str
    call: Call | None = None
    is_write: bool = True


@dataclass
class Record:
    """What was seen in all batches.

    Args:
        calls: of each unit, by path.
        uses: of each storage.
        kept: storages made by units that were alive when the model had returned.
        returned: those of them that the model gave back.
        altered: units that were called in another mode, or with other parameters, than the model has them.
        blind: why the recording may have missed something, if it may.
    """

    calls: dict[str, list[Call]] = field(default_factory=dict)
    uses: dict[Key, list[Use]] = field(default_factory=dict)
    kept: set[Key] = field(default_factory=set)
    returned: set[Key] = field(default_factory=set)
    altered: set[str] = field(default_factory=set)
    blind: str = ""

    def makers(self) -> dict[Key, Call]:
        """The call that made each storage."""
        made = (call for calls in self.calls.values() for call in calls)
        return {call.made.key: call for call in made if call.made is not None and call.is_fresh}


def record(model: nn.Module, units: dict[str, nn.Module], batches: Iterable[Any], forward: Forward) -> Record:
    """Run the batches and see which call made which tensor, and who else used it.

    Args:
        model: is run, and put back as it was.
        units: the layers by path of whose inside nothing need be known; no unit is inside of another.
        batches, forward: the model is run as ``forward(model, batch)``, without gradients.
    """
    recorder = _Recorder(model, units)
    with models.undisturbed(model), recorder.watching():
        for batch in batches:
            with seeded(SEED), torch.no_grad():
                recorder.run(lambda batch=batch: forward(model, batch))  # type: ignore[misc]
    return recorder.record


class _Recorder:
    def __init__(self, model: nn.Module, units: dict[str, nn.Module]) -> None:
        self.record, self.units, self.model = Record({path: [] for path in units}), units, model
        self.paths = list[str]()
        self.within: Call | None = None
        self.number = 0
        self.begun, self.ended = Counter[str](), Counter[str]()
        self.states = {path: _state(module) for path, module in units.items()}
        self.thread = threading.get_ident()
        # Keeps addresses from being used again, not the memory.
        self.seen: dict[Key, StorageWeakRef] = {}

    def run(self, forward: Callable[[], Any]) -> None:
        """One batch, and what is left of its tensors when the model has returned."""
        with _Functions(self), _Operators(self):
            output = forward()
        self._end()
        returned = {key for tensor in tensors_in(output) if (key := self.key(tensor)) is not None}
        made = set(self.record.makers())
        if any(not self.seen[key].expired() for key in made - returned - self.record.kept):
            gc.collect()  # a cycle is not a reference that somebody uses
        self.record.kept |= {key for key in made if not self.seen[key].expired()}
        self.record.returned |= returned

    def _end(self) -> None:
        if self.begun != self.ended:
            self.record.blind = "a layer raised inside of the model, which caught it and went on"
        self.within = None
        self.paths.clear()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks at every module: functional code is named after the module in which it runs."""
        handles = []
        try:
            for path, module in self.model.named_modules():
                if isinstance(module, torch.jit.ScriptModule):  # takes no hooks; its operators are seen
                    continue
                handles.append(module.register_forward_pre_hook(self._before(path), with_kwargs=True))
                handles.append(module.register_forward_hook(self._after(path), with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, path: str) -> Callable[..., None]:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.paths.append(path)
            if threading.get_ident() != self.thread:
                self.record.blind = "the model runs its layers in threads of its own"
            if path in self.units:
                self.begun[path] += 1
                if _state(module) != self.states[path]:  # functional_call, or a mode that the model's code sets
                    self.record.altered.add(path)
                self.within = self._begin(path, module, args, kwargs)

        return enter

    def _after(self, path: str) -> Callable[..., None]:
        def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            while self.paths and self.paths.pop() != path:
                pass
            if path in self.units:
                self.ended[path] += 1
                call, self.within = self.within, None
                if call is not None and call.path == path and type(output) is Tensor:
                    call.made = self.geometry(output)
                    call.is_fresh = call.made is not None and call.made.key not in self.record.uses

        return leave

    def _begin(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> Call:
        first, others = _arguments(module, args, kwargs)
        call = Call(path, self.number, self.geometry(first) if type(first) is Tensor else None, others)
        self.record.calls[path].append(call)
        for tensor in tensors_in((args, kwargs)):
            self.use(tensor, f"a call of {path}", call if tensor is first else None, is_write=False)
        return call

    def use(self, tensor: Tensor, what: str, call: Call | None = None, *, is_write: bool = True) -> None:
        """Note a use of the storage of a tensor."""
        key = self.key(tensor)
        if key is None:
            return
        self.number += 1
        self.record.uses.setdefault(key, []).append(Use(self.number, what, call, is_write))

    def geometry(self, tensor: Tensor) -> Geometry | None:
        """How a tensor lies in its storage; None of one that has none."""
        key = self.key(tensor)
        with torch._C.DisableTorchFunction():
            if key is None:
                return None
            return Geometry(
                key, tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset()), tensor.dtype
            )

    def key(self, tensor: Tensor) -> Key | None:
        """What a tensor is known by; None where it is of a kind without a storage, which no unit makes."""
        with torch._C.DisableTorchFunction():
            try:
                storage = tensor.untyped_storage()
            except (NotImplementedError, RuntimeError):
                return None
            key: Key = storage._cdata
            if key not in self.seen:
                self.seen[key] = StorageWeakRef(storage)
        return key

    def where(self, name: str) -> str:
        """An operation, and the module in which it runs."""
        path = self.paths[-1] if self.paths else ""
        return f"{name} in {path}" if path else name


def _arguments(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, tuple[str, ...]]:
    """The first argument of a call, and the names of the others that are there."""
    names = [*inspect.signature(type(module).forward).parameters][1:]
    given = dict(zip([*names, *map(str, range(len(names), len(args)))], args, strict=False)) | kwargs
    first = given.pop(names[0], None) if names else None
    return first, tuple(name for name, value in given.items() if value is not None and name not in SHAPING)


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters, buffers, and what else a module holds; not what modules in it do."""
    held = {**vars(module), **module._parameters, **module._buffers}
    return {name: tensor for name, tensor in held.items() if isinstance(tensor, Tensor)}


def _state(module: nn.Module) -> tuple[bool, dict[str, int]]:
    """The mode of a module, and which tensors are its own."""
    return module.training, {name: id(tensor) for name, tensor in own_tensors(module).items()}


class _Functions(TorchFunctionMode):
    """Sees what Python calls on tensors, also what runs no operator: numpy(), data_ptr(), an assignment to .data."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.recorder.within is None and reads.is_read_by_function(func):
            for tensor in tensors_in((args, kwargs)):
                self.recorder.use(tensor, self.recorder.where(reads.name_of(func)))
        return func(*args, **kwargs)


class _Operators(TorchDispatchMode):
    """Sees every operator that runs, also below Python."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.recorder.within is not None or not reads.is_read_by_operator(func):
            return func(*args, **kwargs)
        for tensor in tensors_in((args, kwargs)):
            self.recorder.use(tensor, self.recorder.where(reads.name_of(func)))
        output = func(*args, **kwargs)
        # A storage that code outside of units made is none of theirs.
        for tensor in tensors_in(output):
            self.recorder.use(tensor, self.recorder.where(reads.name_of(func)))
        return output
