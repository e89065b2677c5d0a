"""What normalises, whether the running statistics move, whether weight and bias train: three switches."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn

from steadynorm.errors import InputError
from steadynorm.layers import BatchNorm1d, BatchNorm2d, LazyBatchNorm1d

NORMALIZE_BY = (None, "batch", "running")
UPDATE_RUNNING = (None, True, False)
TRAIN_AFFINE = (True, False)
COMBINATIONS = list(itertools.product(NORMALIZE_BY, UPDATE_RUNNING, TRAIN_AFFINE))


def layer_with(normalize_by, update_running, train_affine) -> BatchNorm1d:
    """A layer that has seen a batch, so that its running statistics are nobody's default."""
    layer = BatchNorm1d(3, dtype=torch.float64)
    layer(torch.randn(16, 3, dtype=torch.float64) * 2 + 1)
    layer.normalize_by, layer.update_running = normalize_by, update_running
    layer.train_affine = train_affine
    return layer


def rows() -> Tensor:
    return torch.randn(8, 3, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("switches", COMBINATIONS, ids=str)
def test_each_switch_decides_its_own_question_and_no_other(switches, training):
    normalize_by, update_running, train_affine = switches
    layer = layer_with(*switches).train(training)
    mean, var, x = layer.running_mean.clone(), layer.running_var.clone(), rows()
    y = layer(x)
    y.backward(torch.randn_like(y))

    by_batch = training if normalize_by is None else normalize_by == "batch"
    moves = training if update_running is None else update_running
    center, spread = (x.mean(0), x.var(0, correction=0)) if by_batch else (mean, var)
    torch.testing.assert_close(y, (x - center) / (spread + layer.eps).sqrt())
    expected_mean = mean + 0.1 * (x.mean(0) - mean) if moves else mean
    expected_var = var + 0.1 * (x.var(0) - var) if moves else var
    torch.testing.assert_close(layer.running_mean, expected_mean.detach(), rtol=0, atol=0 if not moves else 1e-12)
    torch.testing.assert_close(layer.running_var, expected_var.detach(), rtol=0, atol=0 if not moves else 1e-12)
    assert (layer.weight.grad is not None) == train_affine
    assert (layer.bias.grad is not None) == train_affine
    assert layer.num_batches_tracked.item() == 1 + moves


def through_pickle(layer):
    return pickle.loads(pickle.dumps(layer))


def through_state_dict(layer):
    fresh = BatchNorm1d(3, dtype=torch.float64)
    fresh.load_state_dict(layer.state_dict())
    return fresh


def through_a_file(layer, tmp_path):
    torch.save(nn.Sequential(layer).state_dict(), tmp_path / "weights.pt")
    fresh = nn.Sequential(BatchNorm1d(3, dtype=torch.float64))
    fresh.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    return fresh[0]


@pytest.mark.parametrize("switches", COMBINATIONS, ids=str)
@pytest.mark.parametrize("way", [copy.deepcopy, through_pickle, through_state_dict, through_a_file])
def test_switches_survive(way, switches, tmp_path):
    layer = layer_with(*switches).eval().train()
    back = way(layer, tmp_path) if way is through_a_file else way(layer)
    assert (back.normalize_by, back.update_running, back.train_affine) == switches
    assert [p.requires_grad for p in back.parameters()] == [switches[2]] * 2
    assert repr(back) == repr(layer)


def test_repr_shows_what_is_not_default():
    assert repr(BatchNorm1d(3)) == repr(nn.BatchNorm1d(3))
    assert repr(BatchNorm1d(3).freeze_()).endswith("normalize_by='running', update_running=False, train_affine=False)")


@pytest.mark.parametrize("affine", [True, False])
def test_frozen_means_frozen(affine):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    norm = model[1]

    def steps() -> None:
        for _ in range(5):
            model.train()
            optimizer.zero_grad(set_to_none=False)
            model(torch.randn(8, 1, 6, 6) * 3 + 1).square().mean().backward()
            optimizer.step()

    steps()
    assert norm.freeze_(affine=affine) is norm
    buffers, parameters = ([t.clone() for t in ts] for ts in (norm.buffers(), norm.parameters()))
    steps()
    assert all(torch.equal(a, b) for a, b in zip(buffers, norm.buffers(), strict=True))
    moved = [not torch.equal(a, b) for a, b in zip(parameters, norm.parameters(), strict=True)]
    assert moved == [not affine] * 2
    norm.unfreeze_()
    steps()
    assert not any(torch.equal(a, b) for a, b in zip([*buffers, *parameters], norm.state_dict().values(), strict=False))


def test_frozen_stays_frozen_when_everything_is_told_to_train_again():
    layer = BatchNorm1d(3).freeze_()
    layer.train().requires_grad_(True)
    layer(torch.randn(8, 3, requires_grad=True)).sum().backward()
    assert layer.weight.grad is None
    assert layer.bias.grad is None


def test_unfreeze_is_torch_again():
    layer = BatchNorm1d(3).freeze_().unfreeze_()
    assert repr(layer) == repr(nn.BatchNorm1d(3))
    assert all(parameter.requires_grad for parameter in layer.parameters())


def test_freeze_forgets_a_gradient_from_before():
    layer = BatchNorm1d(3)
    layer(torch.randn(8, 3)).square().sum().backward()
    layer.freeze_()
    assert all(parameter.grad is None for parameter in layer.parameters())


def test_update_bn_leaves_a_frozen_layer_alone_and_the_others_not():
    model = nn.Sequential(BatchNorm1d(3), BatchNorm1d(3))
    data = [torch.randn(16, 3) * 4 + 2 for _ in range(3)]
    for batch in data:
        model(batch)
    model[0].freeze_()
    frozen = [buffer.clone() for buffer in model[0].buffers()]
    live = model[1].running_mean.clone()
    update_bn(data, model)
    assert all(torch.equal(a, b) for a, b in zip(frozen, model[0].buffers(), strict=True))
    assert not torch.equal(live, model[1].running_mean)
    assert model[1].num_batches_tracked.item() == 3
    assert [layer.momentum for layer in model] == [0.1, 0.1]


def test_averaged_models_keep_the_switches():
    averaged = AveragedModel(nn.Sequential(BatchNorm1d(3).freeze_()))
    assert averaged.module[0].update_running is False


def test_a_checkpoint_never_unfreezes_and_names_no_default():
    plain = BatchNorm1d(3)
    assert "steadynorm" not in plain.state_dict()._metadata[""]
    frozen = BatchNorm1d(3).freeze_()
    frozen.load_state_dict(plain.state_dict())
    assert frozen.update_running is False


def test_a_plain_dict_has_no_metadata_and_leaves_the_switches_as_they_are():
    frozen = BatchNorm1d(3).freeze_()
    fresh = BatchNorm1d(3)
    fresh.load_state_dict(dict(frozen.state_dict()))
    assert fresh.switches() == {}
    frozen.load_state_dict(dict(fresh.state_dict()))
    assert frozen.update_running is False


def test_a_frozen_lazy_layer_is_frozen_when_it_gets_its_size():
    lazy = LazyBatchNorm1d().freeze_()
    lazy(torch.randn(8, 3) + 5)
    assert torch.equal(lazy.running_mean, torch.zeros(3))
    assert not lazy.weight.requires_grad


def test_nothing_to_freeze_is_an_error():
    with pytest.raises(InputError, match="no running statistics to freeze: construct it with track_running_stats=True"):
        BatchNorm1d(3, track_running_stats=False).freeze_()
    layer = BatchNorm1d(3, track_running_stats=False)
    layer.normalize_by = "running"
    with pytest.raises(InputError, match="no running statistics to normalise by"):
        layer(torch.randn(4, 3))


def test_reset_parameters_resets_a_frozen_layer_too():
    layer = layer_with("running", False, True)
    layer.reset_running_stats()
    assert layer.running_mean.abs().min() > 0
    layer.reset_parameters()
    assert torch.equal(layer.running_mean, torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("normalize_by", [None, "running"])
def test_running_statistics_may_move_between_a_forward_and_its_backward(normalize_by):
    """The gradients are those of the statistics that normalised, not of what they have become since."""
    layer, x, cotangent = layer_with(normalize_by, None, True), rows(), rows().detach()
    mean, scale = layer.running_mean.clone(), (layer.running_var + layer.eps).rsqrt()
    y = layer.train(normalize_by is not None)(x)
    layer.train()(rows() * 9 + 100)
    y.backward(cotangent)
    torch.testing.assert_close(x.grad, cotangent * scale)
    torch.testing.assert_close(layer.weight.grad, (cotangent * (x.detach() - mean) * scale).sum(0))
