import random
from dataclasses import dataclass, fields

import numpy as np
import pytest
import torch
from torch import nn

from steadynorm import probe
from steadynorm.recipe import call
from steadynorm.recipes import digits
from tests.doctor import networks
from tests.test_models import assert_same, bits


def snapshot(model):
    return {
        "bits": {name: bits(value) for name, value in model.state_dict().items()},
        "modes": [module.training for module in model.modules()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        "grads": {name: (id(p.grad), bits(p.grad)) for name, p in model.named_parameters()},
        "random": (random.getstate(), tuple(np.random.get_state()[1]), torch.get_rng_state()),
    }


class RaisesAt(nn.BatchNorm2d):
    """Raises at its n-th call."""

    calls, at = 0, -1

    def forward(self, x):
        RaisesAt.calls += 1
        if RaisesAt.calls == RaisesAt.at:
            raise RuntimeError("enough")
        return super().forward(x)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def observe(model, **options):
    return probe.observe(
        model,
        lambda: digits.batches("test", 32, 0),
        train_batches=lambda: digits.batches("train", 32, 0),
        forward=call,
        loss=digits.loss,
        optimizer=sgd,
        samples=64,
        **options,
    )


@pytest.mark.parametrize("at", [-1, 1, 2, 5, 9, 12, 15, 20])
def test_the_model_comes_out_as_it_went_in_wherever_its_forward_raises(at):
    model = networks.convolutional(RaisesAt, bias=True)
    model[4].eval()
    images, labels = next(iter(digits.batches("train", 32, 0)))
    RaisesAt.calls, RaisesAt.at = 0, -1
    digits.loss(model(images), (images, labels)).backward()
    before = snapshot(model)
    RaisesAt.calls, RaisesAt.at = 0, at
    facts = observe(model)
    assert_same(snapshot(model), before)
    assert [f.error for f in facts.failures] == (["RuntimeError"] if at > 0 else [])
    assert all(f.path in ("1", "4") for f in facts.failures)
    assert bool(facts.skipped.keys() - {"checkpoint"}) == (at > 0)


def test_only_the_wanted_parts_are_looked_at():
    facts = observe(networks.convolutional(nn.BatchNorm2d), parts={"state"})
    assert facts.norms.keys() == {"1", "4"}
    assert facts.calls == ()
    facts = observe(networks.convolutional(nn.BatchNorm2d), parts={"drift"})
    assert facts.drift.keys() == {"1", "4"}
    assert facts.training_gap is None


def test_an_error_of_our_own_is_not_blamed_on_the_model(monkeypatch):
    def broken(*_, **__):
        raise TypeError("ours")

    monkeypatch.setattr(probe.isolation, "leaks", broken)
    with pytest.raises(TypeError, match="ours"):
        observe(networks.convolutional(nn.BatchNorm2d))


@dataclass
class Result:
    scores: torch.Tensor
    hidden: tuple


@pytest.mark.parametrize("kind", ["tensor", "tuple", "dict", "dataclass"])
def test_a_model_may_take_and_give_anything(kind):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.dense, self.norm, self.head = nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Linear(16, 10)

        def forward(self, x, scale=None):
            hidden = self.norm(self.dense(x.flatten(1)))
            out = self.head(hidden.relu())
            return {"tensor": out, "tuple": (out, hidden), "dict": {"out": out}, "dataclass": Result(out, (hidden,))}[
                kind
            ]

    def batches():
        for images, labels in digits.batches("test", 32, 0):
            yield ({"x": images, "scale": None} if kind == "dict" else (images,)), labels

    facts = probe.observe(Model(), batches, train_batches=batches, forward=call, optimizer=sgd, samples=64)
    assert facts.failures == ()
    assert facts.skipped == {"checkpoint": "no checkpoint was given"}
    assert [d.producer for d in facts.dead_biases] == ["dense"]
    assert facts.training_gap.changed is not None
    assert facts.training_gap.relative_square > 0


def test_progress_counts_up_to_its_end():
    advances = []
    observe(networks.convolutional(nn.BatchNorm2d), on_progress=lambda done, total: advances.append((done, total)))
    costs = list(probe.COSTS.values())
    assert advances == [(sum(costs[:i]), sum(costs)) for i in range(len(costs) + 1)]


@pytest.mark.parametrize(
    ("parts", "has_train_batches", "expected"),
    [
        (("state",), True, ["state"]),
        (("state", "optimizer"), True, ["state"]),
        (("data",), True, ["state", "data"]),
        (("data",), False, ["state"]),
        (("audit",), False, ["state", "forward", "audit"]),
        (("forward",), True, ["state", "forward", "dead_biases"]),
        (("isolation",), False, ["state", "forward", "recalibrate", "isolation"]),
        (("drift",), False, ["state", "forward", "recalibrate", "drift"]),
        (("training",), True, ["state", "forward", "recalibrate", "training"]),
        (("training",), False, ["state", "forward"]),
    ],
)
def test_progress_counts_what_was_asked_for_and_ends_at_its_end(parts, has_train_batches, expected):
    advances, data = [], list(digits.batches("test", 32, 0))[:2]
    probe.observe(
        networks.convolutional(nn.BatchNorm2d),
        data,
        forward=call,
        train_batches=data if has_train_batches else None,
        parts=parts,
        on_progress=lambda done, total: advances.append((done, total)),
    )
    costs = [probe.COSTS[stage] for stage in expected]
    assert advances == [(sum(costs[:i]), sum(costs)) for i in range(len(costs) + 1)]


def test_progress_ends_at_its_end_where_the_forward_raises():
    advances = []
    observe(nn.Linear(3, 3), on_progress=lambda done, total: advances.append((done, total)))
    assert advances == sorted(advances)
    assert advances[-1] == (sum(probe.COSTS.values()),) * 2


def test_a_model_without_norms():
    facts = observe(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
    assert facts.norms == {}
    assert facts.drift == {}
    assert facts.skipped == {"checkpoint": "no checkpoint was given"}


def test_facts_are_frozen():
    facts = observe(networks.convolutional(nn.BatchNorm2d))
    for entry in fields(facts):
        with pytest.raises(AttributeError):
            setattr(facts, entry.name, None)
