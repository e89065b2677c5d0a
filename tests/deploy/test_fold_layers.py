"""What can take a norm in besides convolutions, what can stand between, and what a norm can be."""

from __future__ import annotations

import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from steadynorm import deploy, layers
from tests.deploy.exact import IMAGES, Net, folded, where
from tests.deploy.networks import trained

ROWS = torch.linspace(-3, 2, 5 * 7 * 6).cos().mul(2).reshape(5, 7, 6)


# Reshapes that keep channels.

RESHAPED = {
    "rows of all samples": lambda m, x: m.bn(m.linear(x).flatten(0, 1)).unflatten(0, (5, 7)),
    "channels second": lambda m, x: m.bn(m.linear(x).transpose(1, 2)).transpose(1, 2),
    "an image and back": lambda m, x: m.bn(m.linear(x).mT.unflatten(2, (7, 1)).flatten(2)),
    "a part of it": lambda m, x: m.bn(m.linear(x)[:, 2:5].transpose(1, 2)),
    "copied where nothing is to be copied": lambda m, x: m.bn(m.linear(x).contiguous().view(-1, 6)),
}


@pytest.mark.parametrize("reshape", RESHAPED)
def test_a_norm_behind_a_reshape_that_keeps_channels_folds(reshape):
    model = Net(RESHAPED[reshape], linear=nn.Linear(6, 6), bn=nn.BatchNorm1d(6))
    assert where(folded(trained(model), ROWS)) == {"bn": "folded into linear"}


MIXED = {
    "channels cut in two": lambda m, x: m.bn(m.linear(x).view(5, 6, 7)),
    "positions for channels": lambda m, x: m.bn(m.linear(x)[:, :6]),
    "turned": lambda m, x: m.bn(m.linear(x)[:, :6].transpose(1, 2).transpose(1, 2)),
    "shifted by one": lambda m, x: m.bn(m.linear(x).flatten()[1:-5].view(-1, 6)),
    "copied": lambda m, x: m.bn(m.linear(x).transpose(1, 2).contiguous()),
    "selected": lambda m, x: m.bn(m.linear(x)[torch.tensor([0, 1])].flatten(0, 1)),
}


@pytest.mark.parametrize("reshape", MIXED)
def test_a_norm_behind_any_other_reshape_is_refused(reshape):
    model = Net(MIXED[reshape], linear=nn.Linear(6, 6), bn=nn.BatchNorm1d(6))
    change = deploy.fold(trained(model), [ROWS])
    assert not change.log
    assert "linear" in change.left["bn"] or "comes from" in change.left["bn"]


def test_a_view_that_wants_the_memory_order_of_the_norm_is_respected():
    def forward(m, x):
        return m.head(m.bn(m.linear(x).transpose(1, 2)).view(5, 42))

    row = {"linear": nn.Linear(6, 6), "bn": nn.BatchNorm1d(6)}
    model = Net(forward, **row, head=nn.Sequential(nn.Linear(42, 3), nn.BatchNorm1d(3)))
    change = folded(trained(model), ROWS)
    assert where(change) == {"head.1": "folded into head.0"}
    assert "in a memory order that its input does not have" in change.left["bn"]


def test_a_norm_before_a_reshape_and_a_linear_folds():
    model = Net(
        lambda m, x: m.linear(m.bn(x.transpose(1, 2)).transpose(1, 2)), linear=nn.Linear(6, 3), bn=nn.BatchNorm1d(6)
    )
    assert where(folded(trained(model), ROWS)) == {"bn": "folded forward into linear"}


def test_a_sample_without_a_batch_folds_where_channels_fit():
    conv, bn = nn.Conv1d(3, 4, 2), nn.BatchNorm1d(4)
    model = trained(Net(lambda m, x: m.bn(m.conv(x).unsqueeze(0)), conv=conv, bn=bn))
    assert where(folded(model, torch.randn(3, 8))) == {"bn": "folded into conv"}


# Layers.


def test_an_embedding_takes_a_norm_in():
    model = trained(nn.Sequential(nn.Embedding(9, 6, padding_idx=0), nn.BatchNorm1d(6)))
    words = torch.arange(9)
    change = deploy.fold(model, [words])
    assert where(change) == {"1": "folded into 0"}
    with torch.no_grad():
        torch.testing.assert_close(change.model(words), model(words))
    model = Net(lambda m, x: m.bn(m.table(x).transpose(1, 2)), table=nn.Embedding(9, 6), bn=nn.BatchNorm1d(6))
    assert where(deploy.fold(trained(model), [words.view(3, 3)])) == {"bn": "folded into table"}


def test_an_embedding_that_changes_when_it_is_called_is_refused():
    model = trained(nn.Sequential(nn.Embedding(9, 6, max_norm=1.0), nn.BatchNorm1d(6)))
    assert "0, not from a layer" in deploy.fold(model, [torch.arange(9)]).left["1"]


@pytest.mark.parametrize("bias", [True, False])
def test_a_bilinear_layer_takes_a_norm_in(bias):
    bilinear = nn.Bilinear(6, 4, 5, bias=bias)
    model = Net(lambda m, x: m.bn(m.pair(x[:, 0], x[:, 1, :4])), pair=bilinear, bn=nn.BatchNorm1d(5))
    assert where(folded(trained(model), ROWS)) == {"bn": "folded into pair"}


def test_a_norm_before_an_embedding_or_a_bilinear_layer_is_refused():
    model = Net(lambda m, x: m.pair(m.bn(x[:, 0]), x[:, 1]), pair=nn.Bilinear(6, 6, 5), bn=nn.BatchNorm1d(6))
    assert not folded(trained(model), ROWS).log


# InputNorm.


def _fitted(x, **options):
    return layers.InputNorm.fit([x], **options)


def test_the_norm_of_the_input_goes_into_the_first_layer():
    x = IMAGES * 3 + 2
    model = nn.Sequential(_fitted(x), nn.Conv2d(3, 4, 3), nn.ReLU())
    assert where(folded(model.eval(), x)) == {"0": "folded forward into 1"}
    model = nn.Sequential(_fitted(ROWS[0]), nn.BatchNorm1d(6), nn.Linear(6, 3))
    assert where(folded(trained(model), ROWS[0])) == dict.fromkeys("01", "folded forward into 2")


def test_the_norm_of_the_input_stays_where_it_must():
    x = IMAGES * 3 + 2
    padded = folded(nn.Sequential(_fitted(x), nn.Conv2d(3, 4, 3, padding=1)).eval(), x)
    assert "pads with zeros" in padded.left["0"]
    assert type(padded.model[0][0]) is nn.BatchNorm2d
    filled = deploy.fold(nn.Sequential(_fitted(x, missing="mean"), nn.Conv2d(3, 4, 3)).eval(), [x])
    assert "fills missing values" in filled.left["0"]
    whole = (x * 20).round().long()
    counts = deploy.fold(nn.Sequential(_fitted(whole), nn.Conv2d(3, 4, 3)).eval(), [whole])
    assert "takes int64 and gives float32" in counts.left["0"]


def test_data_far_from_zero_keeps_its_digits():
    x = IMAGES + 1e4
    model = nn.Sequential(_fitted(x), nn.Conv2d(3, 4, 3)).eval()
    change = folded(model, x)
    assert "deviations from zero: 1 would lose digits" in change.left["0"]
    assert [type(one) for one in change.model[0]] == [nn.BatchNorm2d, nn.BatchNorm2d]
    assert change.difference.outputs[0].relative < 1e-6


# A border of zeros behind the norm.


@pytest.mark.parametrize("padding", [1, "same", (2, 0)])
def test_one_value_for_all_channels_can_be_padded_before_the_norm(padding):
    """Gray images, and colours that are all standardised alike."""
    x = IMAGES[:, :1]
    model = trained(nn.Sequential(nn.BatchNorm2d(1), nn.Dropout(), nn.Conv2d(1, 4, 3, padding=padding, dilation=2)))
    change = folded(model, x)
    assert where(change) == {"0": "folded forward into 2"}
    assert type(change.model[0]) is nn.ConstantPad2d
    alike = nn.Sequential(_fitted(x), nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3))
    assert len(folded(trained(alike), x).log) == 2
    norm = nn.BatchNorm2d(3)
    norm.running_mean.fill_(0.5)
    norm.running_var.fill_(0.25)
    assert where(folded(nn.Sequential(norm, nn.Conv2d(3, 4, 3, padding=padding)).eval(), IMAGES))


def test_another_value_for_each_channel_cannot():
    model = trained(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1)))
    assert "another value for each channel" in folded(model, IMAGES).left["0"]
    with torch.no_grad():
        model[0].weight.zero_()  # no value is taken to 0
    assert "another value for each channel" in folded(model, IMAGES).left["0"]
    turned = Net(lambda m, x: m.conv(m.bn(x).mT), bn=nn.BatchNorm2d(1), conv=nn.Conv2d(1, 4, 3, padding=(1, 0)))
    assert "reshaped behind the norm" in folded(trained(turned), IMAGES[:, :1]).left["bn"]


# Norms in a row.


def test_two_norms_in_a_row_that_no_layer_takes_become_one():
    model = trained(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), nn.Dropout(), layers.FrozenBatchNorm2d(3), nn.ReLU()))
    change = folded(model, IMAGES)
    assert where(change) == {"3": "folded into 1"}
    assert [type(one) for one in change.model] == [nn.ReLU, nn.BatchNorm2d, nn.Dropout, nn.Identity, nn.ReLU]


def test_two_norms_in_a_row_with_a_view_in_between():
    model = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), nn.Flatten(2), nn.BatchNorm1d(3), nn.ReLU())
    change = folded(trained(model), IMAGES)
    assert where(change) == {"3": "folded into 1"}
    assert type(change.model[1]) is nn.BatchNorm2d


def test_three_norms_in_a_row_become_one_norm_or_go_into_a_layer():
    row = [layers.BatchNorm2d(3) for _ in range(3)]
    change = folded(trained(nn.Sequential(nn.ReLU(), *row, nn.ReLU())), IMAGES)
    assert len(change.log) == 2
    assert sum(isinstance(one, nn.BatchNorm2d) for one in change.model) == 1
    assert len(folded(trained(nn.Sequential(nn.ReLU(), *row, nn.Conv2d(3, 4, 3))), IMAGES).log) == 3


# Norms called with a residual.


@pytest.mark.parametrize("activation", [None, "relu"])
def test_a_residual_is_still_added(activation):
    model = Net(
        lambda m, x: m.alone(F.relu(m.bn(m.conv(x), residual=x)), x),
        conv=nn.Conv2d(3, 3, 3, padding=1),
        bn=layers.BatchNorm2d(3, activation=activation),
        alone=layers.BatchNorm2d(3, activation=activation),
    )
    change = folded(trained(model), IMAGES)
    assert where(change) == {"bn": "folded into conv", "alone": "torch.fx.GraphModule"}
    pickle.loads(pickle.dumps(change.model.bn))
    assert all("steadynorm" not in type(one).__module__ for one in change.model.modules())


def test_a_mask_or_a_residual_now_and_then_is_refused():
    norm = layers.BatchNorm2d(3)
    model = Net(lambda m, x: m.bn(m.conv(m.bn(x)), x), conv=nn.Conv2d(3, 3, 1), bn=norm)
    assert "a residual in some of its calls" in folded(trained(model), IMAGES).left["bn"]
    model = Net(lambda m, x: m.bn(m.conv(x), mask=x[:, 0] > 0), conv=nn.Conv2d(3, 3, 1), bn=norm)
    assert "a mask" in deploy.fold(trained(model), [IMAGES]).left["bn"]


# Norms of somebody else's.


class Frozen(nn.Module):
    """As torchvision, detectron2 and Hugging Face have it."""

    def __init__(self, size, eps=1e-3):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(size))
        self.epsilon = eps

    def forward(self, x):
        w, b, mean, var = (t.reshape(1, -1, 1, 1) for t in self.buffers())
        scale = w * (var + self.epsilon).rsqrt()
        return x * scale + (b - mean * scale)


def test_a_norm_that_makes_more_dimensions_takes_no_other_in():
    model = trained(nn.Sequential(nn.Linear(4, 4, bias=False), Frozen(4), nn.BatchNorm2d(4, affine=False)))
    change = deploy.fold(model, [torch.randn(3, 4)])
    assert set(change.left) == {"1", "2"}


class Otherwise(Frozen):
    """The same numbers by other operators."""

    def forward(self, x):
        w, b, mean, var = (t[None, :, None, None] for t in self.buffers())
        return torch.addcmul(b, (x - mean).div_((var + self.epsilon).sqrt()).neg(), -w).add(0)


class Acting(nn.BatchNorm2d):
    """As timm has it: a batch norm with a dropout and an activation behind it."""

    def __init__(self, size, act=nn.ReLU, inplace=False):
        super().__init__(size)
        self.drop, self.act = nn.Identity(), act(inplace=True) if inplace else act()

    def forward(self, x):
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps)
        return self.act(self.drop(x))


class Leaky(nn.BatchNorm2d):
    def forward(self, x):
        return F.leaky_relu(super().forward(x), 0.2)


class Quick(nn.Module):
    """An activation of somebody's own."""

    def forward(self, x):
        return x * torch.sigmoid(1.7 * x)


@pytest.mark.parametrize(
    "norm",
    [
        lambda: Frozen(4),
        lambda: Otherwise(4),
        lambda: Acting(4),
        lambda: Acting(4, inplace=True),
        lambda: Acting(4, Quick),
        lambda: Leaky(4),
    ],
)
def test_norms_of_others_are_known_by_what_they_compute(norm):
    change = folded(trained(nn.Sequential(nn.Conv2d(3, 4, 3), norm())), IMAGES)
    assert where(change) == {"1": "folded into 0"}
    assert type(change.model[1]) in (nn.Identity, nn.ReLU, nn.LeakyReLU, Quick)


class Centred(Frozen):
    def forward(self, x):
        return super().forward(x - x.mean())


class Gated(Frozen):
    def forward(self, x):
        return x * super().forward(x)


class Positional(Frozen):
    def forward(self, x):
        return super().forward(x) + torch.linspace(0, 1, x.shape[-1], dtype=x.dtype)


class Late(Frozen):
    def forward(self, x):
        return super().forward(x.relu())


class Choosy(Frozen):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else x


class Writing(Frozen):
    def forward(self, x):
        return super().forward(x.mul_(2))


class Counting(Frozen):
    """Operators that say one thing the first time, another the next."""

    def forward(self, x):
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(x) * self.calls


@pytest.mark.parametrize("cls", [Centred, Gated, Positional, Late, Choosy, Writing, Counting])
def test_norms_of_others_that_compute_something_else_are_refused(cls):
    change = deploy.fold(trained(nn.Sequential(nn.Conv2d(3, 4, 3), cls(4))), [IMAGES])
    assert not change.log
    assert f"tests.{cls.__name__} is not a batch norm" in change.left["1"]


class Told(Frozen):
    """Its scale is set from outside before each call."""

    def __init__(self, size):
        super().__init__(size)
        self.scale = torch.ones(1)

    def forward(self, x):
        return super().forward(x) * self.scale.to(x.dtype)


@pytest.mark.parametrize("in_place", [True, False])
def test_a_norm_that_is_told_its_scale_is_refused(in_place):
    def forward(m, x):
        if in_place:
            m.bn.scale.copy_(x.mean())
        else:
            m.bn.scale = x.mean().view(1)
        return m.bn(m.conv(x))

    change = deploy.fold(trained(Net(forward, conv=nn.Conv2d(3, 4, 3), bn=Told(4))), [IMAGES, IMAGES * 2])
    assert ("bn.scale is also used elsewhere" if in_place else "with other tensors") in change.left["bn"]


def test_a_norm_with_an_activation_does_not_go_forward():
    change = folded(trained(nn.Sequential(nn.ReLU(), Leaky(3), nn.Conv2d(3, 4, 1))), IMAGES)
    assert "its activation, LeakyReLU, is between it and 2" in change.left["1"]


def test_a_norm_with_rows_for_domains_is_refused():
    norm = layers.DomainBatchNorm2d(4, num_domains=2)
    model = Net(lambda m, x: m.bn(m.conv(x), torch.zeros(2, dtype=torch.long)), conv=nn.Conv2d(3, 4, 1), bn=norm)
    change = deploy.fold(trained(model), [IMAGES])
    assert "several domains" in change.left["bn"]
