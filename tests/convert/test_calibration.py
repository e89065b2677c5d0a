"""Weight and bias that make a normalization within the sample give what the batch norm gave, held to NumPy."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import steadynorm
from steadynorm.convert import calibration, convert_, fit
from steadynorm.errors import InputError
from steadynorm.recipe import seeded
from steadynorm.recipes import digits
from tests.convert import oracle
from tests.convert.test_convert import identities

SHAPES = {1: (6, 8, 9), 2: (6, 8, 4, 5), 3: (5, 8, 2, 3, 2)}
TORCHS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
GROUPS = {"group": 4, "layer": 1, "instance": 8, "channel_layer": 0}


def lived(norm):
    """A batch norm with statistics and weights of its own."""
    for name, tensor in (*norm.named_parameters(), *norm.named_buffers()):
        if tensor.is_floating_point():
            tensor.data.copy_(torch.rand_like(tensor) + (0.5 if "var" in name else -0.5) + (name == "bias") * 30)
    return norm


def array(tensor):
    return tensor.detach().double().numpy()


def bn(norm, x):
    tensors = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    return oracle.batch_norm(x, *map(array, tensors), norm.eps)


def assert_fits(model, expected, tolerance=1e-7):
    for path, (weight, bias) in expected.items():
        layer = model.get_submodule(path)
        np.testing.assert_allclose(array(layer.weight), weight, rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(array(layer.bias), bias, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dims", SHAPES)
@pytest.mark.parametrize("to", GROUPS)
def test_one_layer_is_the_least_squares_line(to, dims):
    model = nn.Sequential(lived(TORCHS[dims](8).double()))
    data = [torch.randn(SHAPES[dims], dtype=torch.float64) * (k + 1) + k for k in range(3)]
    x = array(torch.cat(data))
    y, z = bn(model[0], x), oracle.group_norm(x, GROUPS[to], model[0].eps)
    weight, bias, error = oracle.line(z, y)
    options = {"groups": 4} if to == "group" else {}
    change = convert_(model, to, batches=data, **options)
    assert_fits(model, {"0": (weight, bias)})
    assert change.log[0].error == pytest.approx(error, rel=1e-6)
    shape = (1, -1, *[1] * dims)
    got = np.concatenate([array(model(one)) for one in data])
    np.testing.assert_allclose(got, z * weight.reshape(shape) + bias.reshape(shape), atol=1e-7)
    relative = np.sqrt(((got - y) ** 2).sum() / (y**2).sum())
    assert change.difference.relative == pytest.approx((relative,), rel=1e-6)
    assert change.difference.samples == len(x)


def test_values_without_positions():
    model = nn.Sequential(lived(nn.BatchNorm1d(6).double()))
    x = torch.randn(40, 6, dtype=torch.float64)
    y, z = bn(model[0], array(x)), oracle.group_norm(array(x), 2, 1e-5)
    convert_(model, "group", groups=2, batches=x.split(7))
    assert_fits(model, {"0": oracle.line(z, y)[:2]})


def test_the_number_of_groups_is_that_with_the_least_error():
    """Half of the channels differ from sample to sample and hardly count; in one group they would disturb the rest."""
    model = nn.Sequential(lived(nn.BatchNorm2d(8).double()))
    scales = torch.cat([torch.rand(50, 4, 1, 1) * 9 + 0.1, torch.ones(50, 4, 1, 1)], 1).double()
    x = torch.randn(50, 8, 6, 6, dtype=torch.float64) * scales
    model[0].weight.data.copy_(torch.tensor([0.01] * 4 + [1.0] * 4))
    y = bn(model[0], array(x))
    errors = {g: oracle.line(oracle.group_norm(array(x), g, 1e-5), y)[2] for g in (1, 2, 4, 8)}
    best = min(errors, key=errors.get)
    assert best == 2
    change = convert_(model, "group", batches=x.split(10))
    assert model[0].num_groups == best
    assert change.log[0].error == pytest.approx(errors[best], rel=1e-6)


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = lived(steadynorm.BatchNorm1d(6, activation="relu").double())

    def forward(self, x, mask, residual):
        return self.bn(x, residual=residual, mask=mask)


def masked_case():
    x, residual = (torch.randn(9, 6, 7, dtype=torch.float64) for _ in range(2))
    mask = torch.arange(7) < torch.tensor([7, 3, 1, 5, 7, 2, 4, 6, 0])[:, None]
    x[~mask[:, None].expand_as(x)] = torch.nan
    return x, mask, residual


def test_padding_takes_no_part():
    model, (x, mask, residual) = Masked(), masked_case()
    y, z = bn(model.bn, array(x)), oracle.group_norm(array(x), 2, 1e-5, mask.numpy())
    weight, bias, _ = oracle.line(z, y, mask.numpy())
    convert_(model, "group", groups=2, batches=[{"x": x, "mask": mask, "residual": residual}])
    assert_fits(model, {"bn": (weight, bias)})
    assert model.bn.activation == "relu"


def network(dtype=torch.float64):
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 2), nn.BatchNorm2d(6), nn.Tanh()
    ).to(dtype)
    model[1], model[4] = lived(model[1]), lived(model[4])
    return model


def expected_fits(model, x, layer_by_layer):
    """The two layers of `network`, converted to one group each, one after the other."""
    with torch.no_grad():
        first = model[0](x)
        y1 = bn(model[1], array(first))
        z1 = oracle.group_norm(array(first), 1, model[1].eps)
        fit1 = oracle.line(z1, y1)[:2]
        old = model[3](torch.from_numpy(y1).relu())
        behind = torch.from_numpy(z1 * fit1[0].reshape(1, -1, 1, 1) + fit1[1].reshape(1, -1, 1, 1)).relu()
        new = model[3](behind) if layer_by_layer else old
    y2, z2 = bn(model[4], array(old)), oracle.group_norm(array(new), 1, model[4].eps)
    return {"1": fit1, "4": oracle.line(z2, y2)[:2]}


@pytest.mark.parametrize("method", ["layer_by_layer", "one_pass"])
def test_later_layers_see_what_converted_ones_give(method):
    model, x = network(), torch.randn(20, 2, 7, 6, dtype=torch.float64)
    expected = expected_fits(model, x, method == "layer_by_layer")
    other = expected_fits(model, x, method != "layer_by_layer")
    assert not np.allclose(expected["4"][0], other["4"][0], rtol=1e-3)
    runs = []
    convert_(model.train(), "layer", batches=x.split(6), method=method, progress=lambda *seen: runs.append(seen))
    assert_fits(model, expected)
    assert model.training
    assert runs[-1] == ((12, 12) if method == "layer_by_layer" else (4, 4))


class Wrong:
    """Ways to be wrong, each of which the comparison with NumPy has to see."""

    @staticmethod
    def without_centre(patch):
        plain = fit.Sums._fit

        def wrong(self, groups):
            found = plain(self, groups)
            return replace(found, bias=found.bias - self.centre)

        patch.setattr(fit.Sums, "_fit", wrong)

    @staticmethod
    def another_scale(patch):
        whole = fit.normalized
        patch.setattr(fit, "normalized", lambda x, valid, groups, eps: whole(x, valid, groups, eps) * 0.99)

    @staticmethod
    def through_the_origin(patch):
        plain = fit.Sums._fit

        def wrong(self, groups):
            return replace(plain(self, groups), weight=self.zy[groups] / self.zz[groups])

        patch.setattr(fit.Sums, "_fit", wrong)

    @staticmethod
    def only_the_last_batch(patch):
        plain = fit.Sums.add

        def wrong(self, *arguments):
            self.__init__(self.centre, self.candidates, self.dtype)
            plain(self, *arguments)

        patch.setattr(fit.Sums, "add", wrong)

    @staticmethod
    def old_inputs_everywhere(patch):
        patch.setattr(calibration, "_in_place", lambda put: calibration.suppress())


@pytest.mark.parametrize("name", [name for name in vars(Wrong) if not name.startswith("_")])
def test_saboteurs_are_caught(name, monkeypatch):
    model, x = network(), torch.randn(20, 2, 7, 6, dtype=torch.float64)
    expected = expected_fits(model, x, layer_by_layer=True)
    getattr(Wrong, name)(monkeypatch)
    convert_(model, "layer", batches=x.split(6))
    with pytest.raises(AssertionError):
        assert_fits(model, expected)


def test_how_the_data_is_batched_makes_no_difference():
    x, found = torch.randn(24, 2, 7, 6, dtype=torch.float64), []
    for size in (24, 5, 1):
        model = network()
        convert_(model, "layer", batches=x.split(size))
        found.append([array(parameter) for parameter in model.parameters()])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


class Twice(nn.Module):
    """A layer that is shared, and called with inputs of two sizes."""

    def __init__(self):
        super().__init__()
        self.bn = lived(nn.BatchNorm2d(4).double())
        self.again = self.bn

    def forward(self, x):
        return self.bn(x), self.again(x[..., :2] * 3 + 1)


def test_all_calls_of_a_shared_layer_count():
    model, x = Twice(), torch.randn(8, 4, 5, 5, dtype=torch.float64)
    calls = [array(x), array(x[..., :2] * 3 + 1)]
    flat = [
        np.concatenate([made(one).transpose(1, 0, 2, 3).reshape(1, 4, -1) for one in calls], 2)
        for made in (lambda one: oracle.group_norm(one, 2, 1e-5), lambda one: bn(model.bn, one))
    ]
    weight, bias, _ = oracle.line(*flat)
    change = convert_(model, "group", groups=2, batches=x.split(3))
    assert change.log[0].paths == ("bn", "again")
    assert model.bn is model.again
    assert_fits(model, {"bn": (weight, bias)})
    assert len(change.difference.relative) == 2


def test_a_layer_without_weights_gets_some_that_do_not_train():
    model, x = nn.Sequential(nn.BatchNorm2d(4, affine=False)), torch.randn(9, 4, 3, 3)
    model[0].running_mean += 2
    before = model.eval()(x)
    change = convert_(model, "layer", batches=[x])
    assert "weight and bias added, without training" in change.log[0].note
    assert model[0].affine
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert list(model.state_dict()) == ["0.weight", "0.bias"]
    assert float((model(x) - before).norm() / before.norm()) == pytest.approx(change.difference.relative[0], rel=1e-4)
    bare = nn.Sequential(nn.BatchNorm2d(4, bias=False))
    parameter = bare[0].weight
    assert "; 1 group" in f"; {convert_(bare, 'layer', batches=[x]).log[0].note}"
    assert bare[0].weight is parameter
    assert not bare[0].bias.requires_grad


def test_a_norm_that_uses_the_batch_in_evaluation_too():
    model = nn.Sequential(nn.BatchNorm2d(4, track_running_stats=False).double())
    data = [torch.randn(6, 4, 3, 3, dtype=torch.float64) * (k + 1) for k in range(2)]
    y = np.concatenate([array(model(one)) for one in data])
    z = oracle.group_norm(array(torch.cat(data)), 1, 1e-5)
    convert_(model, "layer", batches=data)
    assert_fits(model, {"0": oracle.line(z, y)[:2]})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_once(dtype):
    wide, x = network(torch.float32), torch.randn(20, 2, 7, 6)
    for norm in (wide[1], wide[4]):
        norm.bias.data -= 30  # of which eight bits would leave nothing
    narrow = copy.deepcopy(wide).to(dtype)
    wide.load_state_dict(narrow.state_dict())
    convert_(narrow, "layer", batches=[x.to(dtype)])
    convert_(wide, "layer", batches=[x.to(dtype).float()])
    for a, b in zip(narrow.parameters(), wide.parameters(), strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.float(), b, rtol=0.02, atol=0.02)


def test_a_constant_channel_gives_what_it_gave():
    model, x = nn.Sequential(lived(nn.BatchNorm2d(4).double())), torch.randn(6, 4, 3, 3, dtype=torch.float64)
    x[:, 2] = 5.0
    y = model.eval()(x)
    convert_(model, "instance", batches=[x])
    torch.testing.assert_close(model(x)[:, 2], y[:, 2])


def test_layers_that_no_batch_reaches_keep_their_weights_and_are_named():
    model = network().float()
    model.spare = lived(nn.BatchNorm2d(8))
    model.forward = lambda x: model[4](model[3](model[2](model[1](model[0](x)))))
    weight = model.spare.weight.clone()
    change = convert_(model, "group", batches=[torch.randn(5, 2, 7, 6)])
    notes = {one.paths[0]: one.note for one in change.log}
    assert notes["spare"] == "2 groups; never called"
    assert torch.equal(model.spare.weight, weight)
    assert "never called" not in notes["1"]


class Cut(nn.Module):
    """Hands on as many samples as values are over a limit, which depends on the norm."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.BatchNorm1d(4), nn.BatchNorm1d(4)

    def forward(self, x):
        y = self.first(x)
        return self.second(y[y[:, 0] > 0.1])


def tied():
    model = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    model[1].weight = model[0].weight
    return model


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


def computed():
    model = nn.Sequential(nn.BatchNorm2d(4))
    parametrize.register_parametrization(model[0], "weight", Doubled(), unsafe=True)
    return model


IMAGES = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0))
REFUSED = {
    "tied": (tied, [IMAGES], {}, "1 shares a parameter with 0"),
    "computed": (computed, [IMAGES], {}, "0 has a weight or bias that a parametrization computes"),
    "nan": (lambda: nn.Sequential(nn.BatchNorm2d(4)), [IMAGES * torch.nan], {}, "0 got values that are not finite"),
    "one value": (lambda: nn.Sequential(nn.BatchNorm1d(4)), [IMAGES[..., 0, 0]], {"to": "instance"}, "one value per"),
    "groups": (lambda: nn.Sequential(nn.BatchNorm2d(4)), [IMAGES], {"groups": 3}, "groups=3 does not divide"),
    "empty": (lambda: nn.Sequential(nn.BatchNorm2d(4)), [], {}, "without a batch"),
    "tensor": (lambda: nn.Sequential(nn.BatchNorm2d(4)), IMAGES, {}, "batches of Tensor"),
    "loss": (lambda: nn.Sequential(nn.BatchNorm2d(4)), None, {"loss": abs}, "no batches= to measure"),
    "method": (lambda: nn.Sequential(nn.BatchNorm2d(4)), [IMAGES], {"method": "best"}, "got method='best'"),
    "by value": (Cut, [IMAGES[..., 0, 0] + torch.arange(6)[:, None]], {}, "use method='one_pass'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_calibrated_is_refused_and_nothing_changed(name):
    make, batches, options, message = REFUSED[name]
    model = make()
    before, state = identities(model), copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=message):
        convert_(model, **{"to": "group", "batches": batches, **options})
    assert identities(model) == before
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])


def test_control_flow_by_value_in_one_pass():
    model, x = Cut(), IMAGES[..., 0, 0] + torch.arange(6)[:, None]
    change = convert_(model, "group", groups=2, batches=[x], method="one_pass")
    assert len(change.log) == 2
    assert change.difference.relative == (torch.inf,)


@pytest.mark.parametrize("when", [1, 2])
def test_a_failure_at_any_time_leaves_model_optimizer_and_random_state(when):
    """The loss of the user raises, before or after the conversion."""
    model = network(torch.float32)
    x = torch.randn(6, 2, 7, 6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(x).square().mean().backward()
    optimizer.step()
    before, state = identities(model), copy.deepcopy(model.state_dict())
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    slots = {p: slot["momentum_buffer"].clone() for p, slot in optimizer.state.items()}
    random, calls = torch.get_rng_state(), []

    def loss(output, batch):
        calls.append(1)
        if len(calls) == when:
            raise KeyboardInterrupt
        return output.mean()

    with pytest.raises(KeyboardInterrupt):
        convert_(model, "layer", batches=[x], loss=loss, optimizer=optimizer)
    assert identities(model) == before
    assert torch.equal(torch.get_rng_state(), random)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert torch.equal(parameter.grad, gradient)
    assert {p: slot["momentum_buffer"] for p, slot in optimizer.state.items()}.keys() == slots.keys()
    for parameter, slot in slots.items():
        assert torch.equal(optimizer.state[parameter]["momentum_buffer"], slot)


def test_weights_that_are_set_stay_bound_and_begin_anew():
    model, x = network(torch.float32), torch.randn(6, 2, 7, 6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(x).square().mean().backward()
    optimizer.step()
    norms, held = (model[1], model[4]), list(optimizer.param_groups[0]["params"])
    change = convert_(model, "layer", batches=[x], optimizer=optimizer)
    assert all(a is b for a, b in zip(model.parameters(), held, strict=True))
    assert optimizer.param_groups[0]["params"] == held
    for norm in norms:
        assert norm.weight not in optimizer.state
    assert model[0].weight in optimizer.state
    assert {one.note for one in change.log} == {"1 group; state in the optimizer dropped"}


def test_digits_are_recognised_again():
    """Carried over, the weights of a batch norm are no use to a group norm; made to fit, most of it is there again."""
    with seeded(0):
        model = digits.model()
        optimizer = digits.optimizer(model.parameters())
        for epoch in range(4):
            for batch in digits.batches("train", 32, epoch):
                optimizer.zero_grad()
                digits.loss(model(batch[0]), batch).backward()
                optimizer.step()
    data = list(digits.batches("train", 64, 99))[:6]
    test = list(digits.batches("test", 360, 0))

    def accuracy(one):
        with torch.no_grad():
            return digits.metrics(one.eval()(test[0][0]), test[0])["accuracy"]

    carried, fitted, layer, positions = (copy.deepcopy(model) for _ in range(4))
    naive = convert_(carried, "group", batches=data, loss=digits.loss, method=None).difference
    change = convert_(fitted, "group", batches=data, loss=digits.loss).difference
    assert accuracy(model) > 0.9
    assert accuracy(carried) < accuracy(model) - 0.2
    assert accuracy(fitted) > accuracy(carried) + 0.15
    assert change.loss_before == pytest.approx(naive.loss_before)
    assert change.loss_after < naive.loss_after / 2
    assert change.relative[0] < naive.relative[0] / 1.5
    per_sample = convert_(layer, "layer", batches=data).difference
    per_position = convert_(positions, "channel_layer", batches=data).difference
    assert change.relative[0] == pytest.approx(per_sample.relative[0], rel=1e-3)  # one group is the least error here
    assert per_sample.relative[0] < per_position.relative[0]
    with torch.no_grad():
        losses = [float(digits.loss(fitted(batch[0]), batch)) for batch in data]
    assert change.loss_after == pytest.approx(np.mean(losses), rel=1e-5)
    assert change.samples == 6 * 64
    assert "before" in repr(change)
