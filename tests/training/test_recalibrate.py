"""Statistics from data against those of the data concatenated, in NumPy float64."""

from __future__ import annotations

import copy
import itertools
import random
from collections import namedtuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, TensorDataset

import steadynorm
from steadynorm import models
from steadynorm.errors import InputError, NonFiniteStatisticsError
from steadynorm.recipes import digits
from steadynorm.training import recalibrate_
from steadynorm.training.layer_inputs import LayerInputs

EPS = 1e-5


def channels_first(x):
    """(N, C, *) as (values, C) in float64."""
    return np.moveaxis(x.detach().double().numpy(), 1, -1).reshape(-1, x.shape[1])


def assert_statistics(layer, values, rtol=1e-6):
    """`layer` holds mean and unbiased variance of `values` (values, C)."""
    values = channels_first(values) if isinstance(values, torch.Tensor) else values
    scale = values.std(0) + 1e-12
    np.testing.assert_allclose(
        layer.running_mean.double().numpy() / scale, values.mean(0) / scale, rtol=rtol, atol=rtol
    )
    np.testing.assert_allclose(layer.running_var.double().numpy(), values.var(0, ddof=1), rtol=rtol)


def network():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Conv2d(4, 5, 3),
        steadynorm.BatchNorm2d(5, activation="relu"),
        nn.Flatten(),
        nn.Linear(5 * 16, 3),
        nn.BatchNorm1d(3),
    )


def images(count, generator=None):
    return 5 + 2 * torch.randn(count, 3, 8, 8, generator=generator)


def bits(model):
    """Everything in a model that could change, as bytes."""
    tensors = {name: t.detach().numpy().tobytes() for name, t in (*model.named_parameters(), *model.named_buffers())}
    modes = {name: (m.training, len(m._forward_pre_hooks), len(m._forward_hooks)) for name, m in model.named_modules()}
    return tensors, modes


cuts = st.lists(st.integers(0, 41), max_size=6)


@given(cuts, st.booleans(), st.sampled_from([0.0, 1e4]))
def test_any_batching_gives_the_statistics_of_the_concatenated_data(at, is_ordered, offset):
    x = offset + torch.randn(41, 3, 4, generator=torch.Generator().manual_seed(len(at)))
    x = x[x[:, 0, 0].argsort()] if is_ordered else x
    layer = nn.BatchNorm1d(3)
    report = recalibrate_(layer, [part for part in x.tensor_split(sorted(at)) if len(part)])
    assert_statistics(layer, x)
    assert report.samples == 41


def test_ordered_batches_that_update_bn_gets_wrong():
    """https://github.com/keras-team/keras/issues/3949, statistics of the whole data: update_bn has 2.87 for 26.0."""
    x = torch.cat([-5 + torch.randn(64, 2), 5 + torch.randn(64, 2)])
    batches = list(x.split(8))
    theirs, ours = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    update_bn(batches, theirs)
    assert float(theirs.running_var.max()) < 3
    recalibrate_(ours, batches)
    assert_statistics(ours, x)
    assert float(ours.running_var.min()) > 20


def test_an_offset_that_one_pass_sums_lose():
    """fvcore's PreciseBN adds up squares in float32: 8.0 for a true variance of 1.0."""
    x = 5e3 + torch.randn(256, 2, 4, 4)
    summed = (x.square().mean((0, 2, 3)) - x.mean((0, 2, 3)).square()).double()
    layer = nn.BatchNorm2d(2)
    recalibrate_(layer, x.split(32))
    assert_statistics(layer, x)
    assert float((summed - 1).abs().max()) > 0.5


class Named(nn.Module):
    """A model that takes its input by name, beside other things."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x, scale=1.0):
        return self.norm(x) * scale


Pair = namedtuple("Pair", ["x", "y"])


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: x,
        lambda x: (x, torch.zeros(len(x))),
        lambda x: [x, torch.zeros(len(x))],
        lambda x: Pair(x, torch.zeros(len(x))),
        lambda x: {"x": x, "scale": torch.ones(1)},
        lambda x: ({"x": x}, torch.zeros(len(x))),
        lambda x: ((x, 2.0), torch.zeros(len(x))),
    ],
    ids=["tensor", "tuple", "list", "named tuple", "dict", "dict and target", "arguments and target"],
)
def test_batches_of_any_structure(wrap):
    x, model = torch.randn(30, 3), Named()
    report = recalibrate_(model, [wrap(part) for part in x.split(7)])
    assert_statistics(model.norm, x)
    assert (report.samples, report.batches) == (30, 5)


def test_a_function_calls_the_model_on_a_batch():
    x, model = torch.randn(30, 3), Named()
    batches = [{"a": {"b": part}} for part in x.split(7)]
    report = recalibrate_(model, lambda: iter(batches), forward=lambda model, batch: model(batch["a"]["b"]))
    assert_statistics(model.norm, x)
    assert report.samples == 30


def test_one_pass_normalises_by_the_batch_upstream():
    model, x = network(), images(40)
    model[1].running_mean.fill_(1e3)  # stale: nothing after it may see that
    batches = x.split(9)
    recalibrate_(model, batches)
    assert_statistics(model[1], model[0](x))
    plain = copy.deepcopy(model[:5])
    plain[3].p = 0.0
    assert_statistics(model[5], torch.cat([plain.train()(batch) for batch in batches]), rtol=1e-5)


@pytest.mark.parametrize("sizes", [(40,), (9, 31), (1,) * 40])
def test_layer_by_layer_is_what_evaluation_sees(sizes):
    """Every layer holds the statistics of what reaches it in evaluation, for any batching."""
    model, x = network(), images(40)
    report = recalibrate_(model, x.split(list(sizes)), method="layer_by_layer")
    model.eval()
    for place in (1, 5, 8):
        assert_statistics(model[place], model[:place](x), rtol=2e-5)
    assert report.passes == 3
    assert list(report.layers) == ["1", "5", "8"]


def test_layer_by_layer_with_branches():
    """A network with shortcuts: what reaches each layer in evaluation, seen by hooks of the test."""
    model = digits.model().train()
    x = digits.data()["train"][0][:200]
    report = recalibrate_(model, x.split(33), method="layer_by_layer")
    assert report.passes == len(report.layers) == 7
    reached = {}
    for layer in models.norms(model).values():
        layer.register_forward_pre_hook(lambda layer, args: reached.update({layer: args[0]}))
    with torch.no_grad():
        model.eval()(x)
    assert len(reached) == 7
    for layer, values in reached.items():
        assert_statistics(layer, values, rtol=1e-5)


def test_the_two_methods_differ_only_behind_the_first_layer():
    """`layer_by_layer` is not the other method under another name: on ragged batches they differ."""
    model, x = network(), images(40).cumsum(0)  # batches that differ
    other = copy.deepcopy(model)
    recalibrate_(model, x.split(8))
    recalibrate_(other, x.split(8), method="layer_by_layer")
    assert torch.equal(model[1].running_mean, other[1].running_mean)
    assert not torch.allclose(model[5].running_var, other[5].running_var, rtol=0.05)


def test_layer_by_layer_keeps_nothing_for_itself_between_passes():
    model, x = network(), images(40)
    other = copy.deepcopy(model)
    model[5].running_mean.fill_(300.0)
    for one in (model, other):
        recalibrate_(one, x.split(9), method="layer_by_layer")
    for one, two in zip(model.buffers(), other.buffers(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("method", ["one_pass", "layer_by_layer"])
def test_only_statistics_change_and_undo_puts_them_back(method):
    model = network().train()
    model[4].eval()
    before, x = bits(model), images(40)
    state = torch.get_rng_state()
    report = recalibrate_(model, DataLoader(TensorDataset(x), batch_size=7, shuffle=True), method=method)
    assert torch.equal(torch.get_rng_state(), state)
    after = bits(model)
    changed = {name for name in before[0] if before[0][name] != after[0][name]}
    assert changed == {f"{place}.running_{what}" for place in (1, 5, 8) for what in ("mean", "var")}
    assert before[1] == after[1]
    report.undo()
    assert bits(model) == before


def test_statistics_keep_their_place_in_memory():
    model = network()
    buffers = dict(model.named_buffers())
    recalibrate_(model, [images(20)])
    assert all(buffer is buffers[name] for name, buffer in model.named_buffers())


def frozen_network():
    return nn.Sequential(
        steadynorm.BatchNorm2d(3).freeze_(),
        steadynorm.FrozenBatchNorm2d(3),
        nn.BatchNorm2d(3),
        nn.BatchNorm2d(3, track_running_stats=False),
        nn.InstanceNorm2d(3, track_running_stats=True),
        nn.BatchNorm2d(3).eval(),
        nn.BatchNorm2d(3),
    )


def test_what_is_frozen_is_never_touched():
    """https://github.com/Lightning-AI/pytorch-lightning/issues/8811: update_bn took a layer frozen at 9.0 to 0.13."""
    model, x = frozen_network(), images(16)
    before = bits(model)
    report = recalibrate_(model, [x])
    after = bits(model)
    changed = {name.split(".")[0] for name in before[0] if before[0][name] != after[0][name]}
    assert changed == {"2", "6"}
    assert before[1] == after[1]
    assert set(report.left_out) == {"0", "1", "3", "4", "5"}
    assert "frozen" in report.left_out["0"]
    assert "frozen" in report.left_out["5"]
    assert "left out: 1 is frozen" in str(report)


@pytest.mark.parametrize("layers", ["0", ["0", "1"], lambda path, layer: path in "01"])
def test_choosing_only_frozen_layers_is_an_error(layers):
    with pytest.raises(InputError, match="0 is frozen"):
        recalibrate_(frozen_network(), [images(16)], layers=layers)


@pytest.mark.parametrize("layers", ["[58]", ["5", "8"], lambda path, layer: path != "1"])
def test_only_chosen_layers_are_touched(layers):
    model = network()
    report = recalibrate_(model, [images(20)], layers=layers)
    assert list(report.layers) == ["5", "8"]
    assert model[1].running_mean.eq(0).all()


@pytest.mark.parametrize(
    "kind",
    [
        steadynorm.BatchNorm2d,
        lambda c: steadynorm.GhostBatchNorm2d(c, ghost_size=4),
        steadynorm.BatchRenorm2d,
        nn.SyncBatchNorm,
        lambda c: steadynorm.BatchNorm2d(c, momentum=None, debias=True),
        lambda c: steadynorm.BatchNorm2d(c, track_running_stats=True).bfloat16().float(),
    ],
)
def test_every_kind_of_batch_norm(kind):
    model, x = nn.Sequential(kind(3), nn.Conv2d(3, 2, 1), kind(2)), images(30)
    report = recalibrate_(model, x.split(8), method="layer_by_layer")
    assert_statistics(model[0], x)
    assert_statistics(model[2], model.eval()[:2](x), rtol=1e-5)
    assert set(report.layers) == {"0", "2"}


@pytest.mark.parametrize(
    ("layer", "extra"),
    [
        (lambda: steadynorm.DomainBatchNorm1d(3, num_domains=2), torch.zeros(8, dtype=torch.long)),
        (lambda: steadynorm.StepBatchNorm1d(3, steps=2), 0),
    ],
)
def test_layers_by_domain_or_step_are_named_as_left_out(layer, extra):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.rows, self.plain = layer(), nn.BatchNorm1d(3)

        def forward(self, x):
            return self.plain(self.rows(x, extra))

    model = Model()
    report = recalibrate_(model, [torch.randn(8, 3)])
    assert list(report.layers) == ["plain"]
    assert "each domain or step" in report.left_out["rows"]


def test_layers_that_always_move_do_not_move_meanwhile():
    model = nn.Sequential(nn.BatchNorm2d(3), steadynorm.BatchNorm2d(3))
    model[1].update_running = True
    before = bits(model)[0]
    recalibrate_(model, images(32).split(8), layers="0")
    assert all(bits(model)[0][name] == before[name] for name in before if name.startswith("1."))
    assert model[1].update_running is True


@pytest.mark.parametrize("by", ["mask", "lengths"])
def test_padding_is_left_out(by):
    x, lengths = 3 + torch.randn(12, 3, 10), torch.arange(12) % 10 + 1
    mask = torch.arange(10) < lengths[:, None]
    padded = torch.where(mask[:, None], x, 1e6)
    given = {"mask": mask, "lengths": lengths}[by]
    layer = steadynorm.BatchNorm1d(3)
    recalibrate_(layer, [{"input": a, by: b} for a, b in zip(padded.split(5), given.split(5), strict=True)])
    assert_statistics(layer, x.movedim(1, -1)[mask].double().numpy())


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = self.again = nn.BatchNorm1d(2)

    def forward(self, x):
        return self.norm(x[:, :2]) + self.again(x[:, 2:])


def test_a_shared_layer_has_the_statistics_of_all_its_calls():
    model, x = Shared(), torch.randn(30, 4) * torch.tensor([1.0, 2, 3, 4])
    report = recalibrate_(model, x.split(8))
    assert_statistics(model.norm, torch.cat([x[:, :2], x[:, 2:]]))
    assert list(report.layers) == ["norm"]


def test_a_layer_that_is_never_called_is_left_out():
    model = nn.ModuleDict({"used": nn.BatchNorm1d(2), "unused": nn.BatchNorm1d(2)})
    report = recalibrate_(model, [torch.randn(8, 2)], forward=lambda model, batch: model["used"](batch))
    assert report.left_out == {"unused": "was never called"}
    assert model["unused"].running_mean.tolist() == [0, 0]


def test_half_precision_models():
    model, x = nn.BatchNorm2d(3).bfloat16(), images(64).bfloat16()
    recalibrate_(model, x.split(8))
    assert_statistics(model, x, rtol=2**-8)


# What leaves the model as it was.


def raising(batches):
    yield from batches
    raise OSError("the disk is gone")


def interrupted(batches):
    yield from batches
    raise KeyboardInterrupt("stop")


def batches_of(count=5):
    return [images(8) for _ in range(count)]


@pytest.mark.parametrize("method", ["one_pass", "layer_by_layer"])
@pytest.mark.parametrize(
    ("source", "options", "error", "match"),
    [
        (lambda: iter(()), {}, InputError, "batches is empty"),
        (lambda: raising(batches_of()), {}, OSError, "the disk is gone"),
        (lambda: interrupted(batches_of()), {}, KeyboardInterrupt, "stop"),
        (lambda: iter(batches_of()), {"samples": 41}, InputError, "ended after 40 samples, expected samples=41"),
        (lambda: iter([*batches_of(), torch.zeros(2, 7, 8, 8)]), {}, RuntimeError, "channels"),
        (lambda: iter([*batches_of(), images(8) * torch.nan]), {}, NonFiniteStatisticsError, "1 got .* batch number 5"),
        (lambda: iter([images(8) * torch.inf]), {}, NonFiniteStatisticsError, "batch number 0"),
        (lambda: iter([torch.zeros(0, 3, 8, 8)]), {}, InputError, "no batch norm was called"),
    ],
    ids=["empty", "raises", "interrupted", "ends early", "misfit", "nan", "inf", "no samples"],
)
def test_a_failure_leaves_the_model_as_it_was(method, source, options, error, match):
    model = network().train()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before, python, numpy = bits(model), random.getstate(), np.random.get_state()[1].tobytes()
    with pytest.raises(error, match=match):
        recalibrate_(model, source, method=method, **options)
    assert bits(model) == before
    assert random.getstate() == python
    assert np.random.get_state()[1].tobytes() == numpy
    assert model[0].weight.grad is not None


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"method": "sequential"}, "'one_pass', 'layer_by_layer', got 'sequential'"),
        ({"samples": 0}, "samples must be positive"),
        ({"tolerance": 0.0}, "tolerance must be positive"),
        ({"layers": "nothing"}, "got 'nothing'"),
    ],
)
def test_bad_options(options, match):
    with pytest.raises(InputError, match=match):
        recalibrate_(network(), [images(8)], **options)


def test_bad_data():
    with pytest.raises(InputError, match="expected an iterable of batches"):
        recalibrate_(network(), images(8))
    with pytest.raises(InputError, match="an iterator can be gone through once"):
        recalibrate_(network(), iter([images(8)]), method="layer_by_layer")
    with pytest.raises(InputError, match="fewer than two values"):
        recalibrate_(nn.BatchNorm1d(3), [torch.randn(1, 3)])


def test_models_without_anything_to_do():
    with pytest.raises(InputError, match="no batch norm"):
        recalibrate_(nn.Linear(2, 2), [torch.randn(4, 2)])
    with pytest.raises(InputError, match="without values"):
        recalibrate_(nn.LazyBatchNorm1d(), [torch.randn(4, 2)])


# When it is enough.


def test_it_stops_after_enough_samples():
    model, drawn = nn.BatchNorm1d(2), []

    def endless():
        while True:
            drawn.append(torch.randn(8, 2))
            yield drawn[-1]

    report = recalibrate_(model, endless, samples=100)
    assert report.samples == 104
    assert report.stopped == "samples"
    assert_statistics(model, torch.cat(drawn))


def test_it_stops_by_itself_when_the_statistics_are_known():
    """The error that it reports is the one that there is: over many repetitions, about that many deviations."""
    errors = []
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        layer = nn.BatchNorm1d(1)
        report = recalibrate_(
            layer, (torch.randn(16, 1, generator=generator) for _ in itertools.count()), tolerance=0.05
        )
        assert report.stopped == "tolerance"
        assert 200 < report.samples < 1200
        errors.append(float(layer.running_mean))
    assert 0.025 < np.std(errors) < 0.055


def correlated(count, generator):
    """Images of one value each, and a little noise: 16 positions say hardly more than one."""
    return torch.randn(count, 1, 1, 1, generator=generator) + 0.05 * torch.randn(count, 1, 4, 4, generator=generator)


def test_values_of_a_sample_that_resemble_each_other_count_as_one():
    known, spread = [], []
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        layer = nn.BatchNorm2d(1)
        report = recalibrate_(layer, [correlated(16, generator) for _ in range(16)])
        known.append(report.standard_error)
        spread.append([float(layer.running_mean), float(layer.running_var.sqrt())])
    truth = np.std(spread, axis=0).max()
    assert truth == pytest.approx(1 / 16, rel=0.35)
    assert np.median(known) == pytest.approx(truth, rel=0.4)
    # What 4096 independent values would be known to.
    assert np.median(known) > 3 / 4096**0.5


@pytest.mark.parametrize("order", ["blocks", "strides"])
def test_rows_of_one_sample_count_as_one_in_either_order(order):
    """(N, T) samples folded into (N·T, C), sample by sample or step by step."""
    x = torch.randn(256, 1, 1).expand(256, 8, 1)

    def fold(model, batch):
        return model((batch if order == "blocks" else batch.movedim(0, 1)).reshape(-1, 1))

    report = recalibrate_(nn.BatchNorm1d(1), x.split(16), forward=fold)
    assert report.standard_error == pytest.approx(1 / 16, rel=0.5)


def test_batches_whose_samples_resemble_each_other_are_seen():
    x = torch.randn(16, 1).repeat_interleave(16, 0)
    report = recalibrate_(nn.BatchNorm1d(1), x.split(16))
    assert report.standard_error == pytest.approx(1 / 4, rel=0.6)


def test_the_standard_error_is_that_of_the_cluster_estimator():
    """Against the formula long-hand: ratio estimators over samples of different length."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 9, 40)
    x = rng.standard_normal((40, 1, 8)) + 1e3 + rng.standard_normal((40, 1, 1))
    mask = np.arange(8) < lengths[:, None]
    values = x[:, 0][mask]
    mean, var, n = values.mean(), values.var(), len(values)
    t = np.array([(x[i, 0, : lengths[i]] - mean).sum() for i in range(40)])
    q = np.array([((x[i, 0, : lengths[i]] - mean) ** 2 - var).sum() for i in range(40)])
    deviation = np.sqrt(var + EPS)
    expected = max(
        np.sqrt((t**2).sum() * 40 / 39) / n / deviation, np.sqrt((q**2).sum() * 40 / 39) / n / (2 * deviation**2)
    )
    inputs = LayerInputs({"": (layer := steadynorm.BatchNorm1d(1).double().eval())})
    with inputs.watching():
        for part, valid in zip(np.split(x, [3, 20]), np.split(mask, [3, 20]), strict=True):
            inputs.begin(len(part))
            layer(torch.from_numpy(part), mask=torch.from_numpy(valid))
            inputs.end()
    assert float(inputs.pools[""].standard_error(EPS)) == pytest.approx(expected, rel=1e-9)


def test_data_that_ends_before_the_tolerance_is_told():
    report = recalibrate_(nn.BatchNorm1d(2), [torch.randn(8, 2)], tolerance=1e-3)
    assert report.stopped == "end of data"
    assert report.standard_error > 1e-3


def test_progress_is_told():
    seen = []
    recalibrate_(network(), [images(4)] * 3, method="layer_by_layer", progress=lambda *at: seen.append(at))
    assert seen == [(i, 9) for i in range(1, 10)]
    recalibrate_(network(), iter([images(4)] * 2), progress=lambda *at: seen.append(at))
    assert seen[-1] == (2, None)


def test_a_bar_that_fails_is_a_failure_like_any_other():
    def progress(done, total):
        raise BrokenPipeError

    model = network()
    before = bits(model)
    with pytest.raises(BrokenPipeError):
        recalibrate_(model, batches_of(), progress=progress)
    assert bits(model) == before


def test_the_report_can_be_read():
    model = network()
    model[1].running_mean.fill_(7.0)
    x = images(64)
    report = recalibrate_(model, x.split(8), layers="1")
    (moved,) = report.layers.values()
    values = channels_first(model[0](x))
    deviation = np.sqrt(values.var(0, ddof=1) + EPS)
    assert moved.mean_shift == pytest.approx((np.abs(values.mean(0) - 7) / deviation).max(), rel=1e-4)
    ratio = deviation / np.sqrt(1 + EPS)
    assert moved.deviation_ratio == pytest.approx(ratio[np.abs(np.log(ratio)).argmax()], rel=1e-4)
    first, second = str(report).splitlines()
    assert repr(report) == str(report)
    assert first.startswith("Recalibrated (one pass): 1 layer from 64 samples in 8 batches, standard error at most 0.")
    assert f"1  mean moved {moved.mean_shift:.3g} deviations, deviation times {moved.deviation_ratio:.3g}" in second


def compiled_inside(model):
    return nn.Sequential(torch.compile(model, backend="eager"))


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager"), compiled_inside]
)
def test_wrapped_models(wrap):
    model, x = network(), images(20)
    recalibrate_(wrap(model), [x])
    assert_statistics(model[1], model[0](x))


# Wrong on purpose: what the tests above would have to see.


def test_an_average_of_variances_would_be_caught():
    x = torch.cat([-5 + torch.randn(20, 3, 4), 5 + torch.randn(21, 3, 4)])
    layer = nn.BatchNorm1d(3)
    recalibrate_(layer, x.split(8))
    assert_statistics(layer, x)
    layer.running_var.copy_(torch.stack([part.movedim(1, -1).reshape(-1, 3).var(0) for part in x.split(8)]).mean(0))
    with pytest.raises(AssertionError):
        assert_statistics(layer, x)


@pytest.mark.parametrize("name", ["training", "dropout", "biased"])
def test_other_mistakes_would_be_caught(name):
    model, x = network(), images(40)
    recalibrate_(model, [x], method="layer_by_layer")
    model.eval()
    assert_statistics(model[8], model[:8](x), rtol=2e-5)
    if name == "training":
        model[1].train()
    elif name == "dropout":
        model[3].train()
    else:
        model[8].running_var.mul_(39 / 40)
    with pytest.raises(AssertionError):
        assert_statistics(model[8], model[:8](x), rtol=2e-5)


def test_running_statistics_of_the_model_survive_its_own_use():
    """After recalibration training goes on as ever: nothing is left on the layers."""
    model = network()
    recalibrate_(model, [images(20)])
    untouched = network()
    untouched.load_state_dict(model.state_dict())
    x = images(12)
    for one in (model, untouched):
        torch.manual_seed(0)
        one.train()(x).square().mean().backward()
    for one, two in zip(model.buffers(), untouched.buffers(), strict=True):
        assert torch.equal(one, two)
    assert all(models.uses_batch_statistics(layer) for layer in models.norms(model).values())
