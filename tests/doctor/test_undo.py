"""Repairs that change the model where that is asked for, and the way back, bit for bit."""

import copy
import itertools

import pytest
import torch
from torch import nn

from steadynorm import doctor
from steadynorm.doctor import Diagnosis, Finding, Fix, undo
from steadynorm.errors import InputError
from steadynorm.recipes import digits
from tests.doctor import cases
from tests.doctor.networks import convolutional
from tests.doctor.test_repairs import planted_case


def batches(split="test"):
    return itertools.islice(digits.batches(split, 32, 0), 4)


def examined(model, *codes):
    return doctor.examine(model, batches, train_batches=lambda: batches("train"), loss=digits.loss, select=codes)


def same(model, before):
    state = model.state_dict()
    return state.keys() == before.keys() and all(torch.equal(state[name], before[name]) for name in before)


def bits(model):
    """Every value of a model as bytes, NaN and all, with types, switches and the gradients that are wanted."""
    tensors = {name: (t.dtype, undo.hash_of(t), t.requires_grad) for name, t in model.named_parameters()}
    tensors |= {name: (t.dtype, undo.hash_of(t), False) for name, t in model.named_buffers()}
    switches = [(getattr(m, "momentum", None), getattr(m, "track_running_stats", None)) for m in model.modules()]
    return tensors, switches


def harmed(kind):
    if kind == "nan":
        return next(case for case in cases.FAULTS if case.name == "nan block2.bn2").make()
    if kind == "dead bias":
        return cases.train(convolutional(nn.BatchNorm2d, bias=True))
    model = copy.deepcopy(cases.trained())
    if kind == "momentum 0.99":
        model.block1.bn1.momentum = 0.99
    elif kind == "momentum 0":
        model.block1.bn1.momentum = 0.0
        model.block1.bn1.reset_running_stats()
    elif kind == "toggled":
        model.block1.bn1.track_running_stats = False
        model.block1.bn1.running_mean.add_(2)
    return model


FOUND = {
    "nan": "SN202",
    "dead bias": "SN104",
    "momentum 0.99": "SN108",
    "momentum 0": "SN110",
    "toggled": "SN205",
}
UNSAFE = ("momentum 0.99", "momentum 0", "toggled")


@pytest.mark.parametrize("kind", FOUND)
def test_a_repair_is_taken_back_bit_for_bit(tmp_path, kind):
    model, file = harmed(kind), tmp_path / "undo.safetensors"
    before = bits(model)
    repairs = doctor.repair(model, examined(model, FOUND[kind]), batches, unsafe=True, undo=file)
    assert any(each.is_done and each.finding.code.startswith(FOUND[kind]) for each in repairs), list(map(str, repairs))
    assert bits(model) != before
    restored = doctor.undo_(model, file)
    assert restored
    assert bits(model) == before


@pytest.mark.slow
def test_a_layer_that_was_widened_is_narrow_again(tmp_path):
    case, model = planted_case("trained in bfloat16")
    before, file = bits(model), tmp_path / "undo.safetensors"
    found = doctor.examine(model, case.batches, train_batches=case.train_batches, loss=case.loss, select=["SN2"])
    doctor.repair(model, found, case.batches, undo=file)
    assert model[1].running_mean.dtype == torch.float32
    doctor.undo_(model, file)
    assert bits(model) == before


@pytest.mark.parametrize("kind", UNSAFE)
def test_what_changes_the_training_is_left_alone_unless_it_is_asked_for(kind):
    model = harmed(kind)
    before = model.block1.bn1.momentum, model.block1.bn1.track_running_stats
    doctor.repair(model, examined(model, FOUND[kind]), batches)
    assert (model.block1.bn1.momentum, model.block1.bn1.track_running_stats) == before


@pytest.mark.parametrize(
    ("kind", "in_code"),
    [
        ("momentum 0.99", "block1.bn1.momentum = 0.01"),
        ("momentum 0", "block1.bn1.momentum = 0.1"),
        ("toggled", "block1.bn1.track_running_stats = True"),
    ],
)
def test_what_weights_do_not_hold_is_said(kind, in_code):
    model = harmed(kind)
    repairs = doctor.repair(model, examined(model, FOUND[kind]), batches, unsafe=True)
    (repair,) = [each for each in repairs if each.finding.code == FOUND[kind]]
    assert repair.in_code == in_code
    assert str(repair).endswith(f"Weights do not hold this; write in the code: {in_code}.")
    assert repair.loss[1] <= repair.loss[0] * 1.02
    assert examined(model, "SN1", "SN2").is_clean


@pytest.mark.slow
def test_an_instance_norm_that_tracks_forgets_and_remembers(tmp_path):
    case, model = planted_case(next(c.name for c in planted_instances()))
    found = doctor.examine(model, case.batches, train_batches=case.train_batches, loss=case.loss, select=["SN114"])
    (path, *_) = [f.where for f in found.findings if f.code == "SN114"]
    before, file = bits(model), tmp_path / "undo.safetensors"
    repairs = doctor.repair(model, found, case.batches, unsafe=True, undo=file)
    assert [each.is_done for each in repairs if each.finding.code == "SN114"] == [True, True]
    assert model.get_submodule(path).running_mean is None
    doctor.undo_(model, file)
    assert bits(model) == before
    assert "running_mean" in dict(model.get_submodule(path).named_buffers())


def planted_instances():
    from tests.doctor.planted import PLANTED

    return [case for case in PLANTED if any(code == "SN114" for code, _ in case.expected)]


def test_a_repair_that_does_not_help_leaves_no_trace_in_the_undo_file(tmp_path):
    model, file = harmed("nan"), tmp_path / "undo.safetensors"

    def spoil_(model, targets, data):
        for (path,) in targets:
            model.get_submodule(path).momentum = 0.5
            model.get_submodule(path).running_mean.add_(100)

    found = examined(model, "SN2")
    wrong = tuple(Finding(**{**vars(f), "fix": Fix("Spoil.", True, spoil_, (f.where,))}) for f in found.findings)
    before = bits(model)
    repairs = doctor.repair(model, Diagnosis(**{**vars(found), "findings": wrong}), batches, undo=file)
    assert not any(each.is_done for each in repairs)
    assert bits(model) == before
    assert undo.read(file).tensors == {}
    assert doctor.undo_(model, file) == ()


def test_a_model_that_has_changed_since_is_refused_and_left_alone(tmp_path):
    model, file = harmed("nan"), tmp_path / "undo.safetensors"
    where = doctor.repair(model, examined(model, "SN2"), batches, undo=file)[0].finding.where
    model.get_submodule(where).running_mean.add_(1)
    before = bits(model)
    with pytest.raises(InputError, match=rf"the model is not as the repair left it \({where}\.running_mean"):
        doctor.undo_(model, file)
    assert bits(model) == before
    with pytest.raises(InputError, match="not as the repair left it"):
        doctor.undo_(nn.Linear(2, 2), file)


def test_a_file_that_is_none_is_refused(tmp_path):
    model, file = nn.Linear(2, 2), tmp_path / "undo.safetensors"
    with pytest.raises(InputError, match="there is no undo file"):
        doctor.undo_(model, file)
    file.write_bytes(b"nothing")
    with pytest.raises(InputError, match="cannot be read as an undo file"):
        doctor.undo_(model, file)
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(2, 2)}, file)
    with pytest.raises(InputError, match="is no undo file of version 1"):
        doctor.undo_(model, file)


def test_an_undo_file_that_cannot_be_written_leaves_the_model_as_it_was(tmp_path):
    model = harmed("nan")
    before = bits(model)
    with pytest.raises(OSError, match=r"folder|directory"):
        doctor.repair(model, examined(model, "SN2"), batches, undo=tmp_path)
    assert bits(model) == before


def test_weights_on_disk_become_what_they_were():
    model = harmed("dead bias")
    original = copy.deepcopy(model.state_dict())
    changed = undo.remembered(model)
    repairs = doctor.repair(model, examined(model, "SN104"), batches)
    assert all(each.is_done for each in repairs)
    weights = {**{name: torch.zeros_like(t) for name, t in original.items()}, **model.state_dict()}
    restored = undo.undone(weights, changed(), "weights.pt")
    assert restored.keys() == original.keys()
    assert all(torch.equal(restored[name], original[name]) for name in original)
    weights["0.bias"] = torch.ones_like(weights["0.bias"])
    with pytest.raises(InputError, match=r"weights\.pt is not as the repair left it \(0\.bias"):
        undo.undone(weights, changed(), "weights.pt")


def test_a_finding_that_cannot_be_looked_at_again_is_not_called_repaired():
    model = harmed("momentum 0.99")

    def nothing_(model, targets, data):
        pass

    finding = Finding("SN701", "warning", "proved", "", "Decay.", {}, Fix("Nothing.", True, nothing_, ("",)))
    found = examined(model, "SN1")
    (repair,) = doctor.repair(model, Diagnosis(**{**vars(found), "findings": (finding,)}), batches)
    assert not repair.is_done
    assert "could not be looked at again" in str(repair)
