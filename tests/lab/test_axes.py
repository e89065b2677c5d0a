import pytest
import torch
from torch import nn
from torch.nn import functional as F

import steadynorm
from steadynorm.errors import InputError
from steadynorm.lab.axes import ChannelScale, grid, set_norm
from steadynorm.layers.factory import group_count


def convnet():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, eps=0.1), nn.ReLU(), nn.Conv2d(8, 4, 1))


def test_a_grid_has_every_cell_once_and_seed_by_seed():
    cells = grid(norms=["batch", "group", "batch"], batch_sizes=[8, 2, 8], seeds=2)
    assert [(cell.seed, cell.batch_size, cell.norm) for cell in cells] == [
        (seed, size, norm) for seed in (0, 1) for size in (2, 8) for norm in ("batch", "group")
    ]


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"norms": ["bach"]}, "there is no norm 'bach': choose from batch, group, layer, none"),
        ({"batch_sizes": [2, 0]}, "a batch size of 0 was given"),
        ({"seeds": 0}, "0 seeds were given: expected at least 1"),
        ({"norms": []}, "an axis is empty"),
        ({"batch_sizes": []}, "an axis is empty"),
    ],
)
def test_axes_that_make_no_sense_are_refused(axes, message):
    with pytest.raises(InputError, match=message):
        grid(**{"norms": ["batch"], "batch_sizes": [2], "seeds": 1, **axes})


@pytest.mark.parametrize(
    ("channels", "groups"),
    [(1, 1), (3, 1), (7, 1), (8, 2), (16, 4), (48, 12), (64, 16), (96, 24), (256, 32), (250, 25)],
)
def test_groups_divide_the_channels_and_keep_four_in_each(channels, groups):
    assert group_count(channels) == groups


def test_batch_leaves_the_model_as_it_is():
    model = convnet()
    layers = list(model)
    assert set_norm(model, "batch") is model
    assert list(model) == layers


@pytest.mark.parametrize(
    ("norm", "expected"),
    [
        ("group", lambda x, w, b: F.group_norm(x, 2, w, b, 0.1)),
        ("layer", lambda x, w, b: F.layer_norm(x, x.shape[1:], eps=0.1) * w[:, None, None] + b[:, None, None]),
        ("none", lambda x, w, b: x * w[:, None, None] + b[:, None, None]),
    ],
)
def test_the_new_norm_computes_what_its_name_says_with_the_old_parameters(norm, expected):
    model = convnet().double()
    old = model[1]
    nn.init.normal_(old.weight)
    nn.init.normal_(old.bias)
    set_norm(model, norm)
    x = torch.randn(3, 8, 5, 4, dtype=torch.float64)
    torch.testing.assert_close(model[1](x), expected(x, old.weight, old.bias))
    assert model[1].weight is old.weight


@pytest.mark.parametrize(
    ("cls", "shape"), [(nn.BatchNorm1d, (3, 8)), (nn.BatchNorm1d, (3, 8, 5)), (nn.BatchNorm3d, (3, 8, 2, 2, 2))]
)
@pytest.mark.parametrize("norm", ["group", "layer", "none"])
def test_every_rank_of_batch_norm_is_replaced(cls, shape, norm):
    model = set_norm(nn.Sequential(cls(8)), norm)
    assert not isinstance(model[0], nn.modules.batchnorm._BatchNorm)
    assert model(torch.randn(shape)).shape == shape


def test_options_of_the_old_norm_are_kept():
    model = nn.Sequential(nn.BatchNorm2d(8, affine=False), nn.BatchNorm2d(8, dtype=torch.float64, bias=False)).eval()
    for norm in ("group", "none"):
        new = set_norm(nn.Sequential(*model).eval(), norm)
        assert list(new[0].parameters()) == []
        assert new[1].bias is None
        assert new[1].weight.dtype == torch.float64
        assert not new[1].training
        assert new[1](torch.randn(2, 8, 2, 2, dtype=torch.float64)).dtype == torch.float64


def test_a_layer_used_twice_stays_one_layer_and_a_nested_one_is_found():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.BatchNorm1d(8)
            self.inner = nn.ModuleDict({"again": self.first, "other": nn.BatchNorm1d(8)})

    model = set_norm(Twice(), "group")
    assert isinstance(model.first, nn.GroupNorm)
    assert model.inner["again"] is model.first
    assert model.inner["other"] is not model.first


def test_a_model_that_is_one_batch_norm_becomes_the_other_norm():
    assert isinstance(set_norm(nn.BatchNorm1d(8), "group"), nn.GroupNorm)


def test_a_model_without_batch_norm_is_refused():
    with pytest.raises(InputError, match="the model has no batch norm that group norm could take the place of"):
        set_norm(nn.Linear(3, 4), "group")


def test_a_norm_that_does_more_is_refused_with_its_path():
    class NormAct(nn.BatchNorm2d):
        def forward(self, x):
            return F.relu(super().forward(x))

    with pytest.raises(
        InputError, match="1 is a NormAct, which does more than normalize: only 'batch' can be compared"
    ):
        set_norm(nn.Sequential(nn.Identity(), NormAct(8)), "layer")
    with pytest.raises(InputError, match="0 is a GhostBatchNorm2d, which does more than normalize"):
        set_norm(nn.Sequential(steadynorm.GhostBatchNorm2d(8, ghost_size=4)), "layer")


def test_a_lazy_norm_is_refused():
    with pytest.raises(InputError, match="0 is lazy and does not know its channels yet"):
        set_norm(nn.Sequential(nn.LazyBatchNorm2d()), "group")


def test_the_scale_starts_as_the_identity():
    x = torch.randn(2, 4, 3)
    assert torch.equal(ChannelScale(4)(x), x)
