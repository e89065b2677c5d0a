"""Frozen is frozen under model.train(), for whole models, and comes back exactly."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from steadynorm import layers
from steadynorm.convert import convert_
from steadynorm.errors import InputError
from steadynorm.training.freeze import BEFORE, freeze_, is_frozen, unfreeze_


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, channels)
        self.norm = layers.BatchNorm1d(channels, activation="relu")

    def forward(self, x):
        return x + self.norm(self.linear(x))


def network() -> nn.Sequential:
    backbone = nn.Sequential(Block(4), Block(4))
    head = nn.Sequential(nn.Linear(4, 4), layers.BatchNorm1d(4), nn.LayerNorm(4), nn.Linear(4, 2))
    model = nn.Sequential()
    model.add_module("backbone", backbone)
    model.add_module("head", head)
    for _ in range(2):
        model(torch.randn(16, 4) * 2 + 1)
    return model


BACKBONE = ("backbone.0.norm", "backbone.1.norm")
ALL = (*BACKBONE, "head.1")


def bits(model: nn.Module, *paths: str) -> dict[str, bytes]:
    return {
        f"{path}.{name}": value.detach().numpy().tobytes()
        for path in paths
        for name, value in model.get_submodule(path).state_dict().items()
    }


def statistics(model: nn.Module, *paths: str) -> dict[str, bytes]:
    return {name: value for name, value in bits(model, *paths).items() if "running" in name or "tracked" in name}


def train(model: nn.Module, steps: int = 100, per_epoch: int = 5) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    for step in range(steps):
        if step % per_epoch == 0:
            model.train()
        optimizer.zero_grad()
        model(torch.randn(16, 4) * 3 - 1).square().mean().backward()
        optimizer.step()
        if step % per_epoch == per_epoch - 1:
            model.eval()


@pytest.mark.parametrize("affine", [True, False])
def test_100_steps_with_train_each_epoch_leave_the_bits(affine):
    """requires_grad_(False) leaves the statistics moving, and model.train() undoes .eval().

    https://github.com/pytorch/pytorch/issues/86590, https://github.com/pgniewko/gt-pyg/issues/112,
    https://github.com/ultralytics/ultralytics/pull/8753, https://github.com/chemprop/chemprop/pull/952
    """
    model = network()
    assert freeze_(model, "backbone", affine=affine) == BACKBONE
    before, moving = bits(model, *BACKBONE), statistics(model, "head.1")
    still = statistics(model, *BACKBONE)
    train(model)
    assert statistics(model, *BACKBONE) == still
    assert (bits(model, *BACKBONE) == before) == affine
    assert statistics(model, "head.1") != moving


def test_torchs_way_does_not_hold_which_is_why_this_is_here():
    model = network()
    still = statistics(model, *BACKBONE)
    for path in BACKBONE:
        model.get_submodule(path).eval().requires_grad_(False)
    train(model, 10)
    assert statistics(model, *BACKBONE) != still


def through_pickle(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def through_state_dict(model):
    fresh = network()
    fresh.load_state_dict(model.state_dict())
    return fresh


def through_average(model):
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for _ in range(3):
        average.update_parameters(model)
    return average.module


@pytest.mark.parametrize("way", [copy.deepcopy, through_pickle, through_state_dict, through_average])
def test_frozen_stays_frozen(way):
    model = network()
    freeze_(model, "backbone")
    before = bits(model, *BACKBONE)
    other = way(model)
    assert bits(other, *BACKBONE) == before
    train(other, 10)
    assert bits(other, *BACKBONE) == before
    unfreeze_(other, "backbone")
    assert not any(is_frozen(layer) for layer in other.modules())
    train(other, 10)
    assert bits(other, *BACKBONE) != before


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_model_sees_it_freeze_and_thaw():
    torch._dynamo.reset()
    model = network()
    compiled = torch.compile(model, backend="aot_eager")
    train(compiled, 5)
    assert freeze_(compiled, "backbone") == tuple(f"_orig_mod.{path}" for path in BACKBONE)
    before = bits(model, *BACKBONE)
    train(compiled, 5)
    assert bits(model, *BACKBONE) == before
    unfreeze_(compiled)
    train(compiled, 5)
    assert bits(model, *BACKBONE) != before
    torch._dynamo.reset()


def test_under_ddp(group_of_one):
    model = network()
    freeze_(model, "backbone")
    before = bits(model, *BACKBONE)
    ddp = nn.parallel.DistributedDataParallel(model)
    train(ddp, 20)
    assert bits(model, *BACKBONE) == before
    with pytest.raises(InputError, match=r"unfreeze its \.module"):
        unfreeze_(ddp)
    assert is_frozen(model.backbone[0].norm)
    with pytest.raises(InputError, match="inside DistributedDataParallel"):
        freeze_(ddp, "head")
    assert freeze_(ddp, "head", affine=False) == ("module.head.1",)
    still = statistics(model, "head.1")
    train(ddp, 5)
    assert statistics(model, "head.1") == still


def test_under_activation_checkpointing():
    model = network()
    freeze_(model)
    before = bits(model, *ALL)
    x = torch.randn(8, 4, requires_grad=True)
    checkpoint(model, x, use_reentrant=False).square().sum().backward()
    assert bits(model, *ALL) == before


def everything(model: nn.Module) -> dict[str, object]:
    return {
        path: (layer.switches(), [p.requires_grad for p in layer.parameters()], BEFORE in vars(layer))
        for path, layer in model.named_modules()
        if isinstance(layer, layers.BatchNorm1d)
    }


def test_unfreezing_gives_back_what_was_and_leaves_what_the_user_had_frozen():
    model = network()
    model.backbone[0].norm.freeze_()
    model.backbone[1].norm.weight.requires_grad_(False)
    model.head[1].normalize_by = "batch"
    before = everything(model)
    # The first is frozen already, and stays as its user has frozen it.
    assert freeze_(model) == ALL[1:]
    assert freeze_(model) == ()
    assert all(is_frozen(model.get_submodule(path)) for path in ALL)
    assert unfreeze_(model, leave="backbone.0") == ALL[1:]
    assert everything(model) == before


def test_freezing_further_comes_back_to_the_beginning():
    model = network()
    before = everything(model)
    assert freeze_(model, affine=False) == ALL
    assert freeze_(model, "head") == ("head.1",)
    assert [layer.train_affine for layer in model.modules() if is_frozen(layer)] == [True, True, False]
    assert unfreeze_(model) == ALL
    assert everything(model) == before
    assert unfreeze_(model) == ()


def test_thawed_by_hand_and_frozen_again():
    model = network()
    freeze_(model)
    model.head[1].unfreeze_()
    model.head[1].weight.requires_grad_(False)
    freeze_(model)
    unfreeze_(model)
    assert [p.requires_grad for p in model.head[1].parameters()] == [False, True]


def test_layers_are_chosen_by_name_class_depth_and_function():
    def frozen(**choice):
        return freeze_(network(), **choice)

    assert frozen() == ALL
    assert frozen(only="*.norm") == BACKBONE
    assert frozen(only=["backbone.0", "head"]) == ("backbone.0.norm", "head.1")
    assert frozen(leave="head") == BACKBONE
    assert frozen(depth=1) == ALL[:1]
    assert frozen(depth=2) == BACKBONE
    assert frozen(depth=99) == ALL
    assert frozen(only="backbone.1", depth=1) == ("backbone.1.norm",)
    assert frozen(only=lambda path, layer: layer.activation is None) == ("head.1",)
    assert frozen(only=layers.BatchNorm1d) == ALL
    assert frozen(only=lambda path, layer: False) == ()


def test_all_relatives_freeze():
    model = nn.Sequential(
        layers.GhostBatchNorm1d(4, ghost_size=4),
        layers.BatchRenorm1d(4),
        layers.SyncBatchNorm(4),
        layers.BatchNorm1d(4, debias=True, momentum=None),
        layers.FrozenBatchNorm1d(4),
    )
    instance = layers.InstanceNorm1d(4, track_running_stats=True)
    assert freeze_(model) == ("0", "1", "2", "3")
    freeze_(instance)
    still = statistics(model, "0", "1", "2", "3"), bits(instance, "")
    for _ in range(3):
        model.train()(torch.randn(8, 4))
        instance.train()(torch.randn(3, 4, 5))
    assert (statistics(model, "0", "1", "2", "3"), bits(instance, "")) == still


def test_weight_decay_does_not_move_what_is_frozen():
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    model(torch.randn(8, 4)).square().sum().backward()
    freeze_(model)  # after a gradient was there
    before = bits(model, *ALL)
    optimizer.step()
    assert bits(model, *ALL) == before


def test_layers_of_torch_are_refused_by_name_until_they_are_converted():
    model = network()
    model.head.append(nn.BatchNorm1d(2))
    before = everything(model)
    with pytest.raises(InputError, match=r"got head.4 of torch.nn \(BatchNorm1d\).*convert_"):
        freeze_(model)
    assert everything(model) == before
    assert freeze_(model, leave="head.4") == ALL
    unfreeze_(model)
    convert_(model, "steadynorm")
    assert freeze_(model) == (*ALL, "head.4")


def shares_its_weight() -> nn.Sequential:
    model = network()
    model.head[2].weight = model.head[1].weight
    return model


def parametrized() -> nn.Sequential:
    model = network()
    nn.utils.parametrize.register_parametrization(model.head[1], "weight", nn.Identity())
    return model


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (network, {"only": "backbon"}, "got 'backbon', expected the name .*'backbone.0.norm'"),
        (network, {"only": "head.2"}, "only.*got 'head.2', expected the name of a normalization with running"),
        (network, {"depth": 0}, "depth=0"),
        (network, {"depth": 0.5}, "depth=0.5"),
        (network, {"leave": "nothing"}, "leave.*got 'nothing'"),
        (network, {"only": 3.5}, "3.5"),
        (lambda: nn.Linear(2, 2), {}, "without any normalization"),
        (shares_its_weight, {}, "head.1, which shares a parameter with head.2"),
        (parametrized, {}, "head.1 with a parametrized weight"),
    ],
)
def test_what_cannot_be_frozen_is_refused_and_nothing_changed(make, options, message):
    model = make()
    before = everything(model)
    with pytest.raises(InputError, match=message):
        freeze_(model, **options)
    assert everything(model) == before


@pytest.mark.parametrize("make", [shares_its_weight, parametrized])
def test_statistics_alone_freeze_where_weights_cannot(make):
    model = make()
    assert len(freeze_(model, affine=False)) == 3
    still = statistics(model, *BACKBONE)
    train(model, 5)
    assert statistics(model, *BACKBONE) == still
