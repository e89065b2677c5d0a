"""What keeps a rule silent, or makes a note of it: one guard at a time."""

import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn

import steadynorm
from steadynorm import doctor
from steadynorm.doctor.evidence import judged
from steadynorm.errors import InputError
from steadynorm.probe import Facts
from steadynorm.probe.facts import Drift, Effect
from tests.doctor.networks import NeverEvaluates, mlp


def images():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(16, 1, 8, 8, generator=generator) for _ in range(4)]


def findings(code, *layers):
    model = nn.Sequential(*layers)
    return [(f.where, f.severity) for f in doctor.examine(model, images(), select=[code]).findings]


def conv_and(norm):
    return nn.Conv2d(1, 8, 3, bias=False), norm


def dense_and(norm):
    return nn.Flatten(), nn.Linear(64, 8), norm


def toggled():
    norm = nn.BatchNorm2d(8)
    norm.track_running_stats = False
    return norm


def evaluating(norm):
    return norm.eval()


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (dense_and(nn.GroupNorm(8, 8)), [("2", "error")]),
        (dense_and(steadynorm.GroupNorm(4, 8)), [("2", "warning")]),
        (dense_and(nn.GroupNorm(2, 8)), []),
        ((nn.Flatten(), nn.Linear(64, 1), nn.LayerNorm(1)), [("2", "error")]),
        ((nn.Flatten(), nn.Linear(64, 2), nn.LayerNorm(2)), [("2", "warning")]),
        ((nn.Flatten(), nn.Linear(64, 1), steadynorm.RMSNorm(1)), [("2", "error")]),
        ((nn.Flatten(), nn.Linear(64, 2), nn.RMSNorm(2)), []),
        (conv_and(nn.GroupNorm(8, 8)), []),
        ((nn.Conv2d(1, 8, (8, 7)), nn.InstanceNorm2d(8)), [("1", "warning")]),
        ((nn.Conv2d(1, 8, 8), nn.InstanceNorm2d(8, track_running_stats=True)), []),
        ((nn.Conv2d(1, 8, 8), nn.BatchNorm2d(8)), []),
    ],
)
def test_values_per_statistic(layers, expected):
    assert findings("SN103", *layers) == expected


@pytest.mark.parametrize("momentum", [1.0, 0.4, 0.1, 0.0, None])
def test_momenta_that_are_meant(momentum):
    assert findings("SN108", *conv_and(nn.BatchNorm2d(8, momentum=momentum))) == []


@pytest.mark.parametrize("cls", [nn.BatchNorm2d, steadynorm.BatchNorm2d, nn.SyncBatchNorm])
def test_momenta_of_elsewhere_are_found_in_every_batch_norm(cls):
    assert findings("SN108", *conv_and(cls(8, momentum=0.9))) == [("1", "warning")]
    assert findings("SN110", *conv_and(cls(8, momentum=0))) == [("1", "error")]


def test_a_momentum_does_not_matter_where_nothing_moves():
    frozen = steadynorm.BatchNorm2d(8, momentum=0.9).freeze_()
    assert findings("SN108", *conv_and(frozen)) == []
    assert findings("SN110", *conv_and(evaluating(nn.BatchNorm2d(8, momentum=0.0)))) == []
    assert findings("SN108", *conv_and(nn.InstanceNorm2d(8, momentum=0.9, track_running_stats=True))) == []


def test_momentum_zero_is_a_note_where_the_statistics_fit():
    layers = conv_and(nn.BatchNorm2d(8, momentum=None))
    model = nn.Sequential(*layers)
    for x in images():
        model(x)
    layers[1].momentum = 0.0
    result = doctor.examine(model, images(), select=["SN110", "SN203"])
    assert [(f.code, f.severity) for f in result.findings] == [("SN110", "note")]


def test_toggling_is_found_where_training_would_use_the_batch():
    assert findings("SN205", *conv_and(toggled())) == [("1", "error")]
    assert findings("SN205", *conv_and(evaluating(toggled()))) == []
    assert findings("SN205", *conv_and(nn.BatchNorm2d(8, track_running_stats=False))) == []


@pytest.mark.parametrize(
    ("frozen", "expected"),
    [
        ("backbone", [("0.1", "warning")]),
        ("layer alone", []),
        ("norm alone", []),
        ("everything", []),
        ("nothing", []),
    ],
)
def test_a_norm_moves_with_what_feeds_it(frozen, expected):
    backbone = nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())
    model = nn.Sequential(backbone, nn.Linear(288, 4))
    parts = {"backbone": backbone, "layer alone": backbone[0], "norm alone": backbone[1], "everything": model}
    parts.get(frozen, nn.Identity()).requires_grad_(False)
    found = doctor.examine(model, images(), select=["SN302"]).findings
    assert [(f.where, f.severity) for f in found] == expected


def test_evaluation_that_moves_statistics_is_seen_through_a_wrong_train():
    found = doctor.examine(NeverEvaluates(), images(), select=["SN301"]).findings
    assert [(f.where, f.severity) for f in found] == [("net.4", "error")]


def test_zero_gammas_are_no_dead_channels_and_most_of_a_layer_may_be():
    norm = nn.BatchNorm2d(8)
    nn.init.zeros_(norm.weight)
    assert findings("SN112", *conv_and(norm)) == []
    with torch.no_grad():
        norm.weight[0] = 1
    assert findings("SN112", *conv_and(norm)) == [("1", "note")]


def test_lost_statistics_are_no_fault_of_a_model_that_was_never_trained():
    assert findings("SN201", *dense_and(nn.BatchNorm1d(8))) == []
    model = mlp()
    nn.init.uniform_(model[2].bias)
    found = doctor.examine(model, [3 * x + 2 for x in images()], select=["SN201", "SN203"]).findings
    assert [(f.code, f.where) for f in found] == [("SN201", "2")]
    assert found[0].severity != "note"


def test_a_cast_model_gets_one_note_for_all_its_layers():
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)).bfloat16()
    found = doctor.examine(model, [x.bfloat16() for x in images()], select=["SN206"]).findings
    assert [(f.severity, f.where, f.evidence["layers"]) for f in found] == [("note", "", 2)]
    assert found[0].evidence["stalls at this distance, relative"] == pytest.approx(2**-9 / 0.1)


@pytest.mark.parametrize("code", ["SN209", "SN407", "SN503", "SN701"])
def test_what_is_off_by_default_runs_when_it_is_selected(code):
    model = nn.Sequential(*conv_and(nn.BatchNorm2d(8)))
    assert code not in doctor.examine(model, images()).checked
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    given = {"train_batches": images(), "optimizer": optimizer}
    assert doctor.examine(model, images(), select=[code], **given).checked == (code,)


def test_a_program_is_read_and_left_alone():
    net = nn.Sequential(*conv_and(nn.BatchNorm2d(8)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing is deprecated, and warns of much else
        model = torch.jit.trace(net.train(), images()[0], check_trace=False)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    result = doctor.examine(nn.Sequential(nn.Identity(), model), images(), train_batches=images())
    assert [(f.code, f.where) for f in result.findings] == [("SN802", "1.1")]
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all("compiled program" in reason for code, reason in result.unchecked.items() if code != "SN702")


@pytest.mark.parametrize("kept", ["the norms", "the head", "everything"])
def test_a_norm_is_left_out_where_its_neighbours_are_not(kept):
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
    parts = {"the norms": [model[0], model[4]], "the head": [model[4]], "everything": [model]}
    optimizer = torch.optim.SGD([p for part in parts[kept] for p in part.parameters()], lr=0.1)
    found = doctor.examine(model, images(), select=["SN702"], optimizer=optimizer).findings
    assert [f.where for f in found] == (["1"] if kept == "the norms" else [])


def test_a_norm_that_replaced_another_after_the_optimizer_was_made_is_left_out():
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model[1] = nn.GroupNorm(2, 8)
    (found,) = doctor.examine(model, images(), select=["SN702"], optimizer=optimizer).findings
    assert found.where == "1"
    assert found.evidence["parameters of the optimizer that the model does not have"] == 2


@pytest.mark.parametrize(("old_is_held", "expected"), [(True, ["2.1"]), (False, [])])
def test_a_head_that_came_after_the_optimizer_is_left_out(old_is_held, expected):
    head, old = (nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)) for _ in range(2))
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), head)
    held = [*model[0].parameters(), *(old.parameters() if old_is_held else ())]
    found = doctor.examine(model, images(), select=["SN702"], optimizer=torch.optim.SGD(held, lr=0.1)).findings
    assert [f.where for f in found] == expected


def test_a_body_before_a_head_of_its_own_optimizer_is_no_fault():
    """The optimizer holds the head, and something that the model does not have, such as weights of the loss."""
    model = nn.Sequential(*conv_and(nn.BatchNorm2d(8)), nn.Flatten(), nn.Linear(288, 4))
    optimizer = torch.optim.SGD([*model[3].parameters(), nn.Parameter(torch.ones(2))], lr=0.1)
    assert doctor.examine(model, images(), select=["SN702"], optimizer=optimizer).findings == ()


def test_a_small_rest_of_the_beginning_is_much_beside_data_that_hardly_varies():
    """After 80 steps 0.0002 of the variance of 1 are left; that of the data is 1e-6."""
    model, batches = nn.Sequential(*conv_and(nn.BatchNorm2d(8)), nn.ReLU()), [1e-3 * x for x in images()]
    nn.init.uniform_(model[1].bias)
    for x in batches * 20:
        model(x)
    result = doctor.examine(model, batches, select=["SN109", "SN111", "SN203"])
    assert {(f.code, f.where) for f in result.findings} == {("SN109", "1"), ("SN111", "1")}
    assert result.facts.norms["1"].below_eps == 0  # as stored


class Sampling(nn.Sequential):
    """Draws with dropout in evaluation, by all of itself or by its dropout."""

    def __init__(self, is_whole):
        super().__init__(*dense_and(nn.BatchNorm1d(8)), nn.Dropout(), nn.Linear(8, 4))
        self.is_whole = is_whole

    def forward(self, x):
        was = self.training
        (self if self.is_whole else self[3]).train()
        try:
            return super().forward(x)
        finally:
            self.train(was)


def test_dropout_is_drawn_by_a_forward_that_trains():
    def found(model):
        return [(f.where, f.severity) for f in doctor.examine(model, images(), select=["SN308"]).findings]

    assert found(Sampling(is_whole=True)) == [("2", "error")]
    assert found(Sampling(is_whole=False)) == []


def test_training_in_evaluation_mode_is_said_once_for_each_layer():
    """The step shows it, and so does the state: trained weights that fit statistics that never moved."""
    torch.manual_seed(0)
    x = images()
    batches = [(one, 3 * one.mean((1, 2, 3))[:, None]) for one in x]
    model = nn.Sequential(*conv_and(nn.BatchNorm2d(8)), nn.Flatten(), nn.Linear(288, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def loss(output, batch):
        return (output - batch[1]).square().mean()

    def step(model, batch):
        model.eval()
        optimizer.zero_grad()
        loss(model(batch[0]), batch).backward()
        optimizer.step()

    for batch in batches * 20:
        step(model, batch)
    given = {"train_batches": batches, "loss": loss, "optimizer": optimizer, "select": ["SN305"]}
    assert [f.where for f in doctor.examine(model, batches, step=step, **given).findings] == ["1"]
    assert [f.where for f in doctor.examine(model, batches, **given).findings] == [""]  # the step is not known


@pytest.mark.parametrize(("asked", "expected"), [(1, []), (3, [("SN304", "")])])
def test_an_optimizer_may_ask_for_the_loss_once(asked, expected):
    model = nn.Sequential(*conv_and(nn.BatchNorm2d(8)), nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8))
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.01, max_iter=asked)

    def step(model, batch):
        def closure():
            optimizer.zero_grad()
            value = model(batch).square().mean()
            value.backward()
            return value

        optimizer.step(closure)

    found = doctor.examine(model, images(), train_batches=images(), step=step, select=["SN304"]).findings
    assert [(f.code, f.where) for f in found] == expected


def test_layers_that_are_stale_for_one_reason_are_judged_together():
    def effect(before):
        return Effect(samples=64, distance=before, relative_square=before, null=0.01, loss=(1 + before, 1.0))

    drifts = {path: Drift(path, 1.0, 0.001, 0.0, 2.0, effect=effect(0.01)) for path in ("a", "b")}
    facts = Facts(drift=drifts, drift_together=effect(0.5))
    assert judged(effect(0.01), facts, ["a", "b"])[0] == "warning"
    assert judged(effect(0.5), facts, ["a", "b"])[0] == "error"
    assert judged(effect(0.01), facts, ["a"])[0] == "note"  # the other one may be all there is to it
    assert judged(effect(0.01), replace(facts, drift_together=effect(0.01)), ["a", "b"])[0] == "note"
    assert judged(effect(0.01), Facts(drift={"a": drifts["a"]}, drift_together=effect(0.5)), ["a"])[0] == "note"


@pytest.mark.parametrize("whose", ["all values", "each channel"])
def test_inputs_that_lack_a_mean_and_a_deviation_of_the_datas_own_are_told_by_the_training_batches(whose):
    torch.manual_seed(0)
    raw = (
        torch.rand(512, 3, 8, 8) ** 2
        * torch.tensor([1.0, 1.0, 1.0] if whose == "all values" else [1.0, 20.0, 90.0])[:, None, None]
    )
    mean, deviation = (
        (raw.mean(), raw.std())
        if whose == "all values"
        else (raw.mean((0, 2, 3), True), raw.std((0, 2, 3), keepdim=True))
    )
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    nn.init.uniform_(model[1].bias)
    trained = list(((raw - mean) / deviation).split(32))
    for x in trained * 6:
        model(x)

    def found(batches):
        return [
            (f.severity, f.where)
            for f in doctor.examine(model, batches, train_batches=trained).findings
            if f.code == "SN405"
        ]

    assert found(list(raw.split(32))) == [("error", "")]
    assert found(trained) == []
    assert found([1.2 * x + 0.3 for x in trained]) == []  # the data's own, as far as can be told
    assert doctor.examine(model, list(raw.split(32)), select=["SN405"]).findings == ()


@pytest.mark.parametrize("behind", [nn.Identity(), nn.LayerNorm(8)])
def test_features_in_units_of_their_own_drown_each_other(behind):
    def found(scales, first=None):
        model = nn.Sequential(first or nn.Identity(), nn.Linear(6, 8), behind, nn.ReLU(), nn.Linear(8, 2))
        x = torch.randn(64, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor(scales)
        batches = list(x.split(16))
        return [f.where for f in doctor.examine(model, batches, train_batches=batches, select=["SN406"]).findings]

    assert found([5.0, 0.01, 0.02, 0.03, 1.0, 1.0]) == ["1"]
    assert found([5.0, 0.01, 0.02, 0.03, 1.0, 1.0], nn.BatchNorm1d(6)) == []
    assert found([5.0, 0.1, 0.2, 0.3, 1.0, 1.0]) == []


def test_a_column_for_each_category_is_not_too_small():
    letters = torch.randint(0, 200, (64,), generator=torch.Generator().manual_seed(0))
    batches = list(nn.functional.one_hot(letters, 200).float().split(16))
    model = nn.Sequential(nn.Linear(200, 8), nn.ReLU(), nn.Linear(8, 2))
    assert doctor.examine(model, batches, train_batches=batches, select=["SN406"]).findings == ()


@pytest.mark.parametrize("wrong", ["sgd", lambda parameters: None, lambda: None])
def test_what_is_no_optimizer_is_refused(wrong):
    with pytest.raises(InputError, match="expected an optimizer of torch"):
        doctor.examine(mlp(), images(), optimizer=wrong)


def test_batches_that_differ_do_not_matter_without_statistics_of_batches():
    apart = [x + i for i, x in enumerate(images() * 4)]
    for norm, expected in ((nn.BatchNorm2d(8), ["SN401"]), (nn.GroupNorm(2, 8), [])):
        model = nn.Sequential(*conv_and(norm))
        found = doctor.examine(model, images(), train_batches=apart, select=["SN401"]).findings
        assert [f.code for f in found] == expected


def test_statistics_that_leave_out_the_beginning_have_no_residue():
    layer = steadynorm.BatchNorm2d(8, momentum=0.003, debias=True)
    model = nn.Sequential(*conv_and(layer), nn.ReLU())
    nn.init.uniform_(layer.bias)
    for _ in range(30):
        model(5 + images()[0])
    assert doctor.examine(model, [5 + x for x in images()], select=["SN109"]).findings == ()


def test_pixels_in_images_with_a_plain_border_are_no_padding():
    plain = [torch.nn.functional.pad(x[..., :5], (0, 3)) for x in images()]
    model = nn.Sequential(*conv_and(nn.GroupNorm(2, 8)))
    assert doctor.examine(model, plain, select=["SN403"]).findings == ()
