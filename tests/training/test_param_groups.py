"""Every parameter once: weights with decay, norms and biases without, by what they are and not by how they look."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import weight_norm as old_weight_norm

from steadynorm import layers
from steadynorm.errors import InputError
from steadynorm.training.freeze import freeze_
from steadynorm.training.param_groups import param_groups


class LlamaRMSNorm(nn.Module):
    """A normalization that is a subclass of nothing, as in transformers."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        return self.weight * x * x.square().mean(-1, keepdim=True).add(1e-6).rsqrt()


class AdaptiveNorm(nn.Module):
    """Called a norm, and holds a matrix."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.ones(size, size))
        self.project = nn.Linear(size, size)


class Transformer(nn.Module):
    """A language model with tied embeddings, as GPT-2 has them, and parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.position = nn.Parameter(torch.zeros(1, 5, 8))
        self.attention = nn.MultiheadAttention(8, 2, add_bias_kv=True)
        self.recurrent = nn.LSTM(8, 8)
        self.norms = nn.ModuleList([nn.LayerNorm(8), LlamaRMSNorm(8), layers.RMSNorm(8), AdaptiveNorm(8)])
        self.scale = nn.Parameter(torch.ones(8))
        self.act = nn.PReLU(8)
        self.head = nn.Linear(8, 11)
        self.head.weight = self.embed.weight


def names(model: nn.Module, groups: list[dict]) -> tuple[set[str], set[str]]:
    """The names with decay and without, after a check that the groups are a partition."""
    by_id = {id(p): name for name, p in model.named_parameters()}
    listed = [id(p) for group in groups for p in group["params"]]
    assert sorted(listed) == sorted(by_id), "every parameter, and none twice"
    sides = {group["weight_decay"] == 0: {by_id[id(p)] for p in group["params"]} for group in groups}
    return sides.get(False, set()), sides.get(True, set())


def test_a_transformer():
    """https://github.com/huggingface/transformers/issues/4360"""
    model = Transformer()
    decay, without = names(model, param_groups(model, 0.1))
    assert decay == {
        "embed.weight",
        "position",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "recurrent.weight_ih_l0",
        "recurrent.weight_hh_l0",
        "norms.3.table",
        "norms.3.project.weight",
        "scale",
    }
    assert without == {
        "attention.in_proj_bias",
        "attention.out_proj.bias",
        "attention.bias_k",
        "attention.bias_v",
        "recurrent.bias_ih_l0",
        "recurrent.bias_hh_l0",
        "norms.0.weight",
        "norms.0.bias",
        "norms.1.weight",
        "norms.2.weight",
        "norms.3.project.bias",
        "act.weight",
        "head.bias",
    }


NORMS = {
    "BatchNorm2d": lambda: nn.BatchNorm2d(4),
    "SyncBatchNorm": lambda: nn.SyncBatchNorm(4),
    "GroupNorm": lambda: nn.GroupNorm(2, 4),
    "InstanceNorm": lambda: nn.InstanceNorm2d(4, affine=True),
    "our BatchNorm2d": lambda: layers.BatchNorm2d(4),
    "our SyncBatchNorm": lambda: layers.SyncBatchNorm(4),
    "domain": lambda: layers.DomainBatchNorm2d(4, num_domains=3, shared_affine=False),
    "step": lambda: layers.StepBatchNorm1d(4, steps=3),
    "layer of several dimensions": lambda: nn.LayerNorm((3, 4)),
    "channel layer": lambda: layers.ChannelLayerNorm(4),
}


@pytest.mark.parametrize("kind", NORMS)
def test_every_normalization_is_without_whatever_its_shape(kind):
    """detectron2's and minGPT's lists of types miss those that they do not name.

    https://github.com/facebookresearch/detectron2/issues/737
    """
    model = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), NORMS[kind]())
    decay, without = names(model, param_groups(model, 0.1))
    assert decay == {"0.weight"}
    assert without == {"1.weight", "1.bias"}


WEIGHT_NORMS = {
    "ours": (layers.weight_norm, "parametrizations.weight.original0", "parametrizations.weight.original1"),
    "torch": (parametrizations.weight_norm, "parametrizations.weight.original0", "parametrizations.weight.original1"),
    "old": (old_weight_norm, "weight_g", "weight_v"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", WEIGHT_NORMS)
def test_the_lengths_of_weight_norm_are_without_and_the_directions_with(kind):
    put, lengths, directions = WEIGHT_NORMS[kind]
    model = nn.Sequential(put(nn.Conv2d(3, 4, 3)))
    decay, without = names(model, param_groups(model, 0.1))
    assert decay == {f"0.{directions}"}
    assert without == {f"0.{lengths}", "0.bias"}


def test_other_parametrizations():
    standardized = layers.weight_standardization(nn.Linear(4, 4), scaled=True)
    spectral = layers.spectral_norm(nn.Linear(4, 4))
    biased = parametrize.register_parametrization(nn.Linear(4, 4), "bias", nn.Identity())
    scaled = parametrize.register_parametrization(nn.BatchNorm1d(4), "weight", nn.Identity())
    model = nn.ModuleList([standardized, spectral, biased, scaled])
    decay, without = names(model, param_groups(model, 0.1))
    assert decay == {"0.parametrizations.weight.original", "1.parametrizations.weight.original", "2.weight"}
    assert without == {
        "0.bias",
        "0.parametrizations.weight.0.gain",
        "1.bias",
        "2.parametrizations.bias.original",
        "3.bias",
        "3.parametrizations.weight.original",
    }


def test_a_tied_parameter_is_without_where_any_of_its_places_says_so():
    model = nn.ModuleList([nn.Linear(4, 4), nn.LayerNorm(4), nn.Module()])
    model[2].own = model[1].weight
    _, without = names(model, param_groups(model, 0.1))
    assert without == {"0.bias", "1.weight", "1.bias"}


def test_more_without_by_name_class_and_function():
    model = Transformer()

    def more(no_decay):
        plain = names(model, param_groups(model, 0.1))[1]
        return names(model, param_groups(model, 0.1, no_decay=no_decay))[1] - plain

    assert more("position") == {"position"}
    assert more(["position", "sc*"]) == {"position", "scale"}
    assert more("recurrent") == {"recurrent.weight_ih_l0", "recurrent.weight_hh_l0"}
    assert more(nn.Embedding) == {"embed.weight"}
    assert more("head.weight") == {"embed.weight"}, "a tied parameter has two names"
    assert more([nn.Embedding, "scale"]) == {"embed.weight", "scale"}
    assert more(lambda name, parameter: parameter.dim() < 2) == {"scale"}
    assert more(lambda name, parameter: False) == set()
    with pytest.raises(InputError, match=r"no_decay=\) got 'positon', expected the name .*'position'"):
        more("positon")
    with pytest.raises(InputError, match=r"no_decay=\) got Conv2d"):
        more(nn.Conv2d)


def test_parameters_that_do_not_train_yet_are_there_for_later():
    model = nn.Sequential(nn.Linear(4, 4), layers.BatchNorm1d(4))
    model[0].requires_grad_(False)
    freeze_(model)
    groups = param_groups(model, 0.1)
    assert [len(group["params"]) for group in groups] == [1, 3]
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    model(torch.randn(5, 4, requires_grad=True)).sum().backward()
    optimizer.step()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), "an optimizer does nothing without a gradient, decay included"


def test_an_optimizer_decays_what_it_should():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    optimizer = torch.optim.SGD(param_groups(model, 0.5), lr=1.0)
    before = copy.deepcopy(model.state_dict())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name] * (0.5 if name == "0.weight" else 1.0))


def test_a_wrapped_model_and_empty_groups():
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    assert [group["weight_decay"] for group in param_groups(model, 0.1)] == [0.1]
    assert [group["weight_decay"] for group in param_groups(nn.LayerNorm(2), 0.1)] == [0.0]
    compiled = torch.compile(Transformer(), backend="eager")
    assert len(param_groups(compiled, 0.1, no_decay="position")[0]["params"]) == 8


@pytest.mark.parametrize(
    ("model", "decay", "message"),
    [
        (nn.Linear(2, 2), -0.1, "weight_decay=-0.1"),
        (nn.Linear(2, 2), float("nan"), "weight_decay=nan"),
        (nn.Linear(2, 2), None, "weight_decay=None"),
        (nn.ReLU(), 0.1, "without parameters"),
        (nn.Sequential(layers.LazyBatchNorm1d()), 0.1, "0.weight, which has no values yet"),
    ],
)
def test_what_cannot_be_grouped_is_said(model, decay, message):
    with pytest.raises(InputError, match=message):
        param_groups(model, decay)
