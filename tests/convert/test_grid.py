"""Any model, any target: the same numbers where they are promised, or an error of ours and nothing changed."""

from __future__ import annotations

import copy

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from steadynorm import layers
from steadynorm.convert import convert_
from steadynorm.errors import SteadynormError
from tests.convert.test_convert import Doubled, Named, WithActivation, identities
from tests.convert.test_relatives import lived
from tests.layers.test_frozen import AsInTorchvision


def parametrized():
    layer = nn.BatchNorm2d(4)
    parametrize.register_parametrization(layer, "weight", Doubled(), unsafe=True)
    return layer


KINDS = {
    "torch": lambda: nn.BatchNorm2d(4, eps=1e-3, momentum=0.3),
    "ours": lambda: layers.BatchNorm2d(4, activation="relu"),
    "bare": lambda: nn.BatchNorm2d(4, affine=False),
    "no bias": lambda: layers.BatchNorm2d(4, bias=False),
    "untracked": lambda: nn.BatchNorm2d(4, track_running_stats=False),
    "cumulative": lambda: nn.BatchNorm2d(4, momentum=None),
    "frozen in place": lambda: layers.BatchNorm2d(4).freeze_(),
    "no eps": lambda: nn.BatchNorm2d(4, eps=0.0),
    "sync": lambda: layers.SyncBatchNorm(4),
    "torch sync": lambda: nn.SyncBatchNorm(4),
    "ghost": lambda: layers.GhostBatchNorm2d(4, ghost_size=2),
    "renorm": lambda: layers.BatchRenorm2d(4, limits=(3.0, 2.0)),
    "frozen": lambda: layers.FrozenBatchNorm2d(4, eps=1e-2),
    "torchvision": lambda: AsInTorchvision(4, eps=1e-2),
    "domain": lambda: layers.DomainBatchNorm2d(4, num_domains=2),
    "lazy": nn.LazyBatchNorm2d,
    "group": lambda: nn.GroupNorm(2, 4),
    "instance": lambda: layers.InstanceNorm2d(4, affine=True, track_running_stats=True),
    "named": lambda: Named(4),
    "own forward": lambda: WithActivation(4),
    "parametrized": parametrized,
}
TARGETS = ("steadynorm", "torch", "sync", "batch", "frozen", "ghost", "renorm", "group", "layer", "channel_layer")
TARGETS += ("instance", "none")
SAME_IN_EVALUATION = ("steadynorm", "torch", "sync", "batch", "frozen", "ghost", "renorm")


class Model(nn.Module):
    def __init__(self, kinds, is_shared):
        super().__init__()
        self.norms = nn.ModuleList([lived_if_made(KINDS[kind]()) for kind in kinds])
        if is_shared:
            self.norms.append(self.norms[0])

    def forward(self, x):
        for number, norm in enumerate(self.norms):
            extra = (torch.arange(len(x)) % 2,) if isinstance(norm, layers.DomainBatchNorm2d) else ()
            x = norm(x + 0.1 * number, *extra)
        return x


def lived_if_made(norm):
    if isinstance(norm, nn.LazyBatchNorm2d):
        return norm
    return lived(norm)


def state_of(model):
    return {name: t if torch.nn.parameter.is_lazy(t) else t.clone() for name, t in model.state_dict().items()}


cases = st.fixed_dictionaries(
    {
        "kinds": st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=3),
        "is_shared": st.booleans(),
        "to": st.sampled_from(TARGETS),
        "then": st.sampled_from((None, *TARGETS)),
        "training": st.booleans(),
        "has_batches": st.booleans(),
        "method": st.sampled_from(("layer_by_layer", "one_pass", None)),
        "has_optimizer": st.booleans(),
        "dims": st.sampled_from((None, 2)),
    }
)


def options_for(to, case, x):
    options = {"ghost": {"ghost_size": 3}, "renorm": {"limits": (2.0, 1.0)}, "group": {"groups": 2}}.get(to, {})
    if case["dims"] and to in ("batch", "frozen", "ghost", "renorm", "instance"):
        options = {**options, "dims": case["dims"]}
    if case["has_batches"]:
        options = {**options, "batches": x.split(3), "method": case["method"]}
    return options


def convert_or_refuse(model, to, case, x, optimizer):
    """Whether it was converted. If not, nothing has changed."""
    before, state, shared = identities(model), state_of(model), list(model.norms)
    held = None if optimizer is None else [id(p) for p in optimizer.param_groups[0]["params"]]
    y = None if "lazy" in case["kinds"] else copy.deepcopy(model).eval()(x)
    try:
        change = convert_(model, to, **options_for(to, case, x), optimizer=optimizer)
    except SteadynormError:
        assert identities(model) == before
        for name, value in model.state_dict().items():
            assert value is state[name] or torch.equal(value, state[name])
        assert optimizer is None or held == [id(p) for p in optimizer.param_groups[0]["params"]]
        return False
    repr(change)
    assert all(a is b for a, b in zip(model.norms, shared, strict=True))
    assert all(norm.training == model.training for norm in model.norms)
    if optimizer is not None:
        own = {id(parameter) for parameter in model.parameters()}
        assert {id(p) for p in optimizer.param_groups[0]["params"]} <= own
    if y is not None:
        found = copy.deepcopy(model).eval()(x)
        assert found.shape == y.shape
        # What has no running statistics normalises by the batch in evaluation too, and a ghost by its slices.
        if to in SAME_IN_EVALUATION and not (to == "ghost" and "untracked" in case["kinds"]):
            torch.testing.assert_close(found, y, rtol=1e-4, atol=1e-4)
    return True


def run(case):
    torch.manual_seed(0)
    model, x = Model(case["kinds"], case["is_shared"]).train(case["training"]), torch.randn(6, 4, 3, 3)
    lasting = [p for p in model.parameters() if not torch.nn.parameter.is_lazy(p)]
    optimizer = torch.optim.SGD(lasting, 0.1) if case["has_optimizer"] and lasting else None
    before, state = identities(model), state_of(model)
    classes = {type(norm) for norm in model.norms}
    if not convert_or_refuse(model, case["to"], case, x, optimizer):
        return
    if case["then"] is not None:
        options = {**case, "has_optimizer": False}
        convert_or_refuse(model, case["then"], options, x, None)
        return
    # From torch's batch norms there is a way back.
    only_torchs = classes <= {nn.BatchNorm2d} and "parametrized" not in case["kinds"]
    if case["to"] in ("frozen", "ghost", "renorm", "sync") and only_torchs:
        convert_(model, "batch")
        assert identities(model) == before
        for name, value in model.state_dict().items():
            assert torch.equal(value, state[name])


@hypothesis.given(cases)
def test_every_conversion_is_right_or_refused(case):
    run(case)


@pytest.mark.slow
@hypothesis.settings(max_examples=2000)
@hypothesis.given(cases)
def test_two_thousand_conversions_are_right_or_refused(case):
    run(case)
