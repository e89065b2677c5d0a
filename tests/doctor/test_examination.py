import json

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from steadynorm import doctor, recipe
from steadynorm.doctor.rules import RULES, code_of, is_on
from steadynorm.errors import InputError
from steadynorm.recipe import Recipe
from steadynorm.recipes import digits
from tests.doctor import cases, networks


class Raises(nn.Module):
    def forward(self, x):
        raise RuntimeError("no way through")


def small():
    return networks.convolutional(nn.BatchNorm2d)


def images(count=16, size=8):
    return [torch.randn(size, 1, 8, 8) for _ in range(count // size)]


def test_select_and_ignore_take_codes_and_their_beginnings():
    model, batches = small(), images()
    state = [code_of(rule) for rule in RULES if code_of(rule).startswith("SN2")]
    found = doctor.examine(model, batches, select=["SN2"])
    assert sorted((*found.checked, *found.unchecked)) == state
    assert set(found.off) == {code_of(rule) for rule in RULES} - set(state)
    assert doctor.examine(model, batches, select=["sn202"]).checked == ("SN202",)
    left = doctor.examine(model, batches, select=["SN20"], ignore=[code for code in state if code != "SN202"])
    assert left.checked == ("SN202",)


def test_only_what_the_rules_need_is_run():
    class Counts(nn.Identity):
        calls = 0

        def forward(self, x):
            Counts.calls += 1
            return x

    doctor.examine(nn.Sequential(Counts()), images(), select=["SN202"])
    assert Counts.calls == 0


@pytest.mark.parametrize("wrong", ["SN9", "bias", ""])
def test_an_unknown_code_is_refused(wrong):
    with pytest.raises(InputError, match="no rule has the code"):
        doctor.examine(small(), images(), select=[wrong])


def test_select_and_ignore_that_leave_nothing_are_refused():
    with pytest.raises(InputError, match="no rule is left"):
        doctor.examine(small(), images(), select=["SN203"], ignore=["SN2"])


def test_what_was_not_checked_is_listed_with_the_reason():
    result = doctor.examine(small(), images())
    of_training = ("SN101", "SN102", "SN401", "SN402", "SN406")
    assert result.unchecked == {
        **dict.fromkeys(of_training, "no training batches were given"),
        "SN207": "no checkpoint was given",
        "SN702": "no optimizer was given",
    }
    assert not set(result.unchecked) & set(result.checked)
    assert "no training batches were given" in str(result)


def test_a_forward_that_raises_is_a_finding_with_its_place():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Sequential(nn.ReLU(), Raises()))
    result = doctor.examine(model, images(), train_batches=images())
    (finding,) = result.findings
    assert (finding.code, finding.where) == ("SN001", "1.1")
    assert "RuntimeError: no way through" in finding.message
    # What is stored can be looked at all the same.
    assert "SN202" in result.checked
    looking = {code_of(rule) for rule in RULES if not {"program", "state", "data"} >= set(rule.needs) and is_on(rule)}
    assert set(result.unchecked) == looking - {"SN001"}
    assert {"SN103", "SN203", "SN301", "SN801"} < set(result.unchecked)


def test_a_forward_that_raises_in_training_mode_only():
    class RaisesWhenTrained(nn.BatchNorm2d):
        def forward(self, x):
            if self.training:
                raise ValueError("not in training")
            return super().forward(x)

    model = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), RaisesWhenTrained(4))
    result = doctor.examine(model, images(), train_batches=images())
    (finding,) = [f for f in result.findings if f.code == "SN001"]
    assert finding.where == "1"
    assert "training mode" in finding.message
    assert "SN801" in result.checked
    assert {"SN102", "SN203"} <= set(result.unchecked)


def test_batches_with_nan_are_found_and_left_out():
    clean = images(64)
    bad = torch.randn(8, 1, 8, 8)
    bad[3, 0, 2, 2] = torch.nan
    result = doctor.examine(small(), [*clean[:2], bad, *clean[2:]])
    (finding,) = [f for f in result.findings if f.severity == "error"]
    assert finding.code == "SN002"
    assert finding.evidence["first index"] == 2
    assert "SN203" in result.checked


def test_nothing_but_nan_is_a_finding():
    result = doctor.examine(small(), [torch.full((4, 1, 8, 8), torch.nan)])
    assert [f.code for f in result.findings] == ["SN002"]
    assert result.unchecked["SN203"] == "every batch holds NaN"


@pytest.mark.parametrize("empty", [[], iter(()), lambda: iter(())])
def test_no_batch_is_an_error(empty):
    with pytest.raises(InputError, match="batches is empty"):
        doctor.examine(small(), empty)


def test_something_that_gives_no_batches_is_an_error():
    with pytest.raises(InputError, match="batches is int, expected an iterable"):
        doctor.examine(small(), 3)


@pytest.mark.parametrize("piece", ["loss", "metrics"])
def test_a_loss_or_metrics_that_cannot_be_computed_is_an_error(piece):
    with pytest.raises(InputError, match="loss or metrics raised TypeError"):
        doctor.examine(small(), images(), **{piece: lambda output, batch: output + None})


def test_parameters_without_values_are_an_error():
    with pytest.raises(InputError, match="without values"):
        doctor.examine(nn.Sequential(nn.LazyLinear(3)), images())
    with pytest.raises(InputError, match="meta device"):
        doctor.examine(nn.Conv2d(1, 3, 3, device="meta"), images())


@pytest.mark.parametrize(
    "name", ["leak behind a stale layer", "leak before a stale layer", "leak behind a broken layer"]
)
def test_what_a_leak_does_is_measured_as_if_it_were_alone(name):
    """A layer whose stale statistics let nothing through would hide the leak, or what it does."""

    def leak(name):
        case = next(case for case in cases.FAULTS if case.name == name)
        (found,) = cases.diagnosis(case).facts.leaks
        return found

    alone, masked = leak("hard-coded training=True"), leak(name)
    assert alone.recalibrated == 0
    assert masked.recalibrated == 1
    assert alone.effect.distance > 0.005
    assert masked.effect.distance == pytest.approx(alone.effect.distance, rel=0.25)
    assert masked.effect.loss == pytest.approx(alone.effect.loss, rel=0.25)
    assert masked.output_change == pytest.approx(alone.output_change, rel=0.25)
    assert masked.change == pytest.approx(alone.change, rel=0.25)


def test_a_leak_is_measured_the_same_when_its_rule_is_asked_for_alone():
    case = next(case for case in cases.FAULTS if case.name == "leak behind a stale layer")
    with recipe.seeded(0):
        model = case.make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = doctor.examine(
        model, case.batches, train_batches=case.train_batches, loss=case.loss, metrics=digits.metrics, select=["SN801"]
    )
    assert result.facts.leaks == cases.diagnosis(case).facts.leaks
    assert [finding.code for finding in result.findings] == ["SN801"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_loader_is_read_once_and_its_generator_stays_where_it_was():
    generator = torch.Generator().manual_seed(3)
    data = TensorDataset(*digits.data()["test"])
    loader = DataLoader(data, batch_size=50, shuffle=True, generator=generator)
    before = generator.get_state()
    result = doctor.examine(cases.trained(), loader, train_batches=loader, loss=digits.loss)
    assert torch.equal(generator.get_state(), before)
    assert result.is_clean
    # 360 samples in batches of 50: the last one is known without being loaded.
    assert result.facts.batches.last == 10
    assert len(result.facts.batches.sizes) < 8


def test_the_diagnosis_as_json_and_as_text_and_as_a_page():
    case = next(case for case in cases.FAULTS if case.name == "nan stem.1")
    result = cases.diagnosis(case)
    data = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert data["schema_version"] == 2
    assert data["findings"][0]["code"] == "SN202"
    fix = {"text": "Recalibrate the statistics from the data.", "is_safe": True, "is_automatic": True}
    assert data["findings"][0]["fix"] == fix
    assert data["is_clean"] is False
    assert {row["layer"] for row in data["layers"]} == set(cases.NORMS)
    assert "stem.1" in str(result)
    page = result._repr_html_()
    assert page.startswith("<iframe srcdoc=")
    assert "plotly" not in page.lower() or len(page) < 100_000


def test_a_recipe_without_weights_is_trained_first_and_the_diagnosis_says_so():
    advances = []
    model, result = doctor.examine_recipe(
        recipe.load("digits"), steps=100, on_progress=lambda done, total: advances.append((done, total))
    )
    assert result.is_clean
    assert result.title == "Diagnosis of digits"
    assert "first trained for 100 steps" in result.remarks[0]
    assert advances == sorted(advances)
    assert len({total for _, total in advances}) == 1
    assert advances[-1][0] <= advances[-1][1]
    assert recipe.evaluate(model, recipe.load("digits"))["accuracy"] > 0.95


def test_the_progress_bar_is_where_the_time_is():
    """Measured by the values that layers put out, three times as much where a backward pass follows."""
    marks, work = [], 0

    def count(module, inputs, output):
        nonlocal work
        if isinstance(output, torch.Tensor) and not any(module.children()):
            work += output.numel() * (3 if torch.is_grad_enabled() else 1)

    hook = torch.nn.modules.module.register_module_forward_hook(count)
    try:
        faulty = recipe.load("digits_faulty")
        doctor.examine_recipe(faulty, on_progress=lambda done, total: marks.append((done / total, work)))
    finally:
        hook.remove()
    start, whole = marks[0][1], marks[-1][1] - marks[0][1]
    assert marks[-1][0] == 1
    # Seven equal parts beside a hundred training steps were wrong by 0.26.
    assert max(abs(done - (amount - start) / whole) for done, amount in marks) < 0.17


def test_the_faulty_recipe_shows_its_three_faults_at_their_places():
    faulty = recipe.load("digits_faulty")
    model, result = doctor.examine_recipe(faulty)
    biased = [path for path, layer in model.named_modules() if isinstance(layer, nn.Conv2d) and layer.bias is not None]
    slow = [path for path, layer in model.named_modules() if 0 < getattr(layer, "momentum", 1) < 0.1]
    mixing = [path for path, layer in model.named_modules() if type(layer).__name__ == "AlwaysBatchStatistics"]
    assert {(f.code, f.where) for f in result.findings} == {
        *(("SN104", path) for path in biased),
        *(("SN109", path) for path in slow),
        *((code, path) for path in mixing for code in ("SN113", "SN801")),
    }


def test_a_recipe_without_loss_runs_what_it_can():
    bare = Recipe("bare", digits.model, digits.batches)
    _, result = doctor.examine_recipe(bare)
    assert "no loss" in result.remarks[0]
    assert all(finding.severity == "note" for finding in result.findings)


def test_a_recipe_whose_training_stops_is_examined_all_the_same():
    stops = Recipe(
        "stops", lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10), Raises()), digits.batches, digits.loss
    )
    _, result = doctor.examine_recipe(stops)
    assert "training stopped: the model's forward raised RuntimeError" in result.remarks[0]
    assert [f.code for f in result.findings] == ["SN001"]
