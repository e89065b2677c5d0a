"""What SyncBatchNorm promises beyond its numbers, on real processes; run by tests/distributed/test_on_ranks.py."""

from __future__ import annotations

import copy
import math
import os
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from steadynorm import sync_group
from steadynorm.errors import DistributedError, InputError, NonFiniteStatisticsError
from steadynorm.layers import BatchNorm1d, SyncBatchNorm
from steadynorm.moments import Moments
from steadynorm.ranks import Ranks
from tests.distributed.equality import cut
from tests.processes import on_ranks

DOUBLE = torch.float64


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def same_everywhere(*tensors):
    """The same bits on every rank."""
    for tensor in tensors:
        all_of_them = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(all_of_them, tensor)
        assert all(torch.equal(tensor, other) for other in all_of_them)


def collectives() -> int:
    """How many this process has started in the world so far: the number that gloo itself gives them."""
    return dist.group.WORLD._get_sequence_number_for_group()


def batch(rank, world, shape=(9, 4, 5), requires_grad=True):
    """The whole batch, and the part of this rank."""
    whole = torch.randn(shape, dtype=DOUBLE) * 2 + 3
    return whole.clone().requires_grad_(requires_grad), cut(whole, world)[rank].clone().requires_grad_(requires_grad)


@on_ranks(3)
def running_statistics_over_several_steps(rank, world):
    for options in ({}, {"momentum": None}, {"debias": True}, {"guard": "propagate"}, {"activation": "relu"}):
        layer, one = SyncBatchNorm(4, **options), BatchNorm1d(4, **options)
        for step in range(3):
            whole, part = batch(rank, world, (9 + step, 4, 5))
            layer(part), one(whole)
        for buffer, expected in zip(layer.buffers(), one.buffers(), strict=True):
            torch.testing.assert_close(buffer, expected)
        same_everywhere(*layer.buffers())
        close(layer.eval()(part), cut(one.eval()(whole), world)[rank])


@on_ranks(2)
def one_collective_forward_and_one_backward(rank, world):
    layer = SyncBatchNorm(4)
    _, part = batch(rank, world)
    before = collectives()
    y = layer(part)
    assert collectives() == before + 1
    y.sum().backward()
    assert collectives() == before + 2


class Watch(TorchDispatchMode):
    """Fails where a value is asked for on the host: on a GPU that would wait for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "item")
        assert func.overloadpacket.__name__ not in waits, func
        return func(*args, **(kwargs or {}))


@on_ranks(2)
def nothing_waits_for_the_device(rank, world):
    """https://github.com/pytorch/pytorch/issues/78549"""
    for options in ({}, {"momentum": None}, {"debias": True}):
        layer = SyncBatchNorm(4, **options)
        _, part = batch(rank, world)
        mask = cut(torch.rand(9, 5) > 0.3, world)[rank]
        with Watch():
            layer(part, mask=mask).sum().backward()
    with pytest.raises(AssertionError, match="_local_scalar_dense"), Watch():
        part.sum().item()


@on_ranks(2)
def no_collective_where_nothing_is_joined(rank, world):
    """Called by one rank alone: a collective would wait for the other, and fail."""
    if rank == 0:
        _, part = batch(rank, world)
        evaluation = SyncBatchNorm(4).eval()
        frozen = SyncBatchNorm(4).freeze_()
        by_batch = SyncBatchNorm(4, track_running_stats=False).eval()
        for layer in (evaluation, frozen, by_batch):
            before = collectives()
            layer(part).sum().backward()
            assert collectives() == before


@on_ranks(2)
def a_batch_that_is_not_finite_on_one_rank(rank, world):
    """Skipped by all: https://github.com/pytorch/pytorch/issues/88474"""
    layer = SyncBatchNorm(4)
    _, part = batch(rank, world, requires_grad=False)
    layer(part)
    before = [buffer.clone() for buffer in layer.buffers()]
    if rank == 1:
        part[0, 2, 0] = math.nan
    layer(part)
    assert all(torch.equal(a, b) for a, b in zip(before, layer.buffers(), strict=True))
    layer.guard = "raise"
    with pytest.raises(NonFiniteStatisticsError, match="channel 2"):
        layer(part)


@on_ranks(2, 3)
def one_value_or_none(rank, world):
    """https://github.com/pytorch/pytorch/issues/36530: a rank without a sample takes part."""
    whole = torch.randn(world - 1, 3, dtype=DOUBLE, requires_grad=True)
    dy = torch.randn(world - 1, 3, dtype=DOUBLE)
    sizes = [0] + [1] * (world - 1)
    part = whole.detach().split(sizes)[rank].clone().requires_grad_()
    layer = SyncBatchNorm(3, dtype=DOUBLE)
    y = layer(part)
    y.backward(dy.split(sizes)[rank])
    if world == 2:  # one value in all
        close(y, torch.zeros_like(part))
        assert not any(buffer.any() for buffer in (layer.running_mean, layer.num_batches_tracked))
    else:
        one = nn.BatchNorm1d(3, dtype=DOUBLE)
        expected = one(whole)
        expected.backward(dy)
        close(y, expected.split(sizes)[rank])
        close(part.grad, whole.grad.split(sizes)[rank])
        torch.testing.assert_close(layer.running_var, one.running_var)
    empty = layer(torch.randn(0, 3, dtype=DOUBLE))
    assert empty.shape == (0, 3)


@on_ranks(3)
def shared_by_two_places(rank, world):
    """Two calls of one layer before one backward pass, as of a discriminator."""
    layer, one = SyncBatchNorm(4, dtype=DOUBLE), nn.BatchNorm1d(4, dtype=DOUBLE)
    whole, part = batch(rank, world)
    dy = torch.randn_like(whole)
    one(one(whole).sin()).backward(dy)
    layer(layer(part).sin()).backward(cut(dy, world)[rank])
    close(part.grad, cut(whole.grad, world)[rank])
    dist.all_reduce(layer.weight.grad)
    close(layer.weight.grad, one.weight.grad)
    torch.testing.assert_close(layer.running_var, one.running_var)
    assert layer.num_batches_tracked == 2


@on_ranks(2, 3)
def running_statistics_that_move_without_normalising(rank, world):
    layer, one = SyncBatchNorm(4), BatchNorm1d(4)
    for norm in (layer, one):
        norm.normalize_by, norm.update_running = "running", True
    whole, part = batch(rank, world)
    layer(part), one(whole)
    torch.testing.assert_close(layer.running_var, one.running_var)
    same_everywhere(layer.running_mean, layer.running_var)


@on_ranks(3)
def second_order(rank, world):
    """Through activation and residual, with a mask: the gradient of a gradient is that of one batch."""
    for activation in (None, "silu", "relu"):
        layer = SyncBatchNorm(4, dtype=DOUBLE, activation=activation)
        one = BatchNorm1d(4, dtype=DOUBLE, activation=activation)
        whole, part = batch(rank, world)
        residual, v, mask = torch.randn(whole.shape, dtype=DOUBLE), torch.randn_like(whole), torch.rand(9, 5) > 0.3

        def penalty(norm, x, residual, v, mask):
            (first,) = torch.autograd.grad((norm(x, residual, mask) * v).square().sum(), x, create_graph=True)
            return torch.autograd.grad(first.square().sum(), [x, norm.weight])

        dx, dweight = penalty(layer, part, *(cut(t, world)[rank] for t in (residual, v, mask)))
        dist.all_reduce(dweight)
        expected_dx, expected_dweight = penalty(one, whole, residual, v, mask)
        close(dx, cut(expected_dx, world)[rank])
        close(dweight, expected_dweight)


@on_ranks(2)
def functional_gradients(rank, world):
    """torch.func.grad and forward-mode derivatives go through the sums over ranks."""
    layer, one = SyncBatchNorm(4, dtype=DOUBLE), BatchNorm1d(4, dtype=DOUBLE)
    whole, part = batch(rank, world, requires_grad=False)
    v, tangent = torch.randn_like(whole), torch.randn_like(whole)
    found = torch.func.grad(lambda x: (layer(x) * cut(v, world)[rank]).sum())(part)
    close(found, cut(torch.func.grad(lambda x: (one(x) * v).sum())(whole), world)[rank])
    warnings.simplefilter("ignore", DeprecationWarning)  # torch's forward mode uses a deprecated part of torch
    _, found = torch.func.jvp(layer, (part,), (cut(tangent, world)[rank],))
    expected = cut(torch.func.jvp(one, (whole,), (tangent,))[1], world)[rank]
    close(found, expected)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(layer(forward_ad.make_dual(part, cut(tangent, world)[rank]))).tangent
    close(found, expected)


@on_ranks(4)
def groups_of_two(rank, world):
    group = sync_group(2)
    layer, one = SyncBatchNorm(4, dtype=DOUBLE, process_group=group), nn.BatchNorm1d(4, dtype=DOUBLE)
    assert group.size() == 2
    whole, _ = batch(rank, 4)
    pair = rank // 2
    mine = whole.detach().chunk(2)[pair]
    layer(mine.chunk(2)[rank % 2]), one(mine)
    torch.testing.assert_close(layer.running_var, one.running_var)
    clone = copy.deepcopy(nn.Sequential(layer))
    assert clone[0].process_group is group
    assert clone[0].running_var is not layer.running_var
    clone[0](mine.chunk(2)[rank % 2])
    with pytest.raises(TypeError, match="pickle"):
        copy.deepcopy(group)


@on_ranks(4)
def a_group_for_each_node(rank, world):
    os.environ["GROUP_RANK"] = str(rank % 2)
    try:
        group = sync_group("node")
    finally:
        del os.environ["GROUP_RANK"]
    assert dist.get_process_group_ranks(group) == [rank % 2, rank % 2 + 2]
    alone = SyncBatchNorm(4, process_group=sync_group(1))
    before = collectives()
    alone(torch.randn(3, 4))
    assert alone._reduction() is None
    assert collectives() == before


@on_ranks(4)
def groups_that_cannot_be(rank, world):
    for k in (0, -2, 3, 5, True, 2.0, "nodes", None):
        with pytest.raises(InputError, match='expected "node" or, for 4 ranks, one of 1, 2, 4'):
            sync_group(k)
    with pytest.raises(InputError, match=r"must be a torch\.distributed\.ProcessGroup or None, got 'gloo'"):
        SyncBatchNorm(4, process_group="gloo")
    other = dist.new_group([0, 1])
    if rank > 1:
        with pytest.raises(InputError, match=f"rank {rank} is not in"):
            SyncBatchNorm(4, process_group=other)
    layer = SyncBatchNorm(4)
    layer.process_group = "gloo"
    with pytest.raises(InputError, match=r"must be a torch\.distributed\.ProcessGroup"):
        layer(torch.randn(2, 4))
    assert layer.num_batches_tracked == 0


@on_ranks(3)
def moments_of_many_shapes(rank, world):
    """Counts as int, () or (C,); the results are tensors of the same form, the same on all ranks."""
    values = torch.randn(world, 7, 3, dtype=DOUBLE) + 1e4
    local = Moments(values[rank].mean(0), values[rank].var(0, unbiased=False), 7)
    for count in (7, torch.tensor(7), torch.full((3,), 7)):
        merged = Ranks(None, "these").merge(Moments(local.mean, local.var, count))
        close(merged.mean, values.flatten(0, 1).mean(0))
        close(merged.var, values.flatten(0, 1).var(0, unbiased=False))
        assert torch.equal(merged.count, torch.full(getattr(count, "shape", ()), 21.0, dtype=DOUBLE))
        same_everywhere(merged.mean, merged.var)


class Regions(nn.Module):
    """Layers in checkpointed regions; one is called three times, twice in one region."""

    def __init__(self, make, use_reentrant):
        super().__init__()
        self.first, self.shared, self.last = (make(4, dtype=DOUBLE) for _ in range(3))
        self.use_reentrant = use_reentrant

    def inside(self, x):
        return self.shared(self.first(x).sin() + self.shared(x).cos())

    def again(self, x):
        return self.last(self.shared(x).sin())

    def nested(self, x):
        return checkpoint(self.inside, x, use_reentrant=self.use_reentrant).square()

    def forward(self, x):
        if self.use_reentrant is None:
            return self.again(self.inside(x).square())
        return checkpoint(
            self.again, checkpoint(self.nested, x, use_reentrant=self.use_reentrant), use_reentrant=self.use_reentrant
        )


@on_ranks(2, 3)
def checkpointing_starts_no_second_collective(rank, world):
    """https://github.com/pytorch/pytorch/issues/96136"""
    whole, part = batch(rank, world)
    dy = torch.randn_like(whole)
    plain = Regions(nn.BatchNorm1d, None)
    plain(whole).backward(dy)
    for use_reentrant in (True, False):
        model = Regions(SyncBatchNorm, use_reentrant)
        for _ in range(2):  # a second step finds nothing left over from the first
            part.grad, model.last.running_mean[:] = None, 0
            model.zero_grad()
            before = collectives()
            y = model(part)
            assert collectives() == before + 5
            y.backward(cut(dy, world)[rank])
            assert collectives() == before + 10
        close(part.grad, cut(whole.grad, world)[rank])
        dist.all_reduce(model.shared.weight.grad)
        close(model.shared.weight.grad, plain.shared.weight.grad)
        assert model.shared.num_batches_tracked == 6
        same_everywhere(*model.buffers())


@on_ranks(2)
def a_graph_that_is_kept_is_recomputed_twice(rank, world):
    layer = SyncBatchNorm(4, dtype=DOUBLE)
    _, part = batch(rank, world)
    y = checkpoint(lambda x: layer(x).sin(), part, use_reentrant=False).square().sum()
    first, second = (torch.autograd.grad(y, part, retain_graph=keep) for keep in (True, False))
    assert torch.equal(*first, *second)


@on_ranks(2)
def only_what_may_be_recomputed_is_remembered(rank, world):
    layer = SyncBatchNorm(4)
    _, part = batch(rank, world)
    layer(part)
    assert not layer._joined._calls._kept
    with torch.no_grad():
        for _ in range(50):
            layer(part)
    assert 0 < len(layer._joined._calls._kept) <= 32
    assert copy.deepcopy(layer)._joined is None


@on_ranks(2)
def a_recomputation_that_differs(rank, world):
    """Rounded otherwise it is taken for the same; another batch is an error, on every rank, and nobody waits."""
    _, part = batch(rank, world)

    def run(change):
        layer, calls = nn.Sequential(SyncBatchNorm(4)), []

        def region(x):
            calls.append(x)
            return layer(x if len(calls) == 1 else change(x)).sin()

        checkpoint(region, part, use_reentrant=False).sum().backward()

    before = collectives()
    run(lambda x: x * (1 + 1e-7))
    assert collectives() == before + 2
    with pytest.raises(DistributedError, match=r"SyncBatchNorm at 0 was run again in a backward pass with a batch"):
        run(lambda x: x + 1)


@on_ranks(2)
def a_forward_pass_inside_a_hook(rank, world):
    """Started on purpose in a backward pass, where none was remembered: joined as any other."""
    layer, one = SyncBatchNorm(4, dtype=DOUBLE), BatchNorm1d(4, dtype=DOUBLE)
    whole, part = batch(rank, world, requires_grad=False)
    seen, leaf = [], torch.zeros(1, requires_grad=True)
    y = leaf * 2
    y.register_hook(lambda _: seen.append(layer(part)))
    y.backward()
    close(seen[0], cut(one(whole), world)[rank])
