import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import steadynorm
from steadynorm import models


class TwoWays(nn.Module):
    """Buffers that alias, a plain tensor, a counter, a list, a shared layer, a tied parameter."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(3)
        self.again = self.bn
        self.conv = nn.Conv2d(3, 3, 1)
        self.tied = nn.Conv2d(3, 3, 1)
        self.tied.weight = self.conv.weight
        self.register_buffer("expanded", torch.zeros(1, 3).expand(4, 3))
        self.register_buffer("part", torch.arange(6.0)[2:4])
        self.plain = torch.ones(2)
        self.seen = []
        self.steps = 0

    def forward(self, x, fail=False):
        self.steps += 1
        self.seen.append(x.shape)
        self.plain += 1
        self.part.mul_(-1)
        y = self.bn(self.conv(x))
        self.conv.weight.data.add_(1)
        self.bn.momentum = 0.9
        self.extra = nn.Linear(2, 2)
        self.conv.bias.requires_grad_(False)
        self.bn.running_var = torch.full((3,), 7.0)
        if fail:
            raise RuntimeError("in the middle")
        return y + random.random() + np.random.rand() + torch.rand(())


def bits(tensor):
    """The bytes of a tensor, so that NaN equals NaN and 0 is not −0."""
    return tensor.detach().contiguous().view(torch.uint8).clone() if tensor.dim() else tensor.detach().clone()


def state_of(model):
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers()), "plain": model.plain}
    grads = {name: p.grad for name, p in model.named_parameters()}
    return {
        "bits": {name: bits(t) for name, t in tensors.items()},
        "objects": {name: id(t) for name, t in tensors.items()},
        "places": {name: t.data_ptr() for name, t in tensors.items()},
        "versions": {name: p._version for name, p in model.named_parameters()},
        "grads": {name: (id(g), bits(g)) for name, g in grads.items() if g is not None},
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "modes": [m.training for m in model.modules()],
        "hooks": [dict(m._forward_hooks) for m in model.modules()],
        "modules": [(name, id(m)) for name, m in model.named_modules()],
        "plain": (model.steps, list(model.seen), id(model.seen), model.bn.momentum),
        "random": (random.getstate(), tuple(np.random.get_state()[1]), torch.get_rng_state()),
    }


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        if key in ("bits", "grads"):
            assert a[key].keys() == b[key].keys()
            for name in a[key]:
                for x, y in zip(
                    *(v if isinstance(v, tuple) else (v,) for v in (a[key][name], b[key][name])), strict=True
                ):
                    assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y, (key, name)
        elif key == "random":
            assert a[key][:2] == b[key][:2]
            assert torch.equal(a[key][2], b[key][2])
        else:
            assert a[key] == b[key], key


@pytest.fixture
def model():
    model = TwoWays()
    model.bn.running_mean[0] = torch.nan
    model.bn.running_mean[1] = -0.0
    model.bn.eval()
    model.bn(model.conv(torch.randn(2, 3, 4, 4))).sum().backward()
    return model


@pytest.mark.parametrize("fail", [False, True])
def test_everything_is_as_it_was_also_when_the_forward_raises_in_the_middle(model, fail):
    before = state_of(model)
    hook = model.conv.register_forward_hook(lambda *_: None)
    hook.remove()
    raised = False
    try:
        with models.undisturbed(model):
            model.train()
            handle = model.conv.register_forward_hook(lambda *_: None)
            model.register_forward_pre_hook(lambda *_: None)
            model(torch.randn(4, 3, 4, 4), fail=fail).sum().backward()
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            model.bn.weight.grad.zero_()
    except RuntimeError as error:
        raised = "in the middle" in str(error)
    assert raised == fail
    assert_same(state_of(model), before)
    handle.remove()  # a handle of a hook that is gone already does no harm


def test_a_graph_from_before_can_still_be_run_backward(model):
    loss = model.conv(torch.randn(2, 3, 4, 4)).square().sum()
    with models.undisturbed(model):
        model(torch.randn(2, 3, 4, 4))
    loss.backward()


def test_aliases_hold(model):
    alias = model.bn.running_mean
    with models.undisturbed(model):
        model.bn.running_mean = torch.zeros(3)
        alias.add_(1)
    assert model.bn.running_mean is alias
    assert alias[1] == 0


def test_a_module_that_is_swapped_or_deleted_comes_back(model):
    conv = model.conv
    with models.undisturbed(model):
        model.conv = nn.Identity()
        del model.tied
    assert model.conv is conv
    assert isinstance(model.tied, nn.Conv2d)


def test_a_model_that_is_moved_to_another_dtype_comes_back(model):
    before = state_of(model)
    with models.undisturbed(model):
        model.double()
        assert model.conv.weight.dtype == torch.float64
    assert_same(state_of(model), before)


def test_a_lazy_layer_stays_lazy():
    model = nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d())
    with models.undisturbed(model):
        model(torch.randn(4, 2))
        assert type(model[0]) is nn.Linear
    assert type(model[0]) is nn.LazyLinear
    assert models.unmade_parts(model)[:2] == ["0.weight", "0.bias"]
    model(torch.randn(4, 5))
    assert model[0].in_features == 5
    assert models.unmade_parts(model) == []


def test_generators_are_put_back():
    generator = torch.Generator().manual_seed(1)
    expected = generator.get_state()
    with models.undisturbed(nn.Linear(1, 1), generator):
        torch.rand(3, generator=generator)
    assert torch.equal(generator.get_state(), expected)


def test_remember_can_put_back_more_than_once(model):
    put_back = models.remember(model)
    before = bits(model.conv.weight)
    for _ in range(2):
        model.conv.weight.data.mul_(3)
        put_back()
        assert torch.equal(bits(model.conv.weight), before)


class Wrapped(nn.BatchNorm2d):
    """As other libraries have it: a subclass with layers of its own."""

    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, x):
        return self.act(super().forward(x))


class Constant(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(2))
        self.register_buffer("running_var", torch.ones(2))


@pytest.mark.parametrize(
    ("layer", "kind"),
    [
        (nn.BatchNorm1d(2), "batch"),
        (Wrapped(2), "batch"),
        (steadynorm.BatchNorm2d(2), "batch"),
        (nn.SyncBatchNorm(2), "sync"),
        (nn.InstanceNorm2d(2, track_running_stats=True), "instance"),
        (nn.GroupNorm(1, 2), "group"),
        (nn.LayerNorm(2), "layer"),
        (nn.RMSNorm(2), "rms"),
        (Constant(), "frozen"),
        (steadynorm.FrozenBatchNorm2d(2), "frozen"),
        (steadynorm.GhostBatchNorm2d(2, ghost_size=2), "batch"),
        (steadynorm.DomainBatchNorm2d(2, num_domains=3), None),
        (steadynorm.StepBatchNorm1d(2, steps=3), None),
        (nn.Linear(2, 2), None),
        (nn.LocalResponseNorm(2), None),
    ],
)
def test_kinds(layer, kind):
    assert models.norm_kind(layer) == kind


def test_norms_are_named_once_by_their_first_path(model):
    assert list(models.norms(model)) == ["bn"]
    assert list(models.norms(nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.LayerNorm(1))))) == ["1.0"]
    assert list(models.norms(nn.BatchNorm2d(2))) == [""]


def test_which_statistics_a_batch_norm_uses():
    layer = nn.BatchNorm2d(2)
    assert models.uses_batch_statistics(layer.train())
    assert not models.uses_batch_statistics(layer.eval())
    assert models.uses_batch_statistics(nn.BatchNorm2d(2, track_running_stats=False).eval())
    assert not models.uses_batch_statistics(steadynorm.BatchNorm2d(2).freeze_().train())
    assert not models.uses_batch_statistics(nn.InstanceNorm2d(2))


def test_replace_reaches_every_path(model):
    new = nn.GroupNorm(1, 3)
    assert models.replace(model, model.bn, new) is model
    assert model.bn is new
    assert model.again is new
    assert models.replace(new, new, model) is model


def test_replace_in_a_sequence():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.BatchNorm1d(2)))
    models.replace(model, model[1][0], nn.LayerNorm(2))
    assert isinstance(model[1][0], nn.LayerNorm)
    assert F.relu(model(torch.randn(3, 2))).shape == (3, 2)
