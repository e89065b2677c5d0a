"""Running statistics in rows: one set of channels for each domain, or each step."""

from typing import Any

from torch import Tensor

from steadynorm.layers.batch import BatchNorm
from steadynorm.layers.running import STATISTICS, Running

COUNTED = (*STATISTICS, "num_batches_tracked")


class Rows(BatchNorm):
    """A batch normalization that remembers `rows` sets of statistics: (rows, C), and a count of batches for each.

    It is not a torch.nn.BatchNorm: what takes one for granted (fusing, conversion) reads statistics (C,).
    """

    rows: int = 1

    def _configure(self, *args: Any) -> None:
        super()._configure(*args)
        for name in COUNTED:
            buffer = self._buffers[name]
            if buffer is not None:
                self._buffers[name] = buffer.expand(self.rows, *buffer.shape).clone()

    def _row(self, number: int) -> Running | None:
        mean, var, batches = (self._buffers[name] for name in COUNTED)
        return None if mean is None or var is None else Running(mean[number], var[number], _at(batches, number))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        # Of a plain batch norm: every row starts from it.
        for name, own in (*self._buffers.items(), *self._parameters.items()):
            stored = state_dict.get(prefix + name)
            if own is not None and isinstance(stored, Tensor) and stored.shape == own.shape[1:]:
                state_dict[prefix + name] = stored.expand(own.shape).clone()
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _at(batches: Tensor | None, number: int) -> Tensor | None:
    return batches if batches is None else batches[number]
