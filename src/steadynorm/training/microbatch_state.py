"""What torch keeps for a thread, of which every micro-batch needs its own: they take turns on one thread."""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch

Hooks = tuple[Callable[[Any], Any], Callable[[Any], Any]]
"""What autograd calls when it saves a tensor, and when it needs it again."""


class State(NamedTuple):
    """What code inside a forward pass may set for a while, with the grad modes, autocast and saved_tensors_hooks."""

    grad: bool
    autocast: tuple[tuple[str, bool, torch.dtype], ...]
    autocast_cache: bool
    autocast_depth: int
    hooks: tuple[Hooks, ...]

    def inside(self, hooks: Hooks) -> "State":
        """The same inside one more pair of hooks."""
        return self._replace(hooks=(*self.hooks, hooks))


def exchange(state: State | None = None) -> State:
    """Put `state` in place of what there is; None leaves that as it is.

    Returns: what there was.
    """
    devices = _autocast_devices()
    before = State(
        torch.is_grad_enabled(),
        tuple((device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in devices),
        torch.is_autocast_cache_enabled(),
        _autocast_depth(),
        _popped_hooks(),
    )
    for pack, unpack in (before if state is None else state).hooks:
        torch._C._autograd._push_saved_tensors_default_hooks(pack, unpack)
    if state is None:
        return before
    torch._C._set_grad_enabled(state.grad)
    if state.autocast != before.autocast:
        for device, is_enabled, dtype in state.autocast:
            torch.set_autocast_enabled(device, is_enabled)
            torch.set_autocast_dtype(device, dtype)
    torch.set_autocast_cache_enabled(state.autocast_cache)
    # Each has its own depth: whoever leaves the outermost autocast lets the cached casts of parameters go, which may
    # have been made under no_grad.
    for _ in range(state.autocast_depth - before.autocast_depth):
        torch.autocast_increment_nesting()
    for _ in range(before.autocast_depth - state.autocast_depth):
        torch.autocast_decrement_nesting()
    return before


def uncompiled() -> AbstractContextManager[Any]:
    """Compiled models run as they are written: a graph would be cut at every norm, and made anew for every batch."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def unshared() -> tuple[Any, ...]:
    """What else is kept for a thread and is not exchanged: it has to be the same at every turn."""
    streams = (torch.cuda.current_stream(),) if torch.cuda.is_initialized() else ()
    return (
        torch.is_inference_mode_enabled(),
        torch._C._len_torch_function_stack(),
        torch._C._len_torch_dispatch_stack(),
        torch._C._are_functorch_transforms_active(),
        *streams,
    )


def _autocast_devices() -> tuple[str, ...]:
    accelerator = torch.accelerator.current_accelerator()
    return ("cpu",) if accelerator is None else ("cpu", accelerator.type)


def _autocast_depth() -> int:
    depth: int = torch.autocast_increment_nesting()
    torch.autocast_decrement_nesting()
    return depth - 1


def _popped_hooks() -> tuple[Hooks, ...]:
    """The hooks that were there, outermost first; they are not there any more."""
    autograd, found = torch._C._autograd, []
    while (hooks := autograd._top_saved_tensors_default_hooks(False)) is not None:
        found.append(hooks)
        autograd._pop_saved_tensors_default_hooks()
    return tuple(reversed(found))
