"""SN207: a checkpoint held against the model that was loaded from it, by every door."""

import json

import pytest
import torch
from torch import nn

import steadynorm
from steadynorm import doctor, recipe
from steadynorm.errors import InputError
from steadynorm.probe.checkpoint import compare
from steadynorm.recipes import digits
from tests.doctor.cases import NORMS, diagnosis, reset_all, trained
from tests.doctor.networks import FrozenBatchNorm, convolutional
from tests.doctor.planted import PLANTED, parameters
from tests.test_cli import ran, refused

RECIPE = """
from torch import nn
from steadynorm.recipes import digits
from tests.doctor.networks import Residual as model

batches, loss, metrics = digits.batches, digits.loss, digits.metrics
"""


def findings(result):
    return {(f.code, f.where) for f in result.findings if f.severity != "note"}


def named(name):
    return next(case for case in PLANTED if case.name == name)


def quick(model, checkpoint):
    return doctor.examine(model, checkpoint=checkpoint, select=["SN207"])


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A recipe of the trained digits, in a folder with two checkpoints: one is whole, one has parameters alone."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(RECIPE)
    model = trained()
    torch.save(model.state_dict(), "whole.pt")
    torch.save({name: value.detach() for name, value in model.named_parameters()}, "lacking.pt")
    return "mine.py"


def test_the_command_ends_in_the_finding_and_repairs_it(mine, tmp_path):
    ended = ran("doctor", mine, "--weights", "lacking.pt", "--fix", "mended.safetensors", "--format", "json")
    content = json.loads(ended.stdout)
    found = [finding for finding in content["findings"] if finding["severity"] != "note"]
    assert {(finding["code"], finding["where"]) for finding in found} == {("SN207", path) for path in NORMS}
    assert all(finding["confidence"] == "measured" for finding in found)
    assert all("accuracy goes from" in finding["message"] for finding in found)
    assert content["repair"]["after"]["findings"] == []
    assert ended.exit_code == 0
    again = ran("doctor", mine, "--weights", "mended.safetensors")
    assert again.exit_code == 0, again.stdout
    accuracy = recipe.evaluate(recipe.load(mine, "mended.safetensors").model(), recipe.load(mine))["accuracy"]
    assert accuracy > recipe.evaluate(trained(), recipe.load(mine))["accuracy"] - 0.01


def test_a_whole_checkpoint_is_checked_and_clean(mine):
    ended = ran("doctor", mine, "--weights", "whole.pt", "--select", "SN207", "--format", "json")
    content = json.loads(ended.stdout)
    assert (content["findings"], content["checked"], ended.exit_code) == ([], ["SN207"], 0)


def test_quick_tells_it_without_data(mine):
    ended = ran("doctor", mine, "--weights", "lacking.pt", "--quick", "--format", "json")
    found = json.loads(ended.stdout)["findings"]
    assert {(f["code"], f["where"], f["severity"]) for f in found} == {("SN207", path, "error") for path in NORMS}
    assert {f["confidence"] for f in found} == {"proved"}


def test_other_commands_refuse_it_and_name_the_doctor(mine):
    sentence = refused("fold", mine, "--weights", "lacking.pt", "--out", "x.onnx")
    assert "missing: stem.1.running_mean" in sentence
    assert "they lack running statistics alone: steadynorm doctor" in sentence


def test_weights_that_lack_a_parameter_are_refused_by_the_doctor_too(mine):
    state = dict(torch.load("lacking.pt"))
    del state["head.bias"]
    torch.save(state, "less.pt")
    assert "missing: head.bias;" in refused("doctor", mine, "--weights", "less.pt")


def test_a_file_does_as_well_as_what_is_in_it(mine):
    model = reset_all(trained())
    assert findings(quick(model, "lacking.pt")) == findings(quick(model, torch.load("lacking.pt"))) != set()


def test_a_repair_in_a_script_is_judged_with_the_checkpoint():
    case = named("checkpoint of parameters alone")
    with recipe.seeded(0):
        model = case.make()
    batches = list(case.batches())
    given = {"train_batches": case.train_batches, "loss": digits.loss, "checkpoint": parameters(model)}
    found = doctor.examine(model, batches, **given)
    repairs = doctor.repair(model, found, batches)
    assert len(repairs) == len(NORMS)
    assert all(repair.is_done for repair in repairs), repairs
    again = doctor.examine(model, batches, **given)
    (note,) = [f for f in again.findings if f.code == "SN207"]
    assert (note.severity, note.where, note.evidence["layers"]) == ("note", "", len(NORMS))


def test_nothing_is_said_twice():
    codes = {f.code for f in diagnosis(named("checkpoint of parameters alone")).findings}
    assert not codes & {"SN201", "SN203", "SN109"}


def test_the_other_name_stands_in_the_evidence():
    (finding,) = diagnosis(named("statistics of one layer under another name")).findings
    assert finding.evidence["statistics under names that the model has not"] == "block2.norm1"
    assert "block2.bn1" in finding.where


def test_what_was_kept_from_before_is_not_called_new():
    found = diagnosis(named("weights loaded over another training")).findings
    lost = [f for f in found if f.code == "SN207" and f.where]
    assert lost
    assert all("those that it had before" in f.message for f in lost)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_counter_alone_matters_to_a_cumulative_average_only(momentum):
    model = convolutional(lambda c: nn.BatchNorm2d(c, momentum=momentum))
    for x, _ in digits.batches("train", 64, 0):
        model.train()(x)
    state = {k: v for k, v in model.state_dict().items() if "num_batches" not in k}
    model = convolutional(lambda c: nn.BatchNorm2d(c, momentum=momentum))
    model.load_state_dict(state, strict=False)
    assert findings(quick(model, state)) == ({("SN207", "1"), ("SN207", "4")} if momentum is None else set())


def test_frozen_norms_lose_theirs_too():
    model = convolutional(FrozenBatchNorm)
    for name in ("1", "4"):
        model.get_submodule(name).running_mean.zero_()
        model.get_submodule(name).running_var.fill_(1)
    assert findings(quick(model, parameters(model))) == {("SN207", "1"), ("SN207", "4")}
    # And a counter, which a frozen norm has no place for, is nothing that it lacks.
    state = model.state_dict() | {"1.num_batches_tracked": torch.tensor(9)}
    assert quick(model, state).findings == ()


def test_a_norm_of_another_kind_in_place_of_one_with_statistics():
    model, state = convolutional(lambda c: nn.GroupNorm(4, c)), convolutional(nn.BatchNorm2d).state_dict()
    model.load_state_dict(state, strict=False)
    found = quick(model, state)
    assert findings(found) == {("SN207", "1"), ("SN207", "4")}
    assert "normalises by the sample (GroupNorm)" in found.findings[0].message


def test_statistics_of_layers_that_are_not_there_are_a_note():
    model = convolutional(nn.BatchNorm2d)
    (found,) = quick(model, model.state_dict() | {"old.running_mean": torch.ones(3)}).findings
    assert (found.severity, found.evidence["of them"]) == ("note", "old")


def test_a_wrapped_model_and_a_bare_checkpoint_and_the_other_way_round():
    model = convolutional(nn.BatchNorm2d)
    wrapped = nn.DataParallel(model)
    assert quick(wrapped, model.state_dict()).findings == quick(model, wrapped.state_dict()).findings == ()
    assert findings(quick(wrapped, parameters(model))) == {("SN207", "module.1"), ("SN207", "module.4")}


def test_a_layer_of_another_width_was_not_loaded():
    model, wider = convolutional(nn.BatchNorm2d), convolutional(nn.BatchNorm2d, width=24)
    state = model.state_dict() | {"4.running_mean": wider[4].running_mean, "4.running_var": wider[4].running_var}
    assert findings(quick(model, state)) == {("SN207", "4")}


def test_a_checkpoint_that_was_not_loaded_is_remarked():
    model, state = convolutional(nn.BatchNorm2d), convolutional(nn.BatchNorm2d).state_dict()
    (remark,) = quick(model, state).remarks
    assert remark.startswith("4 of 14 tensors of the checkpoint are not what the model holds")
    model.load_state_dict(state)
    assert quick(model, state).remarks == ()
    assert quick(model.bfloat16(), state).remarks == ()


def test_what_else_is_missing_or_left_over_is_remarked():
    model = convolutional(nn.BatchNorm2d)
    state = model.state_dict() | {"aux.weight": torch.ones(3)}
    del state["8.bias"]
    assert quick(model, state).remarks == (
        "The checkpoint lacks, or has in another shape: 8.bias.",
        "The checkpoint has, and the model has not: aux.weight.",
    )


@pytest.mark.parametrize("checkpoint", [{"a.weight": torch.ones(2)}, {"epoch": 3}, {}, "gone.pt"])
def test_what_is_no_checkpoint_of_the_model_is_a_sentence(checkpoint):
    with pytest.raises(InputError, match=r"no name in common|expected a state_dict|there is no weights file"):
        quick(convolutional(nn.BatchNorm2d), checkpoint)


def test_ours_load_from_torchs_and_the_other_way_round():
    ours, theirs = convolutional(steadynorm.BatchNorm2d), convolutional(nn.BatchNorm2d)
    assert compare(ours, theirs.state_dict()).missing == compare(theirs, ours.state_dict()).missing == {}
    assert set(compare(ours, parameters(theirs)).missing) == {"1", "4"}
