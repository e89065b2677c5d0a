"""The deployment commands as people type them: what they write, what they say, and how they end."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from steadynorm import convert_, deploy, doctor
from steadynorm.recipe import load
from tests.test_cli import HEALTHY, ran, refused

# A norm that folds, and one that stands behind an activation.
RECIPE = HEALTHY.replace("nn.ReLU()", "nn.ReLU(), nn.BatchNorm2d(4)")
SHIFTED = RECIPE.replace("return nn.Sequential(", "return shifted(").replace(
    "def batches",
    """def shifted(*layers):
    model = nn.Sequential(*layers)
    with torch.no_grad():
        model[-1].bias[1] += 0.1
    return model

def batches""",
)
WITH_BATCH = RECIPE.replace("nn.Flatten()", "Centred(), nn.Flatten()") + (
    """
class Centred(nn.Module):
    def forward(self, x):
        return x - 0.1 * x.mean(0, keepdim=True)
"""
)


@pytest.fixture
def recipe(tmp_path):
    """A function that writes a recipe and gives its path."""

    def write(source=RECIPE, name="mine.py"):
        folder = tmp_path / "recipes"
        folder.mkdir(exist_ok=True)
        (folder / name).write_text(source)
        return folder / name

    return write


@pytest.fixture
def weights(recipe, tmp_path):
    """Weights for the recipe, with statistics that are not those of its data."""
    torch.manual_seed(1)
    model = load(str(recipe())).model()
    for index in (1, 3):
        model[index].running_mean.uniform_(1, 2)
        model[index].running_var.uniform_(2, 3)
    save_file(model.state_dict(), tmp_path / "given.safetensors")
    return tmp_path / "given.safetensors"


def test_recalibrated_weights_fit_the_recipe_and_hold_the_statistics_of_the_data(recipe, weights, tmp_path):
    out = tmp_path / "new.safetensors"
    ended = ran("recalibrate", recipe(), "--weights", weights, "--out", out, "--format", "json")
    assert ended.exit_code == 0, ended.output
    data = json.loads(ended.stdout)
    assert [layer["path"] for layer in data["layers"]] == ["1", "3"]
    assert data["samples"] == 8 * 32
    assert data["scores"]["loss"]["after"] != data["scores"]["loss"]["before"]
    model = load(str(recipe()), out).model()
    with torch.no_grad():
        x = torch.cat([model[0](images) for images, _ in load(str(recipe())).batches("train", 32, 0)])
    exact = x.double().var((0, 2, 3))
    torch.testing.assert_close(model[1].running_var.double(), exact, rtol=1e-5, atol=0)
    before, after = load_file(weights), load_file(out)
    assert [name for name in before if not torch.equal(before[name], after[name])] == [
        f"{index}.running_{which}" for index in (1, 3) for which in ("mean", "var")
    ]


def test_weights_without_statistics_get_those_of_the_data(recipe, weights, tmp_path):
    whole = load_file(weights)
    parameters = {name: tensor for name, tensor in whole.items() if "running" not in name and "tracked" not in name}
    save_file(parameters, tmp_path / "lacking.safetensors")
    mended, expected = tmp_path / "mended.safetensors", tmp_path / "expected.safetensors"
    ended = ran("recalibrate", recipe(), "--weights", tmp_path / "lacking.safetensors", "--out", mended)
    assert ended.exit_code == 0, ended.output
    assert "The weights held no running statistics of 1, 3: before, those of a new model." in ended.stdout
    ran("recalibrate", recipe(), "--weights", weights, "--out", expected)
    found, wanted = load_file(mended), load_file(expected)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted if "tracked" not in name)


def test_statistics_that_recalibration_leaves_alone_must_be_in_the_weights(recipe, weights, tmp_path):
    frozen = recipe(RECIPE.replace("nn.BatchNorm2d(4)", "FrozenBatchNorm2d(4)", 1).replace(
        "from torch import nn", "from torch import nn\nfrom steadynorm import FrozenBatchNorm2d", 1
    ))  # fmt: skip
    state = load(str(frozen)).model().state_dict()
    parameters = {name: tensor for name, tensor in state.items() if "running" not in name and "tracked" not in name}
    save_file(parameters, tmp_path / "lacking.safetensors")
    out = tmp_path / "mended.safetensors"
    sentence = refused("recalibrate", frozen, "--weights", tmp_path / "lacking.safetensors", "--out", out)
    assert "hold no running statistics of" in sentence
    assert "give weights that hold them" in sentence
    assert not out.exists()


def test_recalibrate_still_refuses_weights_of_another_model(recipe, weights, tmp_path):
    state = load_file(weights) | {"5.extra": torch.zeros(1)}
    save_file(state, tmp_path / "more.safetensors")
    sentence = refused("recalibrate", recipe(), "--weights", tmp_path / "more.safetensors", "--out", tmp_path / "w.pt")
    assert "not in the model: 5.extra" in sentence


def test_layer_by_layer_takes_as_many_samples_as_it_was_told(recipe, weights, tmp_path):
    command = ("recalibrate", recipe(), "--weights", weights, "--out", tmp_path / "new.pt", "--format", "json")
    data = json.loads(ran(*command, "--method", "layer_by_layer", "--samples", "100").stdout)
    assert (data["passes"], data["samples"]) == (2, 128)
    assert doctor.examine(load(str(recipe()), tmp_path / "new.pt").model(), [torch.randn(4, 1, 8, 8)]).findings == ()


def test_a_folded_model_runs_in_onnxruntime_and_verify_says_that_it_agrees(recipe, weights, tmp_path):
    out = tmp_path / "folded.onnx"
    ended = ran("fold", recipe(), "--weights", weights, "--out", out, "--format", "json")
    assert ended.exit_code == 0, ended.output
    data = json.loads(ended.stdout)
    assert [one["paths"] for one in data["log"]] == [["1"]]
    assert list(data["left"]) == ["3"]
    assert data["export"]["outputs"][0]["relative"] < 1e-5
    assert json.loads((tmp_path / "folded.onnx.json").read_text()) == data["export"]
    assert f"{out}, what was measured on it in folded.onnx.json" in ended.stderr
    agreed = ran("verify", recipe(), "--weights", weights, "--against", out)
    assert agreed.exit_code == 0, agreed.output
    assert "They agree on 2 batches." in agreed.stdout
    planted = ran("verify", recipe(), "--against", out, "--format", "json")  # without the weights it is another model
    assert planted.exit_code == 1
    assert not json.loads(planted.stdout)["agrees"]


def test_converted_weights_fit_a_recipe_that_was_converted_alike(recipe, weights, tmp_path):
    out = tmp_path / "group.safetensors"
    command = ("convert", recipe(), "group", "--weights", weights, "--groups", "2", "--only", "1", "--out", out)
    ended = ran(*command, "--format", "json")
    assert ended.exit_code == 0, ended.output
    data = json.loads(ended.stdout)
    assert [(one["paths"], one["after"]) for one in data["log"]] == [(["1"], "steadynorm.GroupNorm")]
    assert data["difference"]["loss_after"] != data["difference"]["loss_before"]
    alike = recipe(RECIPE.replace("nn.BatchNorm2d(4), nn.ReLU()", "nn.GroupNorm(2, 4), nn.ReLU()"), "alike.py")
    expected = load(str(recipe()), weights).model()
    convert_(expected, "group", only="1", groups=2, batches=list(load(str(recipe())).batches("test", 32, 0)))
    assert deploy.verify(load(str(alike), out).model(), expected, [torch.randn(5, 1, 8, 8)], tolerance=1e-6).agrees


def test_a_converted_model_can_be_exported_at_once(recipe, weights, tmp_path):
    out = tmp_path / "ours.pt2"
    ended = ran("convert", recipe(), "steadynorm", "--weights", weights, "--out", out)
    assert ended.exit_code == 0, ended.output
    assert "2 layers converted" in ended.stdout
    model = load(str(recipe()), weights).model()
    assert deploy.verify(model, deploy.load(out), [torch.randn(5, 1, 8, 8)]).agrees


def test_export_writes_the_model_and_tells_what_it_is_without_weights(recipe, tmp_path):
    out = tmp_path / "plain.pt2"
    ended = ran("export", recipe(), "--out", out)
    assert ended.exit_code == 0, ended.output
    assert "No --weights were given" in ended.stdout
    assert "batches of 1, 2, 3, 4, 8, 16, 32, 64" in ended.stdout
    assert max(map(len, ended.stdout.splitlines())) <= 80
    assert deploy.load(out)(torch.zeros(7, 1, 8, 8)).shape == (7, 3)


def test_a_fixed_batch_takes_no_other(recipe, tmp_path):
    out = tmp_path / "fixed.pt2"
    assert ran("export", recipe(), "--fixed-batch", "--batch-size", "6", "--out", out).exit_code == 0
    with pytest.raises(Exception, match="== 6"):
        deploy.load(out)(torch.zeros(7, 1, 8, 8))


def test_an_output_that_depends_on_the_batch_is_a_finding(recipe, tmp_path):
    ended = ran("export", recipe(WITH_BATCH), "--out", tmp_path / "plain.pt2", "--format", "json")
    assert ended.exit_code == 1
    assert not json.loads(ended.stdout)["invariance"]["holds"]


def test_a_page_of_an_export_is_written_where_it_was_asked_for(recipe, tmp_path):
    ended = ran("export", recipe(), "--out", tmp_path / "plain.pt2", "--report", tmp_path / "plain.html")
    assert ended.stdout.strip() == str(tmp_path / "plain.html")
    assert "Difference from the model" in (tmp_path / "plain.html").read_text()


def test_two_recipes_are_compared_and_where_they_part_is_told(recipe, weights, tmp_path):
    command = ("verify", recipe(), "--against", recipe(SHIFTED, "shifted.py"), "--format", "json")
    ended = ran(*command, "--weights", weights, "--against-weights", weights)
    data = json.loads(ended.stdout)
    assert ended.exit_code == 0  # the weights overwrite what was shifted
    assert data["agrees"]
    ended = ran(*command)
    data = json.loads(ended.stdout)
    assert ended.exit_code == 1
    assert data["first"] == "5"
    assert data["outputs"][0]["absolute"] == pytest.approx(0.1, rel=1e-4)
    weighed = ran("verify", recipe(), "--weights", weights, "--against", weights)
    assert weighed.exit_code == 0, weighed.output


def test_a_tolerance_that_is_not_met_is_a_finding_and_writes_nothing(recipe, weights, tmp_path):
    before = sorted(os.listdir(tmp_path))
    command = ("fold", recipe(), "--weights", weights, "--out", tmp_path / "folded.pt2", "--tolerance", "1e-12")
    ended = ran(*command)
    assert ended.exit_code == 1, ended.output
    assert ended.stderr.startswith("steadynorm: the folded model differs")
    assert ended.stdout == ""
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("recalibrate", "digits"), "recalibrate got no --out: expected the file to write"),
        (("fold", "digits"), "fold got no --out"),
        (("convert", "digits", "group"), "convert got no --out"),
        (("export", "digits"), "ends in .onnx or .pt2"),
        (("verify", "digits"), "verify got no --against"),
        (("convert", "digits"), "convert got no TO: expected a normalization"),
        (("fold", "digits", "--out", "w.safetensors"), "weights alone would fit no model"),
        (("export", "digits", "--out", "w.safetensors"), "weights are no model"),
        (("export", "digits", "--out", "model.bin"), "expected a file that ends in .onnx or .pt2"),
        (("export", "digits", "--out", "model.pt2", "--opset", "18"), "only ONNX has one"),
        (("export", "digits_faulty", "--out", "model.pt2"), "block2.bn2 normalizes by the statistics of the batch"),
        (("recalibrate", "digits", "--out", "model.onnx"), "ends in .safetensors, .pt or .pth"),
        (
            ("recalibrate", "digits", "--out", "w.pt", "--method", "twice"),
            "'twice': expected one_pass or layer_by_layer",
        ),
        (("convert", "digits", "grup", "--out", "w.pt"), "to='grup', expected one of"),
        (("fold", "digits", "--out", "model.pt2", "--tolerance", "0"), "expected a number above 0"),
        (("fold", "digits", "--out", "model.pt2", "--leave", "nothing.here"), "nothing.here"),
        (("verify", "digits", "--against", "none.onnx"), "there is no file none.onnx"),
        (("verify", "digits", "--against", "none.pt"), "none.pt"),
        (("verify", "digits", "--against", "w.pt", "--against-weights", "v.pt"), "are for another recipe"),
        (("fold", "no/such.py", "--out", "model.pt2"), "no/such.py"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_sentence(tmp_path, monkeypatch, arguments, word):
    monkeypatch.chdir(tmp_path)
    assert word in refused(*arguments)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("recalibrate", "digits", "--out", "/proc/w.safetensors"),
        ("fold", "digits", "--out", "/proc/model.pt2"),
        ("convert", "digits", "torch", "--out", "/proc/w.safetensors"),
        ("export", "digits", "--out", "/proc/model.onnx"),
        ("verify", "digits", "--against", "digits", "--out", "/proc/report.html"),
    ],
)
def test_a_place_that_cannot_be_written_is_said_before_the_work(monkeypatch, tmp_path, arguments):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("steadynorm.recipe.load", lambda *_: pytest.fail("the work had begun"))
    assert "cannot write /proc/" in refused(*arguments)
    assert os.listdir(tmp_path) == []


def test_stopped_in_the_middle_it_says_so_and_leaves_no_file(recipe, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("steadynorm.deploy.export", stop)
    ended = ran("export", recipe(), "--out", tmp_path / "model.pt2")
    assert ended.exit_code == 130
    assert ended.stderr == "steadynorm: stopped. Nothing was written.\n"
    assert os.listdir(tmp_path) == ["recipes"]
