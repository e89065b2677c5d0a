"""SyncBatchNorm under DistributedDataParallel, FSDP2 and torch.compile; run by tests/distributed/test_on_ranks.py."""

from __future__ import annotations

import copy
import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from steadynorm.layers import SyncBatchNorm
from tests.distributed.behaviour import batch, close, collectives, same_everywhere
from tests.distributed.equality import cut
from tests.processes import on_ranks

DOUBLE = torch.float64


class Network(nn.Module):
    """Two layers of convolution and norm with a residual; `make` is the norm."""

    def __init__(self, make):
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norms = nn.ModuleList([make(4), make(4)])
        self.head = nn.Linear(4, 3)
        self.double()

    def forward(self, x):
        h = self.norms[0](self.first(x)).relu()
        return self.head((h + self.norms[1](self.second(h))).mean((2, 3)))


def train(model, x, target, world, steps=3):
    """Losses are sums over the samples of this rank: averaged over ranks, they are those of the whole batch / world."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        (nn.functional.cross_entropy(model(x), target, reduction="sum") * world).backward()
        optimizer.step()


def trained_on_the_whole(steps=3):
    torch.manual_seed(2)
    x, target = torch.randn(8, 2, 5, 5, dtype=DOUBLE), torch.randint(3, (8,))
    one = Network(nn.BatchNorm2d)
    train(one, x, target, 1, steps)
    return x, target, one


@on_ranks(2, 3)
def distributed_data_parallel(rank, world):
    """On the CPU: https://github.com/open-mmlab/mmsegmentation/issues/2147

    Uneven, and with an empty rank: https://github.com/pytorch/pytorch/issues/64039
    """
    x, target, one = trained_on_the_whole()
    warnings.simplefilter("ignore", FutureWarning)  # broadcast_buffers has a successor in torch 2.13, and none before
    for options in ({}, {"broadcast_buffers": False}, {"static_graph": True}):
        model = DistributedDataParallel(Network(SyncBatchNorm), **options)
        train(model, cut(x, world)[rank], cut(target, world)[rank], world)
        for found, expected in zip(model.module.state_dict().values(), one.state_dict().values(), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
        same_everywhere(*model.buffers())
        assert model.module.norms[1]._joined.name == "SyncBatchNorm at module.norms.1"
        close(model.eval()(x), one.eval()(x))


@on_ranks(2)
def two_forward_passes_before_one_backward(rank, world):
    """As a discriminator sees real and false: https://github.com/pytorch/pytorch/issues/22095"""
    x, *_ = trained_on_the_whole(0)
    model, one = DistributedDataParallel(Network(SyncBatchNorm)), Network(nn.BatchNorm2d)
    part = cut(x, world)[rank]
    (world * (model(part).square().sum() - model(part.flip(0) * 2).exp().sum())).backward()
    real, false = torch.cat(cut(x, world)), torch.cat([p.flip(0) * 2 for p in cut(x, world)])
    (one(real).square().sum() - one(false).exp().sum()).backward()
    for found, expected in zip(model.module.parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-9, atol=1e-10)


@on_ranks(2, 3)
def fully_sharded(rank, world):
    x, target, one = trained_on_the_whole()
    model = Network(SyncBatchNorm)
    for layer in (*model.norms, model.first, model):
        fully_shard(layer)
    train(model, cut(x, world)[rank], cut(target, world)[rank], world)
    expected = one.state_dict()
    for name, found in model.state_dict().items():
        whole = found.full_tensor() if hasattr(found, "full_tensor") else found
        torch.testing.assert_close(whole, expected[name], rtol=1e-9, atol=1e-10)


@on_ranks(2)
def fully_sharded_in_half_precision(rank, world):
    """Statistics stay float32: https://github.com/pytorch/pytorch/issues/75478"""
    x, *_ = trained_on_the_whole(0)
    one, model = Network(nn.BatchNorm2d).float(), Network(SyncBatchNorm).float()
    fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=True))
    y = model(cut(x.float(), world)[rank])
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    one(x.float())
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, one.get_buffer(name), rtol=0.05, atol=0.02)
        assert buffer.dtype in (torch.float32, torch.int64)
    same_everywhere(*model.buffers())


@on_ranks(2)
def one_graph_for_the_compiler(rank, world):
    """https://github.com/pytorch/pytorch/issues/161302"""
    warnings.simplefilter("ignore", DeprecationWarning)
    for options in ({}, {"activation": "relu", "momentum": None, "guard": "raise"}):
        torch._dynamo.reset()
        eager = nn.Sequential(SyncBatchNorm(4, dtype=DOUBLE, **options))
        model = copy.deepcopy(eager)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for step in range(2):
            whole, part = batch(rank, world, (9 + step, 4, 5))
            other = part.detach().clone().requires_grad_()
            dy = cut(torch.randn_like(whole), world)[rank]
            before = collectives()
            y = compiled(part)
            y.backward(dy)
            assert collectives() == before + 2
            expected = eager(other)
            expected.backward(dy)
            close(y, expected)
            close(part.grad, other.grad)
        for found, buffer in zip(model.buffers(), eager.buffers(), strict=True):
            torch.testing.assert_close(found, buffer)


@on_ranks(2)
def one_graph_with_masks_and_without_gradients(rank, world):
    warnings.simplefilter("ignore", DeprecationWarning)
    torch._dynamo.reset()
    layer = SyncBatchNorm(4, dtype=DOUBLE)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    whole, part = batch(rank, world, requires_grad=False)
    residual, mask = torch.randn_like(whole), torch.rand(9, 5) > 0.3
    also = cut(residual, world)[rank], cut(mask, world)[rank]
    with torch.no_grad():
        close(compiled(part, *also), layer(part, *also))
        layer.eval()
        before = collectives()
        close(compiled(part, *also), layer(part, *also))
        assert collectives() == before
    # A residual of another dtype runs in PyTorch's own operators, sums over ranks included.
    layer.train()
    leaf, mixed = part.clone().requires_grad_(), (also[0].float(), also[1])
    found, expected = (torch.autograd.grad(call(leaf, *mixed).exp().sum(), leaf) for call in (compiled, layer))
    close(found, expected)


@on_ranks(2)
def checkpointing_a_compiled_layer(rank, world):
    """The compiler's graph is run again as a whole, on every rank: a collective more, and the same gradients."""
    warnings.simplefilter("ignore", DeprecationWarning)
    torch._dynamo.reset()
    layer = SyncBatchNorm(4, dtype=DOUBLE)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    whole, part = batch(rank, world)
    plain = nn.BatchNorm1d(4, dtype=DOUBLE)
    plain(whole).sin().sum().backward()
    checkpoint(lambda x: compiled(x).sin(), part, use_reentrant=False).sum().backward()
    close(part.grad, cut(whole.grad, world)[rank])
    assert layer.num_batches_tracked == 1
    dist.barrier()
