"""A batch norm becomes a relative: what that computes, what stays, what is said, and the way back."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from steadynorm import layers
from steadynorm.convert import convert_
from steadynorm.errors import InputError
from tests.convert.test_convert import Doubled, WithActivation, identities, network

SHAPES = {1: (6, 4, 5), 2: (6, 4, 3, 5), 3: (6, 4, 2, 3, 2)}
SOURCES = {
    "torch": lambda dims, **settings: getattr(nn, f"BatchNorm{dims}d")(4, **settings),
    "ours": lambda dims, **settings: getattr(layers, f"BatchNorm{dims}d")(4, **settings),
    "torch sync": lambda dims, **settings: nn.SyncBatchNorm(4, **settings),
    "sync": lambda dims, **settings: layers.SyncBatchNorm(4, **settings),
    "ghost": lambda dims, **settings: getattr(layers, f"GhostBatchNorm{dims}d")(4, **settings, ghost_size=2),
    "renorm": lambda dims, **settings: getattr(layers, f"BatchRenorm{dims}d")(4, **settings),
}
LIMITS = (2.0, 1.0)
OPTIONS = {"ghost": {"ghost_size": 3}, "renorm": {"limits": LIMITS}, "group": {"groups": 2}}
OVER_THE_BATCH = ("frozen", "ghost", "renorm")


def lived(norm):
    for name, tensor in (*norm.named_parameters(), *norm.named_buffers()):
        if tensor.is_floating_point():
            tensor.data.uniform_(0.5, 2)
        elif name == "num_batches_tracked":
            tensor.fill_(7)
    return norm


def expected(to, dims, source, x):
    """What the relative gives in training, from layers that are built anew, or from plain functions."""
    weight, bias = source.weight.detach(), source.bias.detach()
    mean, var = source.running_mean.clone(), source.running_var.clone()
    if to == "frozen":
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, source.eps), mean, var
    if to in ("ghost", "renorm"):
        cls = getattr(layers, {"ghost": f"GhostBatchNorm{dims}d", "renorm": f"BatchRenorm{dims}d"}[to])
        fresh = cls(4, eps=source.eps, momentum=source.momentum, **OPTIONS[to])
        fresh.load_state_dict(source.state_dict())
        return fresh(x), fresh.running_mean, fresh.running_var
    if to == "none":
        return x, None, None
    if to == "channel_layer":
        y = F.layer_norm(x.movedim(1, -1), (4,), weight, bias, source.eps).movedim(-1, 1)
        return y, None, None
    return F.group_norm(x, {"group": 2, "layer": 1, "instance": 4}[to], weight, bias, source.eps), None, None


@pytest.mark.parametrize("dims", SHAPES)
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("to", ["frozen", "ghost", "renorm", "group", "layer", "channel_layer", "instance", "none"])
def test_each_source_becomes_each_relative(to, source, dims):
    norm, x = lived(SOURCES[source](dims, eps=1e-3, momentum=0.3)), torch.randn(SHAPES[dims]) * 3 + 1
    y, mean, var = expected(to, dims, norm, x)
    options = dict(OPTIONS.get(to, {}))
    if "sync" in source and to in (*OVER_THE_BATCH, "instance"):
        with pytest.raises(InputError, match=r"the model is .*SyncBatchNorm, .*give dims="):
            convert_(norm, to, **options)
        options["dims"] = dims
    parameters = dict(norm.named_parameters())
    if to == "instance":
        # An instance norm of (N, C) does not exist, so a BatchNorm1d has to show what it is called with.
        change = convert_(norm.eval(), to, **options, batches=[x])
        norm.train()
        for name, parameter in parameters.items():
            assert getattr(norm, name) is parameter
        y = F.instance_norm(x, None, None, norm.weight, norm.bias, eps=norm.eps)
    else:
        change = convert_(norm, to, **options)
    assert len(change.log) == 1
    assert norm.training
    torch.testing.assert_close(norm(x), y, rtol=1e-4, atol=1e-4)
    if mean is not None:
        torch.testing.assert_close(norm.running_mean, mean)
        torch.testing.assert_close(norm.running_var, var)
    else:
        assert "running_mean" not in norm.state_dict()
    if to not in ("frozen", "none"):
        assert dict(norm.named_parameters()).keys() == parameters.keys()
        assert all(dict(norm.named_parameters())[name] is one for name, one in parameters.items())
    assert convert_(copy.deepcopy(norm), to, **options).log == ()
    pickle.loads(pickle.dumps(norm))(x)
    repr(norm)


@pytest.mark.parametrize("to", OVER_THE_BATCH)
@pytest.mark.parametrize("prepare", [None, "steadynorm", "sync"])
def test_there_and_back_is_the_identity(to, prepare):
    model = network()
    if prepare:
        convert_(model, prepare)
    layer = model[4]
    layer.my_own = "kept"
    before, state = identities(model), copy.deepcopy(model.state_dict())
    change = convert_(model, to, **OPTIONS.get(to, {}))
    assert {one.paths for one in change.log} == {("1", "3.1"), ("4",), ("8",)}
    assert model[1] is model[3][1]
    assert model[4] is layer
    assert layer.my_own == "kept"
    assert not layer.training
    assert len(model.state_dict()) == len(state) - 4 * (to == "frozen")
    model = pickle.loads(pickle.dumps(model)) if prepare == "sync" else model
    convert_(model, "batch")
    if prepare == "sync":
        # "batch" goes to what it was before it was synchronised.
        assert type(model[4]) is nn.BatchNorm2d
    else:
        assert identities(model) == before
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_all_kinds_of_hooks_stay():
    for to in ("frozen", "ghost", "renorm", "group", "layer", "none"):
        model, fired = nn.Sequential(nn.BatchNorm1d(4)), []
        model[0].register_forward_pre_hook(lambda m, args, seen=fired: seen.append("pre"))
        model[0].register_forward_hook(lambda m, args, y, seen=fired: seen.append("after"))
        model[0].register_full_backward_hook(lambda m, gi, go, seen=fired: seen.append("backward"))
        model[0].register_state_dict_post_hook(lambda m, *rest, seen=fired: seen.append("state"))
        convert_(model, to, **OPTIONS.get(to, {}))
        model(torch.randn(5, 4, requires_grad=True)).square().sum().backward()
        model.state_dict()
        assert fired == ["pre", "after", "backward", "state"], to


@pytest.mark.parametrize(("to", "options"), [("ghost", {"ghost_size": 99}), ("renorm", {"limits": (1.0, 0.0)})])
def test_an_optimizer_with_momentum_goes_on_with_the_same_steps(to, options):
    """With these settings both compute what a batch norm does."""
    model, x = network(), torch.randn(5, 3, 5, 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def step(one, opt):
        opt.zero_grad()
        one(x).square().mean().backward()
        opt.step()

    for _ in range(3):
        step(model, optimizer)
    twin = copy.deepcopy(model)
    twins = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    twins.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    convert_(model, to, **options, optimizer=optimizer)
    for _ in range(3):
        step(model, optimizer)
        step(twin, twins)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def with_gradients(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    model(torch.randn(5, 3, 5, 5)).square().mean().backward()
    optimizer.step()
    return optimizer


def test_frozen_weights_stand_still_whatever_an_optimizer_does():
    model = network()
    optimizer = with_gradients(model)
    convert_(model, "frozen")
    frozen = [buffer.clone() for buffer in model[1].buffers()]
    kernel = model[0].weight.clone()
    # The gradients of before are still there: without care this step would move the weights, by momentum and decay too.
    optimizer.step()
    model(torch.randn(5, 3, 5, 5)).square().mean().backward()
    optimizer.step()
    assert not torch.equal(model[0].weight, kernel)
    assert all(torch.equal(a, b) for a, b in zip(model[1].buffers(), frozen, strict=True))
    assert "1.weight" not in dict(model.named_parameters())


def test_frozen_weights_leave_the_optimizer_when_it_is_given():
    model = network()
    optimizer = with_gradients(model)
    gone = [model[1].weight, model[1].bias]
    change = convert_(model, "frozen", only="1", optimizer=optimizer)
    assert change.log[0].note == "taken out of the optimizer"
    assert not {*gone} & {*optimizer.state}
    held = [id(parameter) for parameter in optimizer.param_groups[0]["params"]]
    assert held == [id(parameter) for parameter in model.parameters()]
    assert model[4].weight in optimizer.state
    back = convert_(model, "batch")
    assert model[1].weight is gone[0]
    assert back.log[0].note == ""


def test_a_parameter_that_another_layer_shares_goes_on():
    model = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    shared = model[1].weight = model[0].weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(5, 4, 3, 3)).square().mean().backward()
    optimizer.step()
    gradient, bias = shared.grad, model[0].bias
    convert_(model, "frozen", only="0", optimizer=optimizer)
    assert model[1].weight is shared
    assert shared.grad is gradient
    assert shared in optimizer.state
    assert bias not in optimizer.state
    assert bias.grad is None
    optimizer.step()
    assert not torch.equal(model[0].weight, shared)
    assert torch.equal(model[0].bias, bias)


def test_a_frozen_layer_whose_values_changed_comes_back_with_parameters_of_its_own():
    model = network()
    weight = model[1].weight
    convert_(model, "frozen")
    model[1].weight.mul_(2)
    change = convert_(model, "batch")
    assert model[1].weight is not weight
    assert torch.equal(model[1].weight, 2 * weight)
    assert "new parameters, in no optimizer: weight" in repr(change)
    assert model[1].momentum == 0.1


def test_a_layer_that_was_frozen_from_the_start_becomes_a_batch_norm():
    model, x = nn.Sequential(lived(layers.FrozenBatchNorm2d(4, eps=1e-3, activation="relu"))), torch.randn(6, 4, 3, 3)
    y = model(x)
    change = convert_(model, "batch")
    assert "new parameters" in change.log[0].note
    assert [name for name, _ in model.named_parameters()] == ["0.weight", "0.bias"]
    torch.testing.assert_close(model.eval()(x), y)
    fresh = nn.Sequential(layers.BatchNorm2d(4, eps=1e-3, activation="relu"))
    fresh.load_state_dict(model.state_dict())
    model.train(), fresh.train()
    torch.testing.assert_close(model(x), fresh(x))
    torch.testing.assert_close(model.state_dict(), fresh.state_dict())
    bare = nn.Sequential(layers.FrozenBatchNorm1d(4, affine=False))
    convert_(bare, "batch")
    assert not bare[0].affine
    assert bare[0].weight is None


def test_what_is_told_of_a_layer_without_weights():
    for to in ("frozen", "group", "none", "layer"):
        model, x = nn.Sequential(nn.BatchNorm2d(4, affine=False)), torch.randn(6, 4, 3, 3)
        convert_(model, to)
        assert list(model.parameters()) == []
        model(x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("to", [*OVER_THE_BATCH, "group"])
def test_half_precision(to, dtype):
    model = nn.Sequential(lived(nn.BatchNorm2d(4))).to(dtype)
    state, x = copy.deepcopy(model.state_dict()), torch.randn(6, 4, 3, 3, dtype=dtype)
    convert_(model, to, **OPTIONS.get(to, {}))
    assert model(x).dtype == dtype
    assert model[0].weight.dtype == dtype
    if to == "frozen":
        assert model[0].running_mean.dtype == torch.float32
        convert_(model, "batch")
        for name, value in model.state_dict().items():
            assert value.dtype == state[name].dtype
            assert torch.equal(value, state[name])


def test_settings_of_ours_go_along_where_they_mean_something():
    norm = layers.BatchNorm2d(4, activation="silu", guard="raise", debias=True)
    before = identities(norm)
    for to in OVER_THE_BATCH:
        convert_(norm, to, **OPTIONS.get(to, {}))
        assert norm.activation == "silu"
        convert_(norm, "batch")
        assert identities(norm) == before
    frozen = layers.BatchNorm2d(4).freeze_()
    kept = identities(frozen)
    convert_(frozen, "frozen")
    convert_(frozen, "batch")
    assert identities(frozen) == kept
    assert frozen.normalize_by == "running"
    convert_(norm, "group")
    assert norm.activation == "silu"
    x = torch.randn(6, 4, 3, 3)
    torch.testing.assert_close(norm(x), F.silu(F.group_norm(x, 1)))


def test_from_group_to_torch_and_back():
    model, x = network().eval(), torch.randn(5, 3, 5, 5)
    convert_(model, "layer")
    y, before = model(x), identities(model)
    convert_(model, "torch")
    assert type(model[1]) is nn.GroupNorm
    assert b"steadynorm.layers" not in pickle.dumps(model[1])
    torch.testing.assert_close(model(x), y)
    convert_(model, "steadynorm", leave=(nn.LayerNorm, "3.2"))
    assert identities(model).keys() == before.keys()
    torch.testing.assert_close(model(x), y)


def with_setting(layer, name, value):
    setattr(layer, name, value)
    return layer


def parametrized():
    layer = nn.BatchNorm2d(4)
    parametrize.register_parametrization(layer, "weight", Doubled(), unsafe=True)
    return layer


def converted(to):
    model = nn.Sequential(nn.BatchNorm2d(4))
    convert_(model, to)
    return model[0]


REFUSED = {
    "own forward": (lambda: WithActivation(4), "group", {}, "WithActivation.*own act|own forward"),
    "set forward": (lambda: with_setting(nn.BatchNorm2d(4), "forward", abs), "frozen", {}, "forward of its own"),
    "lazy": (lambda: nn.LazyBatchNorm2d(), "group", {}, "without a number of channels"),
    "domain": (lambda: layers.DomainBatchNorm2d(4, num_domains=2), "group", {}, "several norms"),
    "no statistics": (lambda: nn.BatchNorm2d(4, track_running_stats=False), "frozen", {}, "without running statistics"),
    "renorm": (lambda: nn.BatchNorm2d(4, track_running_stats=False), "renorm", {}, "without running statistics"),
    "computed": (parametrized, "frozen", {}, "a parametrization computes"),
    "computed, none": (parametrized, "none", {}, "a parametrization computes"),
    "activation": (lambda: layers.BatchNorm2d(4, activation="relu"), "none", {}, "activation='relu'"),
    "positions": (lambda: layers.BatchNorm2d(4, activation="relu"), "channel_layer", {}, "activation='relu'"),
    "groups": (lambda: nn.BatchNorm2d(4), "group", {"groups": 3}, "4 channels, which groups=3 does not divide"),
    "clash": (lambda: with_setting(nn.BatchNorm2d(4), "num_groups", 7), "group", {}, "an attribute 'num_groups'"),
    "eps": (lambda: nn.BatchNorm2d(4, eps=0.0), "ghost", {"ghost_size": 2}, "eps must be positive"),
    "size": (lambda: nn.BatchNorm2d(4), "ghost", {"ghost_size": 0}, "ghost_size must be"),
    "limits": (lambda: nn.BatchNorm2d(4), "renorm", {"limits": (0.5, 1.0)}, "rmax must be"),
    "back from group": (lambda: converted("group"), "batch", {}, "was a nn.BatchNorm2d .* statistics are gone"),
    "back from none": (lambda: converted("none"), "batch", {}, "was a nn.BatchNorm2d .* statistics are gone"),
    "instance of (N, C)": (lambda: nn.BatchNorm1d(4), "instance", {}, "give batches="),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_lost_is_refused_and_nothing_changed(name):
    make, to, options, message = REFUSED[name]
    model = nn.Sequential(nn.BatchNorm2d(4), nn.Sequential(make()), nn.BatchNorm2d(4))
    if to == "batch":
        convert_(model, "sync", leave="1")
    made = [(name, tensor) for name, tensor in model.named_parameters() if not is_lazy(tensor)]
    before, state = identities(model), {name: tensor.clone() for name, tensor in made}
    if "groups" in options or "ghost_size" in options or "limits" in options:
        model[0], model[2] = nn.Identity(), nn.Identity()
        before = identities(model)
    with pytest.raises(InputError, match=rf"(?s)cannot take one layer.*\n1\.0 .*({message})"):
        convert_(model, to, **options)
    assert identities(model) == before
    for path, tensor in model.named_parameters():
        assert is_lazy(tensor) or torch.equal(tensor, state[path])


@pytest.mark.parametrize(
    ("to", "options", "message"),
    [
        ("ghost", {}, "needs ghost_size="),
        ("group", {"ghost_size": 2}, "ghost_size=2 to 'group': it is for 'ghost'"),
        ("layer", {"groups": 2}, "groups=2 to 'layer'"),
        ("ghost", {"ghost_size": 2, "limits": LIMITS}, "limits="),
        ("group", {"dims": 2}, "dims=2 to 'group'"),
        ("group", {"groups": 0}, "groups=0, expected a positive"),
        ("group", {"process_group": object()}, "process_group= to 'group'"),
        ("frozen", {"optimizer": 3}, "optimizer= of int"),
        ("frozen", {"optimizer": torch.optim.SGD([torch.ones(1)], 0.1)}, "no parameter of the model"),
    ],
)
def test_wrong_options_are_refused(to, options, message):
    model = network()
    before = identities(model)
    with pytest.raises(InputError, match=message):
        convert_(model, to, **options)
    assert identities(model) == before


def test_frozen_layers_are_named_where_only_batch_norms_are_converted():
    model = nn.Sequential(layers.FrozenBatchNorm2d(4), nn.BatchNorm2d(4))
    change = convert_(model, "group")
    assert list(change.left) == ["0"]
    assert "to='batch'" in repr(change)


def test_an_interrupt_in_the_middle_puts_back_gradients_and_the_optimizer(monkeypatch):
    model = network()
    optimizer = with_gradients(model)
    before, state = identities(model), dict(optimizer.state)
    held = list(optimizer.param_groups[0]["params"])
    gradients = [parameter.grad for parameter in model.parameters()]

    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(layers.FrozenBatchNorm1d, "_check_settings", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert_(model, "frozen", optimizer=optimizer)
    assert identities(model) == before
    assert all(parameter.grad is one for parameter, one in zip(model.parameters(), gradients, strict=True))
    assert optimizer.state.keys() == state.keys()
    assert all(a is b for a, b in zip(optimizer.param_groups[0]["params"], held, strict=True))


def test_a_reducer_that_waits_for_the_weights_is_refused(group_of_one):
    model = DistributedDataParallel(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    before = identities(model)
    for to in ("frozen", "none", "group"):
        with pytest.raises(InputError, match=r"buffers of module\.1 .* inside DistributedDataParallel"):
            convert_(model, to)
    assert identities(model) == before
    convert_(model, "renorm")
    model(torch.randn(3, 4, 2, 2)).square().mean().backward()
    assert model.module[1].weight.grad is not None


@pytest.mark.slow
def test_frozen_norms_of_hugging_face_are_known_by_what_they_compute():
    """They have eps in the code, and copies of them in many files."""
    from transformers.models.detr.modeling_detr import DetrFrozenBatchNorm2d
    from transformers.models.rt_detr.modeling_rt_detr import RTDetrFrozenBatchNorm2d

    for cls in (DetrFrozenBatchNorm2d, RTDetrFrozenBatchNorm2d):
        model, x = nn.Sequential(lived(cls(4))), torch.randn(6, 4, 3, 3)
        y = model(x)
        convert_(model, "frozen")
        assert model[0].eps == 1e-5
        torch.testing.assert_close(model(x), y)
        convert_(model, "batch")
        torch.testing.assert_close(model.eval()(x), y)
