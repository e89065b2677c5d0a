import pytest
import torch
from torch import nn

import steadynorm
from steadynorm import probe
from steadynorm.probe import instances, state
from steadynorm.probe.effects import UNJUDGED
from steadynorm.recipe import call


@pytest.mark.parametrize("cls", [nn.InstanceNorm2d, steadynorm.InstanceNorm2d])
def test_the_gap_is_that_to_a_twin_without_statistics(cls):
    torch.manual_seed(0)
    model = nn.Sequential(cls(3, track_running_stats=True))
    batches = [torch.randn(8, 3, 4, 4) * (i + 1) for i in range(3)]
    for x in batches:
        model(x)
    model.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = instances.gap(model, batches, call, UNJUDGED, instances.tracking(state.look(model)))
    stored = torch.cat([model(x) for x in batches]).double()
    alone = torch.cat([nn.InstanceNorm2d(3)(x) for x in batches]).double()
    # Over all values, against what varies in the twin.
    expected = (stored - alone).square().mean() / alone.flatten(1).var(0, correction=0).mean()
    assert found.samples == 24
    assert found.relative_square == pytest.approx(float(expected), rel=1e-4)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert model[0].track_running_stats
    facts = probe.observe(model, batches, forward=call, parts={"forward"})
    assert facts.instance_gap == found


def test_without_such_layers_nothing_is_run():
    model = nn.Sequential(nn.InstanceNorm2d(3), nn.BatchNorm2d(3))
    assert instances.tracking(state.look(model)) == []
