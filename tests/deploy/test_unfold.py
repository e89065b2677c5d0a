"""unfold gives the norms back: bit for bit, or, after training, the same function."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from steadynorm import deploy, layers
from steadynorm.errors import DifferenceError, InputError
from tests.deploy.exact import IMAGES, Net
from tests.deploy.networks import Dense, UNet, mobilenet, resnet, trained
from tests.deploy.test_fold_layers import Acting, Frozen

ROWS = torch.linspace(-3, 2, 35 * 6).cos().mul(2).reshape(35, 6)


def outputs(model, x):
    with torch.no_grad():
        y = model(x)
    return y["mask"] if isinstance(y, dict) else y


def moved(model, share=1.0):
    """Every trainable parameter somewhere else, as after training; or a share of them."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                step = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
                chosen = torch.rand(parameter.shape, generator=generator) < share
                parameter.add_(torch.where(chosen, 0.05 * step, 0).to(parameter.dtype))


CASES = {
    "resnet": (resnet, IMAGES),
    "u-net": (UNet, IMAGES),
    "mobilenet": (mobilenet, torch.cat([IMAGES, IMAGES[:, :1]], 1)),
    "dense": (Dense, IMAGES),
    "frozen": (lambda: resnet(layers.FrozenBatchNorm2d), IMAGES),
    "somebody else's": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), Frozen(4), nn.Conv2d(4, 4, 1), Acting(4)), IMAGES),
    "both sides": (
        lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), *(nn.BatchNorm2d(4) for _ in "12")),
        IMAGES,
    ),
    "grouped, before": (lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 6, 2, groups=3, bias=False)), IMAGES),
    "border": (lambda: nn.Sequential(nn.BatchNorm2d(1), nn.Conv2d(1, 4, 3, padding=1)), IMAGES[:, :1]),
    "no bias in either": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, affine=False)),
        IMAGES,
    ),
    "activation": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), layers.BatchNorm2d(4, activation="relu")), IMAGES),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(3, 6, 3, groups=3), nn.BatchNorm2d(6)), IMAGES),
    "rows": (
        lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(), nn.Linear(5, 3, bias=False)),
        ROWS,
    ),
    "input": (lambda: nn.Sequential(layers.InputNorm.fit([ROWS]), nn.Linear(6, 5)), ROWS),
    "input in between": (
        lambda: nn.Sequential(nn.Linear(6, 6, bias=False), layers.InputNorm.fit([ROWS]), nn.ReLU()),
        ROWS,
    ),
    "words": (lambda: nn.Sequential(nn.Embedding(9, 6), nn.BatchNorm1d(6)), torch.arange(9)),
    "in a row": (lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), nn.BatchNorm2d(3)), IMAGES),
    "residual": (
        lambda: Net(lambda m, x: m.bn(m.conv(x), x), conv=nn.Conv2d(3, 3, 1), bn=layers.BatchNorm2d(3)),
        IMAGES,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_was_not_trained_comes_back_bit_for_bit(case):
    make, x = CASES[case]
    model = trained(make())
    change = deploy.fold(model, [x])
    assert any("folded" in one.after for one in change.log)
    kept = copy.deepcopy(change.model.state_dict())
    found = deploy.unfold(change, [x]).model
    assert all(torch.equal(value, kept[name]) for name, value in change.model.state_dict().items())
    expected, state = model.state_dict(), found.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in state.items())
    assert torch.equal(outputs(found, x), outputs(model, x))
    assert [type(one) for one in found.modules()] == [type(one) for one in model.modules()]


# What takes a second, or what the others show too.
LONG = {"resnet", "u-net", "mobilenet", "dense"}


@pytest.mark.parametrize("share", [1.0, pytest.param(0.3, marks=pytest.mark.slow)], ids=["all", "some"])
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=pytest.mark.slow) if case in LONG else case for case in CASES if case != "in a row"],
)
def test_what_was_trained_computes_the_same(case, share):
    make, x = CASES[case]
    model = trained(make().double()).double()
    x = x.double() if x.is_floating_point() else x
    change = deploy.fold(model, [x])
    moved(change.model, share)
    back = deploy.unfold(change, [x])
    expected, y = outputs(change.model, x), outputs(back.model, x)
    assert float((expected - outputs(model, x)).abs().max()) > 1e-3
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12 * float(expected.abs().max()))
    norms = {path: one for path, one in model.named_modules() if getattr(one, "running_var", None) is not None}
    for path, norm in norms.items():
        assert type(back.model.get_submodule(path)) is type(norm)
        assert torch.equal(back.model.get_submodule(path).running_mean, norm.running_mean)
        assert torch.equal(back.model.get_submodule(path).running_var, norm.running_var)
    noted = [one.note for one in back.log if "has a bias now" in one.note]
    assert (back.model.state_dict().keys() == model.state_dict().keys()) == (not noted)


def test_a_training_loop_over_the_folded_model_goes_back_into_the_norms():
    """The same gradient descent on folded weights; the loss of the unfolded model is that of the folded one."""
    model = trained(resnet(layers.FrozenBatchNorm2d))
    change = deploy.fold(model, [IMAGES])
    folded = change.model.train()
    assert not [one for one in folded.modules() if getattr(one, "running_var", None) is not None]
    optimizer = torch.optim.SGD(folded.parameters(), lr=1e-3)
    target = torch.tensor([1, 3])
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = F.cross_entropy(folded(IMAGES), target)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    back = deploy.unfold(change, [IMAGES])
    assert back.difference.worst.relative < 1e-5
    assert folded.training
    assert back.model.training
    loss = F.cross_entropy(outputs(back.model, IMAGES), target)
    assert float(loss) == pytest.approx(float(F.cross_entropy(outputs(folded, IMAGES), target)), rel=1e-5)


@pytest.mark.parametrize("share", [1.0, 0.3])
@pytest.mark.parametrize("side", ["after", "before"])
def test_channels_of_scale_0_come_back(side, share):
    row = [nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)]
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), *(row if side == "after" else row[::-1]))).double()
    norm = model[3] if side == "after" else model[2]
    with torch.no_grad():
        norm.weight[1:3] = 0
    x = IMAGES.double()
    change = deploy.fold(model, [x])
    same = deploy.unfold(change, [x]).model
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in same.state_dict().items())
    moved(change.model, share)
    back = deploy.unfold(change, [x]).model
    expected = outputs(change.model, x)
    torch.testing.assert_close(outputs(back, x), expected, rtol=0, atol=1e-12 * float(expected.abs().max()))


def test_only_the_layer_that_was_trained_changes():
    model = trained(resnet())
    change = deploy.fold(model, [IMAGES])
    with torch.no_grad():
        change.model[3].conv2.weight[1, 2] += 0.1
    back = deploy.unfold(change, [IMAGES]).model.state_dict()
    differing = {name for name, value in model.state_dict().items() if not torch.equal(value, back[name])}
    assert differing <= {"3.conv2.weight", "3.bn2.bias"}
    where = (back["3.conv2.weight"] != model.state_dict()["3.conv2.weight"]).flatten(2).any(2)
    assert where.nonzero().tolist() == [[1, 2]]


def test_what_cannot_be_taken_back_is_one_sentence():
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    change = deploy.fold(model, [IMAGES])
    with pytest.raises(InputError, match="expected what fold returned, got Sequential"):
        deploy.unfold(model, [IMAGES])
    with pytest.raises(InputError, match="no batch"):
        deploy.unfold(change, [])
    change.model[0] = nn.Conv2d(3, 5, 3)
    with pytest.raises(InputError, match="0 is not the layer that fold left there"):
        deploy.unfold(change, [IMAGES])
    change = deploy.fold(model, [IMAGES])
    change.model.double()
    with pytest.raises(InputError, match="another class, shape or dtype"):
        deploy.unfold(change, [IMAGES.double()])
    del change.model[0]
    with pytest.raises(InputError, match="0 is not the layer"):
        deploy.unfold(change, [IMAGES])
    two = deploy.fold(trained(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), nn.BatchNorm2d(3))), [IMAGES])
    with torch.no_grad():
        two.model[1].bias += 1
    with pytest.raises(InputError, match="1, which was more than one norm, was changed"):
        deploy.unfold(two, [IMAGES])


def test_an_unfold_that_forgets_the_shift_is_caught(monkeypatch):
    from steadynorm.deploy.affine import Affine

    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    change = deploy.fold(model, [IMAGES])
    moved(change.model)
    monkeypatch.setattr(Affine, "inverse", lambda self: Affine(1 / self.scale, torch.zeros_like(self.shift)))
    with pytest.raises(DifferenceError, match=r"relative [0-9.e+-]+.*they part at 1"):
        deploy.unfold(change, [IMAGES])
