"""Grouping: which values of a tensor share statistics.

A normalization sees its input as `(outer, group, inner)`; all values of one group share a mean and a variance.
Memory is always dense in that order, so a kernel meets two layouts only: `inner > 1` (a group is a set of
contiguous runs) and `inner == 1` (groups are the columns of a matrix).

    batch           (N, C, *)          -> (N, C, L)
    batch           (N, *, C) memory   -> (N·L, C, 1)
    batch           (N, C)             -> (N, C, 1)
"""

import math
from typing import NamedTuple

from torch import Tensor


class Grouping(NamedTuple):
    """Sizes of the `(outer, group, inner)` view. `outer * inner` values share one of `group` statistics."""

    outer: int
    group: int
    inner: int

    @property
    def values_per_group(self) -> int:
        """Values per statistic."""
        return self.outer * self.inner

    @property
    def is_rows(self) -> bool:
        """Whether groups are the columns of a matrix (channels-last memory, or no inner dimension)."""
        return self.inner == 1

    def view(self, x: Tensor) -> Tensor:
        """`x` (N, C, *) as (outer, group, inner): a view for every tensor that `batch` called dense."""
        if x.dim() > 2 and self.is_rows and self.outer != x.shape[0]:
            x = x.movedim(1, -1)
        return x.reshape(self.outer, self.group, self.inner)

    def restore(self, y: Tensor, like: Tensor) -> Tensor:
        """The inverse of `view`: `y` (outer, group, inner) in the shape and memory order of `like`."""
        if like.dim() > 2 and self.is_rows and self.outer != like.shape[0]:
            return y.reshape(like.shape[0], *like.shape[2:], like.shape[1]).movedim(-1, 1)
        return y.reshape(like.shape)


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels of `x` (N, C, *) are next to each other in memory, and not also in plain order."""
    return x.dim() > 2 and not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


def dense_like(t: Tensor, x: Tensor) -> Tensor:
    """`t`, of the shape of `x`, in the memory order of `x`: itself where it is so already, else a copy."""
    if is_channels_last(x):
        return t.movedim(1, -1).contiguous().movedim(-1, 1)
    return t.contiguous()


def batch(x: Tensor) -> tuple[Tensor, Grouping]:
    """The grouping of batch normalization over `x` (N, C, *): one statistic per channel.

    Returns: `x` itself where its memory is dense in one of the two layouts, else a contiguous copy; and its grouping.
    """
    n, c, *spatial = x.shape
    inner = math.prod(spatial)
    if is_channels_last(x):
        return x, Grouping(n * inner, c, 1)
    return x.contiguous(), Grouping(n, c, inner)
