"""Masked batches without their padding: what is valid, side by side in memory, and put back where it was.

Compiled kernels know no masks. Copying what is valid costs two passes over it, which is little beside arithmetic on
everything (a step of (16, 256, 1000) with a quarter of padding: 57 ms masked, 13 ms packed, 10 ms without a mask).
"""

from typing import Any

import torch
from torch import Tensor

from steadynorm import grouping as grouping_
from steadynorm.grouping import dense_like

RUNS_PER_SAMPLE = 16
"""Up to so many runs of valid positions, each is copied on its own; more are gathered value by value."""


class Packing:
    """Where the valid values of tensors like `x` (N, C, *) are.

    Args:
        x: dense in memory, see `grouping.batch`.
        mask: (N, *) bool, with at least one True.
    """

    def __init__(self, x: Tensor, mask: Tensor) -> None:
        self.like = torch.empty_like(x, device="meta")
        _, self.grouping = grouping_.batch(self.like)
        flat = mask.reshape(x.shape[0], -1)
        self.positions = flat.reshape(-1).nonzero().squeeze(1)
        self.runs: list[tuple[int, int, int]] = []
        if not self.grouping.is_rows:
            edge = torch.nn.functional.pad(flat, (1, 1)).diff(dim=1).nonzero()
            if len(edge) <= 2 * RUNS_PER_SAMPLE * len(flat):
                samples, places = edge.T.tolist()
                self.runs = list(zip(samples[::2], places[::2], places[1::2], strict=True))

    def pack(self, t: Tensor) -> Tensor:
        """(1, C, valid) or (valid, C), whichever the memory of `t` (N, C, *) is nearer to."""
        t = dense_like(t, self.like)
        view = self.grouping.view(t)
        if self.runs:
            return torch.cat([view[n, :, start:stop] for n, start, stop in self.runs], 1).unsqueeze(0)
        if self.grouping.is_rows:
            return view[..., 0].index_select(0, self.positions)
        sample, place = self._places()
        return view[sample, :, place]

    def unpack(self, packed: Tensor) -> Tensor:
        """The inverse, with zeros in the padding: (N, C, *) in the memory order of `x`."""
        t = torch.zeros_like(self.like, dtype=packed.dtype, device=packed.device)
        view = self.grouping.view(t)
        if self.runs:
            first = 0
            for n, start, stop in self.runs:
                view[n, :, start:stop] = packed[0, :, first : first + stop - start]
                first += stop - start
        elif self.grouping.is_rows:
            view[..., 0].index_copy_(0, self.positions, packed)
        else:
            sample, place = self._places()
            view[sample, :, place] = packed
        return t

    def _places(self) -> tuple[Tensor, Tensor]:
        return self.positions // self.grouping.inner, self.positions % self.grouping.inner


class _Pack(torch.autograd.Function):
    """`Packing.pack` for autograd, to any order: its adjoint is `unpack`."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, packing: Packing) -> Tensor:
        ctx.packing = packing
        return packing.pack(t)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, None]:
        return _Unpack.apply(d, ctx.packing), None


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, packed: Tensor, packing: Packing) -> Tensor:
        ctx.packing = packing
        return packing.unpack(packed)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, None]:
        return _Pack.apply(d, ctx.packing), None


def pack(t: Tensor, packing: Packing) -> Tensor:
    """The valid values of `t` (N, C, *)."""
    packed: Tensor = _Pack.apply(t, packing)
    return packed


def unpack(packed: Tensor, packing: Packing) -> Tensor:
    """What `pack` gave, or something made of it, where it was; zeros in the padding."""
    t: Tensor = _Unpack.apply(packed, packing)
    return t
