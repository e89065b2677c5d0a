"""Buffers that stay float32 at least, whatever the module is cast to."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn


def widened(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which statistics and vectors of a tensor are computed: its own, but never below float32."""
    return torch.promote_types(dtype, torch.float32)


class WideBuffers(nn.Module):
    """A module whose floating-point buffers are never below float32: after `.half()`, `.to(dtype)` or loading."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and _is_narrow(new):
                # Where the move goes, without the rounding.
                self._buffers[name] = old.to(new.device)
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        for name, buffer in self._buffers.items():
            if buffer is not None and _is_narrow(buffer):  # loaded with assign=True
                self._buffers[name] = buffer.float()


def _is_narrow(x: Tensor) -> bool:
    return x.is_floating_point() and widened(x.dtype) != x.dtype
