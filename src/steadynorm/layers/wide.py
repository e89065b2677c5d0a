"""Buffers that stay float32 at least, whatever the module is cast to."""

from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn


def widened(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which statistics and vectors of a tensor are computed: its own, but never below float32."""
    return torch.promote_types(dtype, torch.float32)


def wide(x: Tensor) -> Tensor:
    """`x` in float32 at least: a parameter that several parts of a batch use then adds its gradients up unrounded."""
    return x.to(widened(x.dtype))


class WideBuffers(nn.Module):
    """A module whose floating-point buffers are never below float32: after `.half()`, `.to(dtype)` or loading.

    Running statistics below float32 stop moving: a step of momentum · difference is lost in the rounding.
    """

    wide_buffers: ClassVar[tuple[str, ...]] = ()
    """The names of the buffers that this holds for; none are all."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name in self._narrow_buffers():
            old, new = before[name], self._buffers[name]
            if old is not None and new is not None:
                # Where the move goes, without the rounding.
                self._buffers[name] = old.to(new.device, widened(new.dtype))
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._widen_buffers()  # loaded with assign=True

    def _widen_buffers(self) -> None:
        for name in self._narrow_buffers():
            buffer = self._buffers[name]
            if buffer is not None:
                self._buffers[name] = wide(buffer)

    def _narrow_buffers(self) -> list[str]:
        named = {name: self._buffers.get(name) for name in self.wide_buffers or self._buffers}
        return [name for name, x in named.items() if x is not None and x.is_floating_point() and wide(x) is not x]
