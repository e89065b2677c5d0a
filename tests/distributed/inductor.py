"""The default compiler, which takes a minute; run by tests/distributed/test_on_ranks.py -m slow."""

from __future__ import annotations

import copy
import warnings

import torch
from torch import nn

from steadynorm.layers import SyncBatchNorm
from tests.distributed.behaviour import close, collectives
from tests.distributed.equality import cut
from tests.processes import on_ranks


class Branches(nn.Module):
    """Two norms that do not wait for each other: both ranks have to join them in the same order."""

    def __init__(self):
        super().__init__()
        self.left, self.right = (SyncBatchNorm(4, dtype=torch.float64) for _ in range(2))

    def forward(self, x):
        return self.left(x.sin()) * self.right(x.exp().cumsum(2))


@on_ranks(2)
def one_graph_over_uneven_batches(rank, world):
    warnings.simplefilter("ignore")
    eager = Branches()
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, fullgraph=True)
    for samples in (10, 17):
        x = cut(torch.randn(samples, 4, 50, dtype=torch.float64), world)[rank]
        leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        dy = torch.randn_like(x)
        before = collectives()
        y = compiled(leaf)
        y.backward(dy)
        assert collectives() == before + 4
        expected = eager(other)
        expected.backward(dy)
        close(y, expected)
        close(leaf.grad, other.grad)
    for found, buffer in zip(model.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(found, buffer)
