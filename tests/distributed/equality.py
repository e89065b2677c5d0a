"""SyncBatchNorm on real processes equals one process with the whole batch; run by tests/layers/test_sync.py."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function
from torch.func import functional_call

import steadynorm
from steadynorm.layers import SyncBatchNorm
from steadynorm.moments import Moments
from steadynorm.ranks import Ranks
from tests import cases, oracles
from tests.agree import assert_agrees
from tests.processes import on_ranks

SHARES = {2: (0.7, 0.3), 3: (0.6, 0.0, 0.4), 4: (0.2, 0.0, 0.5, 0.3)}
"""Of the batch, for each rank: uneven, and from three ranks on one has nothing."""


def cut(x: Tensor, world: int) -> tuple[Tensor, ...]:
    """The parts of the ranks, along the batch."""
    sizes = [round(len(x) * share) for share in SHARES[world]]
    sizes[0] += len(x) - sum(sizes)
    return x.split(sizes)


class Cut(Function):
    """The part of this rank of a tensor that all have; its gradient is put together from all ranks."""

    @staticmethod
    def forward(ctx, x, rank, world):
        ctx.rank, ctx.world, ctx.shape = rank, world, x.shape
        return cut(x, world)[rank].clone()

    @staticmethod
    def backward(ctx, dy):
        whole = dy.new_zeros(ctx.shape)
        cut(whole, ctx.world)[ctx.rank].copy_(dy)
        dist.all_reduce(whole)
        return whole, None, None


class Join(Function):
    """The parts of all ranks, one after the other; the gradient of each goes where it came from."""

    @staticmethod
    def forward(ctx, x, rank, world, like):
        ctx.rank, ctx.world = rank, world
        whole = like.new_zeros(like.shape)
        cut(whole, world)[rank].copy_(x)
        dist.all_reduce(whole)
        return whole

    @staticmethod
    def backward(ctx, dy):
        return cut(dy, ctx.world)[ctx.rank].contiguous(), None, None, None


class Shared(Function):
    """A parameter that every rank has: what DistributedDataParallel does to its gradient, but for the division."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        dy = dy.clone()
        dist.all_reduce(dy)
        return dy


def candidate(rank, world, make=SyncBatchNorm):
    """Batch normalization of a whole tensor, of which every rank does its part."""

    def normalize(x, running_mean, running_var, weight, bias, training, momentum, eps, **extras):
        layer = make(x.shape[1], eps, momentum, activation=extras.get("activation"))
        given = {"weight": weight, "bias": bias}
        tensors = {k: Shared.apply(v) for k, v in given.items() if v is not None}
        if weight is None:
            layer = make(x.shape[1], eps, momentum, affine=False, activation=extras.get("activation"))
        tensors |= {"running_mean": running_mean, "running_var": running_var}
        residual, mask = extras.get("residual"), extras.get("mask")
        part = Cut.apply(x, rank, world)
        also = None if residual is None else Cut.apply(residual, rank, world)
        valid = None if mask is None else cut(mask, world)[rank]
        y = functional_call(layer.train(training), tensors, (part, also, valid))
        return Join.apply(y, rank, world, x)

    return normalize


# Putting parts together loses their memory order; `memory_order` looks at the parts. Gradients of half parameters are
# rounded on every rank before they are added up, which is nothing that the layer does.
CASES = [
    case
    for case in cases.ALL
    if case.training and case.layout == "plain" and not case.cotangent_layout and case.parameter_dtype is None
]
COMPILED = [
    case for case in CASES if case.dtype in (torch.float32, torch.float64) and case.activation in (None, "relu")
]
HARD = [case for case in CASES if case.mask or case.special or case.offset > 100 or case.dtype == torch.float64]


@on_ranks(2)
def agrees_with_the_oracle(rank, world):
    with steadynorm.backend("reference"):
        for case in CASES:
            assert_agrees(candidate(rank, world), oracles.batch_norm, case)


@on_ranks(3, 4)
def agrees_with_the_oracle_where_it_is_hard(rank, world):
    with steadynorm.backend("reference"):
        for case in HARD:
            assert_agrees(candidate(rank, world), oracles.batch_norm, case)


@on_ranks(3)
def compiled_kernels_agree(rank, world):
    for case in COMPILED[::3]:
        assert_agrees(candidate(rank, world), oracles.batch_norm, case)


class EqualShares(Ranks):
    """What a mean over ranks does, as mmcv's and detectron2's first ones: each rank counts the same."""

    def merge(self, local):
        mean, square = (self._sum(t) / self.size for t in (local.mean, local.var + local.mean**2))
        count = self._sum(local.mean.new_full((), float(local.count)))
        return Moments(mean, square - mean**2, count)


class WithinOnly(Ranks):
    """Variances pooled without what lies between the ranks."""

    def merge(self, local):
        merged, n = super().merge(local), float(local.count)
        return Moments(merged.mean, self._sum(local.var * n) / merged.count, merged.count)


class ForwardOnly(Ranks):
    """Statistics joined, gradients through them not."""

    def add(self, local):
        return local


class SumsOfSquares(Ranks):
    """Σx and Σx² in float32, added up: one all-reduce, and no digits left beside a large mean."""

    def merge(self, local):
        n = local.mean.new_full((), float(local.count))
        sums = self._sum(
            torch.stack([n.expand_as(local.mean), n * local.mean, n * (local.var + local.mean**2)]).float()
        )
        mean = sums[1] / sums[0]
        return Moments(mean.double(), (sums[2] / sums[0] - mean**2).double(), sums[0, 0].double())


class ForgetsTheCount(Ranks):
    """Merged right, but every rank then divides by what it has itself."""

    def merge(self, local):
        merged = super().merge(local)
        return Moments(merged.mean, merged.var, torch.as_tensor(local.count, dtype=merged.mean.dtype))


@on_ranks(2)
def saboteurs_are_caught(rank, world):
    """Each is rejected on every rank, by a case that the layer itself passes."""
    plain = next(case for case in CASES if case.name == "plain")
    large = next(case for case in CASES if case.offset >= 1e4)
    for saboteur in (EqualShares, WithinOnly, ForwardOnly, SumsOfSquares, ForgetsTheCount):

        def make(*args, saboteur=saboteur, **kwargs):
            layer = SyncBatchNorm(*args, **kwargs)
            layer._joined = saboteur(layer.process_group)
            layer._reduction = lambda: layer._joined
            return layer

        case = large if saboteur is SumsOfSquares else plain
        with steadynorm.backend("reference"):
            assert_agrees(candidate(rank, world), oracles.batch_norm, case)
            with pytest.raises(AssertionError, match="off by"):
                assert_agrees(candidate(rank, world, make), oracles.batch_norm, case)


@on_ranks(2)
def memory_order(rank, world):
    whole = torch.randn(10, 8, 5, 6, dtype=torch.float64).to(memory_format=torch.channels_last)
    dy = torch.randn_like(whole)
    expected = whole.clone().requires_grad_()
    y = nn.BatchNorm2d(8, dtype=torch.float64)(expected)
    y.backward(dy)
    x = cut(whole, world)[rank].clone().requires_grad_()
    found = SyncBatchNorm(8, dtype=torch.float64)(x)
    found.backward(cut(dy, world)[rank])
    for tensor, other in ((found, y), (x.grad, expected.grad)):
        assert tensor.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(tensor, cut(other, world)[rank], rtol=1e-10, atol=1e-12)
