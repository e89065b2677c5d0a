"""fold is exact or it says why not; held to the unfolded model in float64, which shares no code with it."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import steadynorm
from steadynorm import deploy, layers
from steadynorm.deploy import units
from steadynorm.errors import DifferenceError, InputError
from tests.deploy.exact import IMAGES, Net, folded, where
from tests.deploy.networks import Choosing, Dense, UNet, mobilenet, resnet, trained

# The five silent wrong answers of other tools, each exact or refused.


def test_a_conv_that_is_used_twice_is_refused():
    """https://github.com/pytorch/pytorch/issues/104593, https://github.com/pytorch/pytorch/issues/197539"""
    model = Net(
        lambda m, x: m.bn2(m.conv(m.bn1(m.conv(x)))),
        conv=nn.Conv2d(3, 3, 1),
        bn1=nn.BatchNorm2d(3),
        bn2=nn.BatchNorm2d(3),
    )
    change = folded(trained(model), IMAGES)
    assert not change.log
    assert "the output of conv is also used elsewhere: a call of bn2" in change.left["bn1"]


def test_a_conv_and_its_norm_that_are_always_used_together_fold():
    model = Net(lambda m, x: m.bn(m.conv(F.relu(m.bn(m.conv(x))))), conv=nn.Conv2d(3, 3, 1), bn=nn.BatchNorm2d(3))
    assert where(folded(trained(model), IMAGES)) == {"bn": "folded into conv"}


def test_a_linear_before_a_norm_over_positions_is_refused():
    """(N, L, C) with L = C: the norm takes L for channels."""
    model = trained(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)))
    change = folded(model, torch.randn(4, 6, 6))
    assert "the norm takes dimension 1 for channels, and the layer another" in change.left["1"]
    assert where(folded(model, torch.randn(4, 6))) == {"1": "folded into 0"}


def test_no_fold_across_a_relu():
    model = Net(lambda m, x: m.bn(F.relu(m.conv(x))), conv=nn.Conv2d(3, 4, 3), bn=nn.BatchNorm2d(4), act=nn.ReLU())
    change = folded(trained(model), IMAGES)
    assert not change.log
    assert "comes from relu, not from a layer" in change.left["bn"]


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_grouped_transposed_convolutions_fold(groups, dims):
    """https://github.com/pytorch/pytorch/issues/180995, https://github.com/ultralytics/ultralytics/pull/25364"""
    conv = getattr(nn, f"ConvTranspose{dims}d")(6, 12, 3, 2, 1, output_padding=1, groups=groups)
    model = trained(nn.Sequential(conv, getattr(nn, f"BatchNorm{dims}d")(12)))
    assert where(folded(model, torch.randn(2, 6, *[5] * dims))) == {"1": "folded into 0"}


def test_channels_of_zero_weight_fold():
    """https://github.com/pytorch/pytorch/pull/77434: a division by the weight gave NaN."""
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    with torch.no_grad():
        model[1].weight[::2] = 0
        model[1].weight[1] = -1
    assert where(folded(model, IMAGES)) == {"1": "folded into 0"}


# Networks.


@pytest.mark.parametrize(
    ("make", "count"), [(resnet, 7), (UNet, 4), (mobilenet, 4)], ids=lambda v: getattr(v, "__name__", None)
)
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, layers.BatchNorm2d, nn.SyncBatchNorm, layers.FrozenBatchNorm2d])
def test_networks_fold_whole(make, count, norm):
    images = IMAGES if make is not mobilenet else torch.cat([IMAGES, IMAGES[:, :1]], 1)
    change = folded(trained(make(norm=norm)), images, images[:1] + 1)
    assert len(change.log) == count
    with torch.no_grad():
        y = change.model(torch.randn(8, *images.shape[1:]) + 3 * torch.randn(8, images.shape[1], 1, 1))
    y = y["mask"] if isinstance(y, dict) else y
    assert y.std(0).mean() > 0.02 * y.abs().max(), "the input hardly reaches the output: errors would not either"
    assert not change.left
    assert all(type(module).__module__.startswith(("torch", "tests")) for module in change.model.modules())
    assert max(output.relative for output in change.difference.float64) < 1e-13


def test_a_preactivation_network_folds_where_it_is_exact():
    change = folded(trained(Dense()), IMAGES)
    # Inner norms into the 1x1 before them; the last norm, with nothing but a 1x1 behind it, forward into that.
    assert where(change) == {f"inner.{i}": f"folded into mids.{i}" for i in range(3)} | {
        "last": "folded forward into head"
    }
    assert set(change.left) == {"norms.0", "norms.1", "norms.2"}
    assert "the output of stem is also used elsewhere" in change.left["norms.0"]


def test_data_dependent_control_flow_folds_or_refuses():
    model = trained(Choosing())
    positive, negative = IMAGES + 5, IMAGES - 5
    change = folded(model, positive, negative)
    assert where(change) == {"bn": "folded into stem", "bn_left": "folded into left"}
    assert "bn_both" in change.left
    # One path alone shows less, and what it shows is exact on it.
    assert where(folded(model, negative)) == {"bn": "folded into stem", "bn_both": "folded into right"}
    assert folded(model, negative).left == {"bn_left": "no batch led through it"}


def test_a_wrong_answer_on_another_path_is_seen_by_a_batch_that_takes_it():
    model = trained(Choosing())
    change = folded(model, IMAGES - 5)
    assert not deploy.verify(model, change.model, [IMAGES + 5]).agrees


# Other consumers of what is not normalised yet.


def _kept(m, x):
    m.features = m.conv(x)
    return m.bn(m.features)


CONSUMERS = {
    "elsewhere: add": lambda m, x: (t := m.conv(x), m.bn(t) + t)[1],
    "elsewhere: data": lambda m, x: (t := m.conv(x), m.bn(t) + t.data)[1],
    "elsewhere: sub": lambda m, x: (t := m.conv(x), m.bn(t) - t.view(-1)[0])[1],
    "an output of the model": lambda m, x: (t := m.conv(x), (m.bn(t), t))[1],
    "kept after": _kept,
    "relu_": lambda m, x: m.bn(F.relu_(m.conv(x))),
    "numpy": lambda m, x: (t := m.conv(x), m.bn(t) + float(t.numpy().sum()))[1],
    "a call of other": lambda m, x: (t := m.conv(x), m.bn(t) + m.other(t))[1],
    "used 2 times": lambda m, x: (t := m.conv(x), m.bn(t) + m.bn(t))[1],
    "conv.weight is also used": lambda m, x: m.bn(m.conv(x)) + F.conv2d(x, m.conv.weight),
    "bn.running_mean is also used": lambda m, x: m.bn(m.conv(x)) + m.bn.running_mean.sum(),
    "elsewhere: sum": lambda m, x: (t := m.conv(x), m.bn(t) if t.sum() > -1e9 else t)[1],
    "in turn": lambda m, x: m.bn(m.conv(x)) + m.bn(x.repeat(1, 2, 1, 1)[:, :4]),
    "gives (2, 4, 8, 8), and of (2, 4, 4, 8)": lambda m, x: m.bn(m.conv(x).transpose(1, 2)[:, ::2]),
    "elsewhere: as_strided": lambda m, x: m.bn(m.conv(x).as_strided((2, 4, 64), (256, 64, 1)).unflatten(2, (8, 8))),
    "elsewhere: sample_forward": lambda m, x: (t := m.conv(x), m.bn(t) + steadynorm.functional.group_norm(t, 2))[1],
}


@pytest.mark.parametrize("reason", CONSUMERS)
def test_another_consumer_is_refused(reason):
    model = Net(
        lambda m, x: CONSUMERS[reason](m, x),
        conv=nn.Conv2d(3, 4, 1),
        bn=nn.BatchNorm2d(4),
        other=nn.Conv2d(4, 4, 1),
    )
    trained(model)
    change = deploy.fold(model, [IMAGES])
    assert not change.log
    assert reason in change.left["bn"] or (reason == "relu_" and "used elsewhere" in change.left["bn"]), change.left
    assert deploy.verify(model, change.model, [IMAGES]).worst.relative == 0


def test_an_input_that_changes_between_a_norm_and_its_layer_is_refused():
    def forward(m, x):
        x = x * 2
        y = m.bn(x)
        x.add_(1)
        return m.conv(y)

    change = folded(trained(Net(forward, bn=nn.BatchNorm2d(3), conv=nn.Conv2d(3, 4, 1))), IMAGES)
    assert "may be changed there" in change.left["bn"]


def test_a_layer_that_raises_inside_of_a_model_that_goes_on_is_refused():
    def forward(m, x):
        t = m.conv(x)
        try:
            m.other(x)
        except RuntimeError:
            return m.bn(t) + t
        return m.bn(t)

    model = Net(forward, conv=nn.Conv2d(3, 4, 1), other=nn.Conv2d(7, 4, 1), bn=nn.BatchNorm2d(4))
    assert "caught it" in folded(trained(model), IMAGES).left["bn"]


def test_a_dropout_that_the_model_turns_on_is_another_consumer():
    def forward(m, x):
        t = m.conv(x)
        return m.bn(t) + m.drop.train()(t)

    model = Net(forward, conv=nn.Conv2d(3, 4, 1), bn=nn.BatchNorm2d(4), drop=nn.Dropout())
    change = deploy.fold(trained(model), [IMAGES])
    assert "also used elsewhere: a call of drop" in change.left["bn"]


def test_a_layer_that_is_called_with_other_weights_is_refused():
    def forward(m, x):
        return m.bn(torch.func.functional_call(m.conv, {"weight": x.mean() * x.new_ones(4, 3, 1, 1)}, (x,)))

    model = Net(forward, conv=nn.Conv2d(3, 4, 1), bn=nn.BatchNorm2d(4))
    assert "with other tensors" in folded(trained(model), IMAGES).left["bn"]


def test_an_output_that_nobody_takes_does_no_harm():
    model = Net(lambda m, x: (m.conv(x), m.bn(m.conv(x)))[1], conv=nn.Conv2d(3, 4, 1), bn=nn.BatchNorm2d(4))
    assert where(folded(trained(model), IMAGES)) == {"bn": "folded into conv"}


def test_a_part_that_is_scripted_is_seen_from_outside():
    class Adding(nn.Module):
        def forward(self, x):
            return x + 1

    with pytest.warns(DeprecationWarning, match="script"):
        scripted = torch.jit.script(Adding())
    row = {"conv": nn.Conv2d(3, 4, 1), "bn": nn.BatchNorm2d(4), "other": nn.Conv2d(4, 4, 1), "end": nn.BatchNorm2d(4)}
    model = Net(lambda m, x: (t := m.conv(x), m.end(m.other(m.bn(t) + m.adding(t))))[1], adding=scripted, **row)
    change = folded(trained(model), IMAGES)
    assert "also used elsewhere" in change.left["bn"]
    assert where(change) == {"end": "folded into other"}


# Norm before layer.


@pytest.mark.parametrize(
    ("conv", "folds"),
    [
        (nn.Conv2d(3, 4, 3), True),
        (nn.Conv2d(3, 4, 3, padding=1), False),
        (nn.Conv2d(3, 4, 3, padding="same"), False),
        (nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), True),
        (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), True),
        (nn.Conv2d(3, 6, 3, padding=1, padding_mode="replicate", groups=3), True),
        (nn.ConvTranspose2d(3, 4, 3), False),
    ],
)
def test_a_norm_before_a_convolution_folds_where_padding_is_exact(conv, folds):
    model = trained(nn.Sequential(nn.BatchNorm2d(3), conv))
    change = folded(model, IMAGES)
    assert bool(change.log) == folds
    if not folds:
        assert "pads with zeros" in change.left["0"] or "transposed" in change.left["0"]
    # Without a shift there is nothing at the border.
    with torch.no_grad():
        model[0].running_mean.zero_()
        model[0].bias.zero_()
    assert where(folded(model, IMAGES)) == {"0": "folded forward into 1"}


def test_a_norm_before_a_linear_folds():
    model = trained(nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(), nn.Linear(6, 3, bias=False)))
    assert where(folded(model, torch.randn(5, 6))) == {"0": "folded forward into 2"}


def test_a_chain_of_norms_goes_into_one_layer():
    model = trained(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)))
    assert set(where(folded(model, IMAGES)).values()) == {"folded into 1", "folded forward into 1"}


# Layers and their settings.


@pytest.mark.parametrize(
    "activation",
    [None, "relu", pytest.param("gelu", marks=pytest.mark.slow), pytest.param("hardswish", marks=pytest.mark.slow)],
)
def test_ours_fold_and_their_activation_stays(activation):
    norms = {
        "plain": layers.BatchNorm2d(4, activation=activation),
        "ghost": layers.GhostBatchNorm2d(4, ghost_size=2, activation=activation),
        "renorm": layers.BatchRenorm2d(4, activation=activation, bias=False),
        "sync": layers.SyncBatchNorm(4, activation=activation),
        "frozen": layers.FrozenBatchNorm2d(4, activation=activation),
    }
    for name, norm in norms.items():
        change = folded(trained(nn.Sequential(nn.Conv2d(3, 4, 3), norm)), IMAGES)
        assert where(change) == {"1": "folded into 0"}, name
        assert type(change.model[1]).__module__.startswith("torch.nn")


def test_what_stands_alone_becomes_torchs_bit_for_bit():
    model = trained(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), nn.ReLU(), layers.BatchNorm2d(3, activation="relu")))
    change = folded(model, IMAGES)
    assert type(change.model[1]) is nn.BatchNorm2d
    assert [type(one) for one in change.model[3]] == [nn.BatchNorm2d, nn.ReLU]


def test_parametrized_weights_are_made_plain():
    model = nn.Sequential(
        *(layers.weight_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4)),
        *(torch.nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 3)), nn.BatchNorm2d(4)),
    )
    change = folded(trained(model), IMAGES)
    assert where(change) == {"0.weight": "plain", "2.weight": "plain", "1": "folded into 0", "3": "folded into 2"}


def test_half_types_are_rounded_once():
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).bfloat16()
    change = deploy.fold(model, [IMAGES.bfloat16()])
    assert change.model[0].weight.dtype == torch.bfloat16
    bn = copy.deepcopy(model[1]).double()
    exact = model[0].weight.double() * (bn.weight / (bn.running_var + bn.eps).sqrt()).view(-1, 1, 1, 1)
    assert torch.equal(change.model[0].weight, exact.bfloat16())


class MyConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 2


def _hooked(conv):
    conv.register_forward_hook(lambda module, args, output: output * 2)
    return conv


def _with(norm, **tensors):
    for name, value in tensors.items():
        getattr(norm, name).data.fill_(value)
    return norm


REFUSALS = {
    "a subclass with its own forward": (lambda: MyConv(3, 4, 3), lambda: nn.BatchNorm2d(4), "not from a layer"),
    "a hook on the conv": (lambda: _hooked(nn.Conv2d(3, 4, 3)), lambda: nn.BatchNorm2d(4), "not from a layer"),
    "a hook on the norm": (lambda: nn.Conv2d(3, 4, 3), lambda: _hooked(nn.BatchNorm2d(4)), "hooks"),
    "no statistics": (
        *(lambda: nn.Conv2d(3, 4, 3), lambda: nn.BatchNorm2d(4, track_running_stats=False)),
        "by the batch in evaluation",
    ),
    "infinite": (lambda: nn.Conv2d(3, 4, 3), lambda: _with(nn.BatchNorm2d(4), running_var=float("inf")), ""),
    "nan": (lambda: nn.Conv2d(3, 4, 3), lambda: _with(nn.BatchNorm2d(4), running_mean=float("nan")), "not finite"),
    "group": (lambda: nn.Conv2d(3, 4, 3), lambda: nn.GroupNorm(2, 4), "within the sample"),
    "instance": (lambda: nn.Conv2d(3, 4, 3), lambda: nn.InstanceNorm2d(4), "within the sample"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_it_says_why_not(case):
    conv, norm, reason = REFUSALS[case]
    model = nn.Sequential(conv(), norm()).eval()
    change = deploy.fold(model, [IMAGES])
    if case == "infinite":  # one scale of 0: as finite as what the layer computes
        return
    assert reason in change.left["1"]
    assert not change.log
    assert deploy.verify(model, change.model, [IMAGES]).agrees


def test_a_norm_left_in_training_mode_is_refused():
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    model[1].train()
    assert "training mode" in deploy.fold(model, [IMAGES]).left["1"]


def test_leave_leaves():
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    assert deploy.fold(model, [IMAGES], leave="1").left == {"1": "left out by leave="}
    with pytest.raises(InputError, match="expected the name of a normalization"):
        deploy.fold(model, [IMAGES], leave="nope")


def test_bad_calls_are_one_sentence():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with pytest.raises(InputError, match=r"training mode.*eval"):
        deploy.fold(model, [IMAGES])
    with pytest.raises(InputError, match="no batch"):
        deploy.fold(model.eval(), [])


def test_a_norm_that_is_asked_for_an_attribute_stays():
    row = {"conv": nn.Conv2d(3, 4, 1), "bn": nn.BatchNorm2d(4), "other": nn.Conv2d(4, 4, 1), "end": nn.BatchNorm2d(4)}
    model = Net(lambda m, x: m.end(m.other(m.bn(m.conv(x)) * m.bn.eps)), **row)
    change = folded(trained(model), IMAGES)
    assert where(change) == {"end": "folded into other"}
    assert change.left["bn"] == "code of the model asks it for its attribute eps"


def test_a_model_that_cannot_do_without_a_norm_is_an_error_that_says_so():
    def forward(m, x):
        if isinstance(m.bn, nn.Identity):
            raise TypeError("where is my norm?")
        return m.bn(m.conv(x))

    model = Net(forward, conv=nn.Conv2d(3, 4, 1), bn=nn.BatchNorm2d(4))
    with pytest.raises(DifferenceError, match=r"raised, where the model did not: TypeError: where is.*leave="):
        deploy.fold(trained(model), [IMAGES])


def test_tied_weights_are_untied_and_a_shared_pair_is_replaced_everywhere():
    first, second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
    second.weight = first.weight
    bn = nn.BatchNorm2d(3)
    model = trained(nn.Sequential(first, bn, nn.ReLU(), second))
    assert where(folded(model, IMAGES)) == {"1": "folded into 0"}
    shared = trained(nn.Sequential(first, bn, nn.ReLU(), first, bn))
    change = folded(shared, IMAGES)
    assert where(change) == {"1": "folded into 0", "4": "folded into 0"}
    assert change.model[0] is change.model[3]


def test_the_result_needs_no_steadynorm(tmp_path):
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), layers.BatchNorm2d(4, activation="relu"), layers.GroupNorm(2, 4)))
    change = deploy.fold(model, [IMAGES])
    with torch.no_grad():
        (tmp_path / "folded").write_bytes(pickle.dumps((change.model, IMAGES, change.model(IMAGES))))
    code = (
        "import pickle, sys, torch; m, x, y = pickle.load(open(sys.argv[1], 'rb'));"
        "assert 'steadynorm' not in sys.modules; assert torch.allclose(m(x), y, atol=1e-6)"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "folded")], check=True)


def test_the_random_state_and_a_failing_model_stay_as_they_are():
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    state = torch.get_rng_state()
    deploy.fold(model, [IMAGES])
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(RuntimeError):
        deploy.fold(model, [torch.zeros(1, 5, 8, 8)])
    assert not model[0]._forward_hooks


def test_what_cannot_be_seen_is_caught_by_the_comparison():
    def forward(m, x):
        t, seen = m.conv(x), []
        thread = threading.Thread(target=lambda: seen.append(t.sum()))
        thread.start()
        thread.join()
        return m.bn(t) + seen[0]

    model = Net(forward, conv=nn.Conv2d(3, 4, 1), bn=nn.BatchNorm2d(4))
    with pytest.raises(DifferenceError, match=r"relative [0-9.e+-]+.*part at the model itself"):
        deploy.fold(trained(model), [IMAGES])


# Saboteurs: what others do wrong must be caught by the comparison that ends every fold.


def test_a_fold_that_forgets_eps_is_caught(monkeypatch):
    def forgetful(norm):
        norm = copy.deepcopy(norm)
        norm.eps = 0.0
        return honest(norm)

    honest = units.inside_of
    monkeypatch.setattr(units, "inside_of", forgetful)
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    with pytest.raises(DifferenceError, match=r"in float64.*they part at 1"):
        deploy.fold(model, [IMAGES])


@pytest.mark.parametrize("wrong", ["across a relu", "shared conv"])
def test_a_fold_into_the_wrong_place_is_caught(wrong, monkeypatch):
    from steadynorm.deploy import fold as module  # noqa: F401

    places = sys.modules["steadynorm.deploy.places"]
    if wrong == "across a relu":
        model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.BatchNorm2d(3))
    else:
        conv = nn.Conv2d(3, 3, 1)
        model = nn.Sequential(conv, nn.BatchNorm2d(3), conv, nn.BatchNorm2d(3))
    monkeypatch.setattr(places.Places, "of", lambda self, path: places.Step(path, "0", "after", 4))
    with pytest.raises(DifferenceError, match=r"relative [0-9.e+-]+.*Nothing was folded"):
        deploy.fold(trained(model), [IMAGES])
