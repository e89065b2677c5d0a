"""GhostBatchNorm1d, 2d, 3d: batch normalization over slices of the batch."""

from typing import Any

from torch import Tensor, nn

from steadynorm import functional
from steadynorm.errors import InputError
from steadynorm.layers import checks
from steadynorm.layers.batch import BatchNorm
from steadynorm.layers.running import Running
from steadynorm.moments import Moments


class GhostBatchNorm(BatchNorm):
    """What the ghost batch normalizations of every rank share; see `GhostBatchNorm2d`."""

    ghost_size: int = 0
    shown = ("ghost_size", *BatchNorm.shown)

    def __init__(self, num_features: int, *args: Any, ghost_size: int, **kwargs: Any) -> None:
        self.ghost_size = ghost_size  # before the settings are checked
        super().__init__(num_features, *args, **kwargs)

    def _by_batch(
        self, x: Tensor, running: Running | None, weight: Tensor | None, bias: Tensor | None, extras: dict[str, Any]
    ) -> tuple[Tensor, Moments | None]:
        sizes = slice_sizes(x, self.ghost_size)
        if len(sizes) == 1:
            return super()._by_batch(x, running, weight, bias, extras)
        return functional.normalize_slices(x, sizes, weight, bias, **extras)

    def _decide(self, x: Tensor, has_running: bool) -> tuple[bool, bool]:
        by_batch, updates = super()._decide(x, has_running)
        values = x.numel() // max(self.num_features * x.shape[0], 1) * self.ghost_size
        if by_batch and self.training and values == 1:
            raise InputError(
                f"{checks.name(self)} expected more than one value per channel in a slice, got ghost_size=1 for shape"
                f" {tuple(x.shape)}: give a ghost_size of at least 2."
            )
        return by_batch, updates

    def _check_settings(self) -> None:
        super()._check_settings()
        if not isinstance(self.ghost_size, int) or isinstance(self.ghost_size, bool) or self.ghost_size < 1:
            raise InputError(
                f"{checks.name(self)}: ghost_size must be a positive integer, the samples of a slice, got"
                f" {self.ghost_size!r}."
            )


def slice_sizes(x: Tensor, ghost_size: int) -> tuple[int, ...]:
    """Samples of each slice: `ghost_size`, and what is left in the last.

    One value per channel is no statistic: a last slice of that joins the one before.
    """
    samples = x.shape[0]
    sizes = [ghost_size] * (samples // ghost_size)
    rest = samples % ghost_size
    if rest == 1 and sizes and x.numel() == samples * x.shape[1]:
        sizes[-1] += rest
    elif rest or not sizes:
        sizes.append(rest)
    return tuple(sizes)


class GhostBatchNorm1d(GhostBatchNorm, nn.BatchNorm1d):
    """`GhostBatchNorm2d` for (N, C) and (N, C, L)."""

    ranks = (2, 3)


class GhostBatchNorm2d(GhostBatchNorm, nn.BatchNorm2d):
    """Batch normalization over (N, C, H, W) whose statistics are those of slices of the batch.

    Samples 0 to ghost_size − 1 are normalised by their own statistics, the next ghost_size by theirs, and so on: k
    slices give what k batch norms would. A large batch keeps the noise of small ones, which regularises.

    The last slice is as large as what is left, down to one sample; only where one sample is one value per channel,
    (N, C), does it join the slice before. Remembered is the moving average of the merged Moments of the slices: mean
    and variance of the whole batch, in which every slice has the weight of its count. (The paper averages the slices
    one by one, and so leaves out the variance between them.) Evaluation takes any batch size, and the state_dict is
    that of a plain batch norm.

    Args:
        num_features, ...: as `BatchNorm2d`.
        ghost_size: samples in a slice, by keyword; positive.

    Source: Hoffer, Hubara & Soudry, Train longer, generalize better (2017), Algorithm 1.
    """

    ranks = (4,)


class GhostBatchNorm3d(GhostBatchNorm, nn.BatchNorm3d):
    """`GhostBatchNorm2d` for (N, C, D, H, W)."""

    ranks = (5,)
