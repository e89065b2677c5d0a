"""Layers with a forward pass of their own: refused by name, or made plain as one is told, after a comparison."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from steadynorm import layers
from steadynorm.convert import convert_
from steadynorm.errors import InputError
from tests.convert.test_convert import WithActivation, identities


class Gamma(nn.Module):
    """A batch norm that names its tensors otherwise."""

    def __init__(self, features):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(features))
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))

    def forward(self, x):
        return x * self.gamma[:, None, None]


class Dropping(WithActivation):
    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


class Momentum(nn.BatchNorm2d):
    """Remembers otherwise than it says."""

    def forward(self, x):
        momentum, self.momentum = self.momentum, 0.5
        y = super().forward(x)
        self.momentum = momentum
        return y


class Scaled(nn.BatchNorm2d):
    """Another result in training only."""

    def forward(self, x):
        return super().forward(x) * (2 if self.training else 1)


class Hidden(nn.Module):
    """A frozen batch norm for (N, C, L), which is not recognised by itself."""

    def __init__(self, features):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(features) + 0.5)

    def forward(self, x):
        assert x.dim() == 3
        return (x - self.running_mean[:, None]) * (self.weight * (self.running_var + 1e-3).rsqrt())[
            :, None
        ] + self.bias[:, None]


def relu_after(layer):
    return layers.BatchNorm2d(layer.num_features, layer.eps, layer.momentum, activation="relu")


def model_of(cls):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), cls(4), nn.BatchNorm2d(4))
    model.eval()
    model[1].running_mean.uniform_(-1, 1)
    return model


@pytest.mark.parametrize("to", ["steadynorm", "sync", "frozen", "group"])
def test_a_norm_with_an_activation_becomes_ours_with_one(to):
    model, x = model_of(WithActivation), torch.randn(5, 3, 4, 4)
    y, before, shared = model(x), identities(model), model[1]
    model.append(shared)
    with pytest.raises(InputError, match=r"\n1 is a .*WithActivation, .*own "):
        convert_(model, to)
    weight = model[1].weight
    change = convert_(model, to, as_={WithActivation: relu_after}, batches=[x])
    one = next(one for one in change.log if one.before.endswith("WithActivation"))
    assert one.paths == ("1", "3")
    assert "without act" in one.note
    assert model[1] is model[3] is shared
    assert model[1].activation == "relu"
    assert not model[1].training
    if to != "frozen":
        assert model[1].weight is weight
    if to == "group":
        assert type(model[1]) is layers.GroupNorm
    else:
        torch.testing.assert_close(model[:3](x), y)
        assert change.difference.relative[0] < 1e-6
    assert before.keys() != identities(model).keys()


def test_with_torchs_own_class_where_that_computes_the_same():
    class Named(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x.contiguous())

    model = model_of(Named)
    convert_(model, "torch", as_={Named: lambda layer: nn.BatchNorm2d(layer.num_features)})
    assert type(model[1]) is nn.BatchNorm2d


def test_a_frozen_norm_for_other_inputs():
    model, x = nn.Sequential(Hidden(4)), torch.randn(5, 4, 6)
    y = model(x)
    with pytest.raises(InputError, match=r"the model is a .*|0 is a .*Hidden, which fails on a probe .*as_="):
        convert_(model, "frozen")
    convert_(model, "frozen", as_={Hidden: lambda layer: layers.FrozenBatchNorm1d(len(layer.weight), eps=1e-3)})
    torch.testing.assert_close(model(x), y)


class RMSNormOfLlama(nn.Module):
    """As in transformers: float32 inside, eps under a name of its own."""

    def __init__(self, width, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)
        self.variance_epsilon = eps

    def forward(self, hidden):
        wide = hidden.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(hidden.dtype)


def test_a_norm_of_no_family_of_torch():
    model, x = nn.Sequential(nn.Linear(6, 8), RMSNormOfLlama(8)), torch.randn(3, 5, 6)
    y, weight = model(x), model[1].weight
    with pytest.raises(InputError, match="does not give in evaluation"):
        convert_(model, "steadynorm", as_={RMSNormOfLlama: lambda layer: layers.RMSNorm(8, eps=1e-5)})
    tell = {RMSNormOfLlama: lambda layer: layers.RMSNorm(len(layer.weight), eps=layer.variance_epsilon)}
    change = convert_(model, "steadynorm", as_=tell)
    assert [one.paths for one in change.log] == [("1",)]
    assert type(model[1]) is layers.RMSNorm
    assert model[1].weight is weight
    torch.testing.assert_close(model(x), y)
    convert_(model, "torch")
    assert type(model[1]) is nn.RMSNorm


class FrozenByHand(nn.BatchNorm2d):
    """Its weights are parameters that happen not to train."""

    def __init__(self, features):
        super().__init__(features)
        del self.num_batches_tracked
        self.weight.requires_grad_(False)

    def forward(self, x):
        return nn.functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0, 1e-3)


def test_parameters_become_constants_where_the_plain_layer_has_these():
    model, x = model_of(FrozenByHand), torch.randn(5, 3, 4, 4)
    y = model(x)
    tell = {FrozenByHand: lambda layer: layers.FrozenBatchNorm2d(4, eps=1e-3)}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    change = convert_(model, "frozen", only="1", as_=tell, optimizer=optimizer)
    assert change.log[0].note == "taken out of the optimizer"
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in model.parameters()}
    assert [name for name, _ in model[1].named_parameters()] == []
    torch.testing.assert_close(model.train()[1](model[0](x)), model.eval()[1](model[0](x)))
    torch.testing.assert_close(model(x), y)
    other = nn.Sequential(Hidden(4))
    with pytest.raises(InputError, match="whose weight is a buffer"):
        convert_(other, "steadynorm", as_={Hidden: lambda layer: without_count(nn.BatchNorm1d(4))})


def without_count(layer):
    del layer.num_batches_tracked
    return layer


REFUSED = {
    "eps a little": (
        WithActivation,
        lambda layer: layers.BatchNorm2d(4, 2e-5, activation="relu"),
        "does not give in evaluation",
    ),
    "no activation": (WithActivation, lambda layer: nn.BatchNorm2d(4), "does not give in evaluation what as_= says"),
    "another eps": (
        WithActivation,
        lambda layer: layers.BatchNorm2d(4, 0.1, activation="relu"),
        "does not give in evaluation",
    ),
    "dropout": (Dropping, relu_after, "does not give in training"),
    "scaled": (Scaled, lambda layer: nn.BatchNorm2d(4), "does not give in training"),
    "momentum": (Momentum, lambda layer: nn.BatchNorm2d(4), "does not remember in training"),
    "tensors": (Gamma, lambda layer: nn.BatchNorm2d(4), "tensors gamma .* some would be lost, or are missing"),
    "no norm": (Gamma, lambda layer: nn.ReLU(), r"as_= gave a nn.ReLU"),
    "itself": (WithActivation, lambda layer: WithActivation(4), "as_= gave a .*WithActivation"),
    "nothing": (WithActivation, lambda layer: None, "as_= gave a NoneType"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_one_is_told_and_is_not_so_is_refused(name):
    cls, tell, message = REFUSED[name]
    model = model_of(cls)
    model.train()
    before, state = identities(model), copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    with pytest.raises(InputError, match=rf"(?s)nothing was changed.*\n1 is a .*{cls.__name__}.*{message}"):
        convert_(model, "steadynorm", as_={cls: tell})
    assert identities(model) == before
    assert torch.equal(torch.get_rng_state(), random)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])


def test_a_forward_that_was_set_on_the_layer_is_refused():
    model = model_of(WithActivation)
    model[1].forward = lambda x: x
    with pytest.raises(InputError, match="forward of its own, set on the layer"):
        convert_(model, "steadynorm", as_={WithActivation: relu_after})


def test_the_most_particular_class_counts():
    model = model_of(Dropping)
    told = {WithActivation: lambda layer: pytest.fail("not this one"), Dropping: relu_after}
    with pytest.raises(InputError, match="does not give in training"):
        convert_(model, "steadynorm", as_=told)
