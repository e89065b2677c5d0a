"""A folded model is held to the unfolded one in float64, which shares no code with folding."""

from __future__ import annotations

import copy

import torch
from torch import nn

from steadynorm import deploy


class Net(nn.Module):
    """Modules by name, and a function for its forward."""

    def __init__(self, forward, **modules):
        super().__init__()
        self.function = forward
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, *args):
        return self.function(self, *args)


def folded(model, *batches, **options):
    """The Change, after a look at the result with float64 and at the model that was given."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    change = deploy.fold(model, batches, **options)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    oracle = copy.deepcopy(model).double()
    with torch.no_grad():
        for batch in batches:
            expected, y = oracle(batch.double()), change.model(batch)
            if isinstance(y, dict):
                expected, y = expected["mask"], y["mask"]
            torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    return change


def where(change):
    return {path: one.after for one in change.log for path in one.paths}


IMAGES = torch.linspace(-2, 2, 2 * 3 * 8 * 8).sin().mul(3).reshape(2, 3, 8, 8)
