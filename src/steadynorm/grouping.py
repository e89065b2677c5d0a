"""Grouping: which values of a tensor share statistics.

A normalization sees its input as `(outer, group, inner)`; all values of one group share a mean and a variance.
Memory is always dense in that order, so a kernel meets two layouts only: `inner > 1` (a group is a set of
contiguous runs) and `inner == 1` (groups are the columns of a matrix).

    batch           (N, C, *)          -> (N, C, L)
    batch           (N, *, C) memory   -> (N·L, C, 1)
    batch           (N, C)             -> (N, C, 1)

Statistics within a sample need one more size on each side, since weights belong to channels and not to groups:
`SampleGrouping`, `(samples, outer, groups, channels, inner)`, where one of outer and inner is 1.

    layer           (*, D)             -> (rows, 1, 1, D, 1)
    sample_groups   (N, C, *)          -> (N, 1, G, C/G, L)
    sample_groups   (N, *, C) memory   -> (N, L, G, C/G, 1)
    positions       (N, C, *)          -> (N, 1, 1, C, L), one statistic per position
    positions       (N, *, C) memory   -> (N·L, 1, 1, C, 1)
"""

import math
from typing import NamedTuple

import torch
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


def with_strides(t: Tensor, strides: tuple[int, ...]) -> Tensor:
    """`t` with these strides: itself, or a copy. What saved-tensor hooks give back may lie in another order."""
    if t.stride() == strides:
        return t
    return torch.empty_strided(t.shape, strides, dtype=t.dtype, device=t.device).copy_(t)


def batch(x: Tensor) -> tuple[Tensor, Grouping]:
    """The grouping of batch normalization over `x` (N, C, *): one statistic per channel.

    Returns: `x` itself where its memory is dense in one of the two layouts, else a contiguous copy; and its grouping.
    """
    n, c, *spatial = x.shape
    inner = math.prod(spatial)
    if is_channels_last(x):
        return x, Grouping(n * inner, c, 1)
    return x.contiguous(), Grouping(n, c, inner)


class SampleGrouping(NamedTuple):
    """Sizes of the `(samples, outer, groups, channels, inner)` view of dense memory.

    The outer·channels·inner values of one (sample, group) share statistics; with `is_per_position` the channels of
    one (sample, inner) do. Weights are indexed group·channels + channel, statistics sample·groups + group (or
    sample·inner + position).
    """

    samples: int
    outer: int
    groups: int
    channels: int
    inner: int
    is_per_position: bool = False

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """The shape of the view."""
        return self[:5]

    @property
    def values_per_group(self) -> int:
        """Values per statistic."""
        return self.channels if self.is_per_position else self.outer * self.channels * self.inner

    @property
    def statistics(self) -> int:
        """How many statistics there are."""
        return self.samples * (self.inner if self.is_per_position else self.groups)

    @property
    def statistics_shape(self) -> tuple[int, int, int, int, int]:
        """The shape in which statistics meet the view."""
        if self.is_per_position:
            return self.samples, 1, 1, 1, self.inner
        return self.samples, 1, self.groups, 1, 1

    def view(self, x: Tensor) -> Tensor:
        """`x` as the view: shares memory with every tensor that a constructor called dense."""
        return (x.movedim(1, -1) if is_channels_last(x) else x).reshape(self.sizes)

    def restore(self, y: Tensor, like: Tensor) -> Tensor:
        """The inverse of `view`: `y` in the shape and memory order of `like`."""
        if is_channels_last(like):
            return y.reshape(like.movedim(1, -1).shape).movedim(-1, 1)
        return y.reshape(like.shape)


def layer(x: Tensor, dims: int) -> tuple[Tensor, SampleGrouping]:
    """The grouping over the last `dims` dimensions of `x`, one statistic per row; and `x`, contiguous."""
    width = math.prod(x.shape[x.dim() - dims :])
    return x.contiguous(), SampleGrouping(math.prod(x.shape[: x.dim() - dims]), 1, 1, width, 1)


def sample_groups(x: Tensor, groups: int) -> tuple[Tensor, SampleGrouping]:
    """The grouping of `x` (N, C, *) with one statistic per sample and group of neighbouring channels.

    Returns: `x` itself where its memory is dense in one of the two layouts, else a contiguous copy; and its grouping.
    """
    n, c, *spatial = x.shape
    inner = math.prod(spatial)
    if is_channels_last(x):
        return x, SampleGrouping(n, inner, groups, c // groups, 1)
    return x.contiguous(), SampleGrouping(n, 1, groups, c // groups, inner)


def positions(x: Tensor) -> tuple[Tensor, SampleGrouping]:
    """The grouping of `x` (N, C, *) over its channels, one statistic per sample and position; as `sample_groups`."""
    n, c, *spatial = x.shape
    inner = math.prod(spatial)
    if is_channels_last(x):
        return x, SampleGrouping(n * inner, 1, 1, c, 1)
    return x.contiguous(), SampleGrouping(n, 1, 1, c, inner, is_per_position=True)
