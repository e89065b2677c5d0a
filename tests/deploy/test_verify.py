"""verify finds what was planted: which output, which sample, which layer."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from steadynorm import deploy
from steadynorm.errors import InputError
from tests.deploy.networks import UNet, resnet, trained

IMAGES = torch.linspace(-2, 2, 4 * 3 * 8 * 8).sin().mul(3).reshape(4, 3, 8, 8)


def test_the_same_is_the_same():
    model = trained(resnet())
    found = deploy.verify(model, copy.deepcopy(model), [IMAGES])
    assert found.agrees
    assert found.first is None
    assert found.worst.absolute == 0


@pytest.mark.parametrize("path", ["0", "3.conv1", "3.bn2", "4.shortcut.1", "7"])
def test_a_planted_difference_is_found_where_it_is(path):
    a = trained(resnet())
    b = copy.deepcopy(a)
    with torch.no_grad():
        b.get_submodule(path).weight.mul_(1.5)
    found = deploy.verify(a, b, [IMAGES[:2], IMAGES[2:]])
    assert not found.agrees
    assert found.first == path
    assert f"they part at {path}" in repr(found)


def test_a_difference_in_one_sample_and_one_output_is_found_there():
    class Two(nn.Module):
        def __init__(self, wrong):
            super().__init__()
            self.wrong = wrong

        def forward(self, x):
            y = x.clone()
            if self.wrong and len(x) == 3:
                y[2, 1] += 1e-2
            return {"same": x, "pair": (x + 1, y)}

    found = deploy.verify(Two(False), Two(True), [torch.ones(2, 4), torch.ones(3, 4)])
    assert [output.name for output in found.outputs] == ["same", "pair.0", "pair.1"]
    assert (found.worst.name, found.worst.batch, found.worst.sample) == ("pair.1", 1, 2)
    assert math.isclose(found.worst.absolute, 1e-2, rel_tol=1e-4)


def test_shapes_infinities_and_integers_are_compared():
    give = {"value": torch.zeros(2)}

    class Giving(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def forward(self, x):
            return give[self.name]

    for value, other, relative in [
        (torch.ones(2), torch.ones(3), math.inf),
        (torch.tensor([1.0, math.nan]), torch.tensor([1.0, math.nan]), 0.0),
        (torch.tensor([1.0, math.inf]), torch.tensor([1.0, math.inf]), 0.0),
        (torch.tensor([1.0, math.inf]), torch.tensor([1.0, 2.0]), math.inf),
        (torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 3, 9]), 0.25),
    ]:
        give.update(a=value, b=other)
        found = deploy.verify(Giving("a"), Giving("b"), [torch.zeros(1)])
        assert found.worst.relative == relative
        assert found.agrees == (relative == 0)


def test_it_leaves_both_as_they_were_and_compares_in_evaluation():
    model = resnet().train()
    other = copy.deepcopy(model)
    assert deploy.verify(model, other, [IMAGES]).agrees
    assert model.training
    assert other.training
    assert int(model[1].num_batches_tracked) == 0


def test_a_folded_model_parts_nowhere_but_where_it_is_meant_to():
    model = trained(UNet())
    change = deploy.fold(model, [IMAGES])
    broken = copy.deepcopy(change.model)
    with torch.no_grad():
        broken.head.weight.add_(0.1)
    found = deploy.verify(model, broken, [IMAGES], apart=change.apart)
    assert found.first == "head"


def test_nothing_to_compare_is_an_error():
    with pytest.raises(InputError, match="no batch"):
        deploy.verify(nn.ReLU(), nn.ReLU(), [])
    with pytest.raises(InputError, match="no tensor"):
        deploy.verify(nn.Identity(), nn.Identity(), [(3,)])
