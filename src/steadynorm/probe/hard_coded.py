"""Calls of `F.batch_norm(..., training=True)` in a pass in which nothing is in training mode."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from steadynorm import models


class BatchNormCalls(TorchFunctionMode):
    """Notes which module was running when a batch norm was computed by its batch, asked for by a constant.

    Args:
        active: (path, module) of the calls that are running, outermost first.
    """

    def __init__(self, active: Callable[[], Sequence[str]], modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.active, self.modules = active, modules
        self.found: dict[str, None] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (F.batch_norm, torch.batch_norm):
            self._note(args, kwargs)
        return func(*args, **kwargs)

    def _note(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        is_training = args[5] if len(args) > 5 else kwargs.get("training", False)
        path = next(iter(self.active()[-1:]), "")
        module = self.modules.get(path)
        # A norm without statistics, or one left in training mode, is another fault.
        by_itself = (
            module is not None
            and models.norm_kind(module) is not None
            and (module.training or not models.has_running_statistics(module))
        )
        if is_training is True and not by_itself and not _is_weight(args, kwargs):
            self.found[path] = None


def _is_weight(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether one sample is normalised, without statistics: weights that are standardised, as in Big Transfer."""
    x = args[0] if args else kwargs.get("input")
    running_mean = args[1] if len(args) > 1 else kwargs.get("running_mean")
    return isinstance(x, Tensor) and x.shape[:1] == (1,) and running_mean is None
