"""SyncBatchNorm: batch normalization over the batches of several processes, on any backend of torch.distributed."""

import copy
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from steadynorm.layers import checks
from steadynorm.layers.batch import BatchNorm
from steadynorm.ranks import Ranks, is_initialized, may_run_again, require_group


class SyncBatchNorm(BatchNorm, _BatchNorm):
    """Batch normalization over (N, C, *) whose batch is that of all ranks of a process group, in place of torch's.

    y = activation(weight · (x − mean) / sqrt(var + eps) + bias + residual)

    Mean and biased variance of a channel are taken over all its values on all ranks, which may bring batches of other
    sizes, empty ones and masks; output, gradients and running statistics are those of one process with the whole batch.
    One collective forward and one backward. Every rank has to call the layer as often as the others; in evaluation, and
    where the running statistics normalise and stay, none is waited for. A group of one, and a process where
    torch.distributed is not initialised and no group was asked for, has a plain batch norm.

    One value per channel is an error on no rank, whatever `single_value` says, since the others may have more: only
    the device knows. Where they have none, the output is the bias and the running statistics stay.

    It is no subclass of `torch.nn.SyncBatchNorm`, which DistributedDataParallel refuses on the CPU. Its state_dict is
    that of one.

    Args:
        num_features, eps, momentum, affine, track_running_stats: as `BatchNorm2d`.
        process_group: whose batches are one batch; None is all ranks. See `steadynorm.sync_group`.
        device, dtype, bias, activation, guard, single_value, debias: as `BatchNorm2d`.

    Raises:
        InputError: a process group, and torch.distributed is not initialised.
        DistributedError: a rank is gone, or did not come within the timeout of the group; names this layer.

    Source: Ioffe & Szegedy, Batch Normalization (2015), Algorithm 1; Chan, Golub & LeVeque (1983) for the merging.
    """

    ranks = (2, 3, 4, 5)
    process_group: Any = None
    _joined: Ranks | None = None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        **extras: Any,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, **extras)
        if process_group is not None:
            require_group(process_group, type(self).__name__)
        self.process_group = process_group

    def _reduction(self) -> Ranks | None:
        if not (self.training and _join_(self)):
            return None
        ranks = self._joined
        if ranks is not None and not torch.compiler.is_compiling():
            ranks.may_run_again = may_run_again()
        return ranks

    def _value_count(self, x: Tensor) -> int:
        # How many the others bring, only the device knows.
        return super()._value_count(x) if self._reduction() is None else 2

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # A process group is of this process, and cannot be copied.
        if self.process_group is not None:
            memo[id(self.process_group)] = self.process_group
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return copied

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_joined": None}


def _join_(layer: SyncBatchNorm) -> bool:
    """Whether the batch of `layer` in training is that of several ranks, which `layer._joined` then are."""
    group = layer.process_group
    if group is None and not is_initialized():
        return False
    group = require_group(group, type(layer).__name__)
    if group.size() == 1:
        return False
    if layer._joined is None or layer._joined.group is not group:
        # The path is asked for now: where a backward pass fails, no module is being called.
        layer._joined = Ranks(group, checks.name(layer))
    return True


# Process groups are not for a compiler to trace, see `checks.name`.
_join_._dynamo_marked_constant = True  # type: ignore[attr-defined]
