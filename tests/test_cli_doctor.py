"""The doctor's command line beyond its first options: formats, suppression, a baseline, repairs and the way back."""

import json
import os

import jsonschema
import pytest
import torch

from steadynorm.recipe import load
from steadynorm.weights import read_weights
from tests.doctor import sarif_schema
from tests.doctor.test_formats import COMMAND, SCHEMA
from tests.test_cli import STALE, ran, refused

FAULTY = STALE.replace("nn.BatchNorm2d(4)", "nn.BatchNorm2d(4, momentum=0.99)")
SUPPRESS = """
[[tool.steadynorm.doctor.suppress]]
rule = "SN"
module = "1"
reason = "known"
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(FAULTY)
    return "mine.py"


def as_data(*arguments):
    ended = ran("doctor", *arguments, "--format", "json")
    content = json.loads(ended.stdout)
    jsonschema.validate(content, SCHEMA, jsonschema.Draft202012Validator)
    return content, ended


def codes(content):
    return [(finding["code"], finding["where"]) for finding in content["findings"]]


def test_sarif_and_annotations_are_written(recipe, tmp_path):
    ended = ran("doctor", recipe, "--out", "found.sarif", "--select", "SN2,SN104")
    assert ended.exit_code == 1
    log = json.loads((tmp_path / "found.sarif").read_text())
    jsonschema.validate(log, sarif_schema.LOG, jsonschema.Draft202012Validator)
    assert list(sarif_schema.faults(log)) == []
    place = log["runs"][0]["results"][0]["locations"][0]["physicalLocation"]
    line = 1 + FAULTY.splitlines().index("def model():")
    assert place == {"artifactLocation": {"uri": "mine.py"}, "region": {"startLine": line}}
    ended = ran("doctor", recipe, "--format", "github", "--select", "SN2,SN104")
    assert all(COMMAND.fullmatch(each) for each in ended.stdout.splitlines())
    assert f"file=mine.py,line={line},title=SN203 1%3A" in ended.stdout


def test_other_commands_do_not_write_the_formats_of_findings(recipe):
    assert "--format got 'sarif': expected text, json or html." in refused("lab", recipe, "--format", "sarif")
    assert "this command cannot write sarif" in refused("lab", recipe, "--out", "x.sarif")


def test_quick_runs_nothing(recipe, tmp_path):
    (tmp_path / "mine.py").write_text(
        FAULTY + "\ndef batches(split, batch_size, seed):\n    raise RuntimeError('ran')\n"
    )
    content, ended = as_data(recipe, "--quick")
    assert ended.exit_code == 1
    assert codes(content) == [("SN108", "1")]
    assert content["remarks"] == ["Quick: the model was made and looked at, and nothing was run."]
    assert content["unchecked"]["SN203"] == "no batches were given"
    assert "--quick runs no data, and --fix needs some" in refused("doctor", recipe, "--quick", "--fix", "x.pt")


def test_findings_are_suppressed_by_the_pyproject_beside_the_recipe(recipe, tmp_path):
    (tmp_path / "pyproject.toml").write_text(SUPPRESS + SUPPRESS.replace('"1"', '"head.*"'))
    content, ended = as_data(recipe, "--select", "SN108,SN203")
    assert ended.exit_code == 0
    assert content["findings"] == []
    assert {(each["code"], each["reason"]) for each in content["suppressed"]} == {
        ("SN108", "known"),
        ("SN203", "known"),
    }
    assert content["unused_suppressions"] == [
        "pyproject.toml suppresses SN at head.*, where there is nothing: take it out."
    ]
    (tmp_path / "pyproject.toml").write_text(SUPPRESS.replace("reason", "because"))
    assert "a suppression in" in refused("doctor", recipe)


def test_a_baseline_hides_what_was_there(recipe, tmp_path):
    ended = ran("doctor", recipe, "--write-baseline", "known.json", "--select", "SN203")
    assert ended.exit_code == 0
    assert "known.json has what was found, 1 in all" in ended.stderr
    content, ended = as_data(recipe, "--baseline", "known.json", "--select", "SN108,SN203")
    assert ended.exit_code == 1
    assert codes(content) == [("SN108", "1")]
    (tmp_path / "pyproject.toml").write_text("[tool.steadynorm.doctor]\nbaseline = 'known.json'\nselect = ['SN203']\n")
    content, ended = as_data(recipe)
    assert (ended.exit_code, content["findings"], content["checked"]) == (0, [], ["SN203"])
    assert "the baseline none.json cannot be read" in refused("doctor", recipe, "--baseline", "none.json")


def state_of(weights=None):
    return load("mine.py", weights).model().state_dict()


def test_a_repair_and_the_way_back(recipe, tmp_path):
    original = {name: tensor.clone() for name, tensor in state_of().items()}
    torch.save(original, "before.pt")
    chosen = ("--weights", "before.pt", "--select", "SN104,SN2")
    content, _ = as_data(recipe, *chosen, "--fix", "after.safetensors", "--undo", "undo.safetensors")
    assert {(each["code"], each["is_done"]) for each in content["repair"]["repairs"]} == {
        ("SN104", True),
        ("SN203", True),
    }
    assert content["repair"]["after"]["findings"] == []
    repaired = read_weights(tmp_path / "after.safetensors")
    assert not torch.equal(repaired["1.running_mean"], original["1.running_mean"])
    ended = ran("undo", "undo.safetensors", "after.safetensors", "--out", "back.pt")
    assert ended.exit_code == 0
    back = read_weights(tmp_path / "back.pt")
    assert back.keys() == original.keys()
    assert all(torch.equal(back[name], original[name]) for name in original)
    assert "is not as the repair left it" in refused("undo", "undo.safetensors", "back.pt")
    assert "expected a file that ends in" in refused("undo", "undo.safetensors", "after.safetensors", "--out", "x.bin")


def test_unsafe_repairs_are_offered_and_done_when_asked_for(recipe):
    content, _ = as_data(recipe, "--select", "SN108", "--fix", "a.pt")
    assert content["repair"]["repairs"] == []
    assert "1 more repair changes" in content["repair"]["sentences"][-1]
    content, ended = as_data(recipe, "--select", "SN108", "--fix", "a.pt", "--unsafe-fixes", "--undo", "u.safetensors")
    assert ended.exit_code == 0
    assert content["repair"]["repairs"][0]["in_code"] == "1.momentum = 0.01"
    ended = ran("undo", "u.safetensors", "a.pt")
    assert "write in the code: 1.momentum = 0.99" in ended.stderr


def test_the_page_of_a_repair_shows_before_and_after(recipe, tmp_path):
    ran("doctor", recipe, "--select", "SN2", "--fix", "a.pt", "--out", "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "Examined again: No faults found" in text
    assert "After the repair SN203 is gone." in text
    assert "&#34;name&#34;: &#34;after&#34;" in text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--undo", "u.safetensors"), "--undo goes with --fix FILE"),
        (("--unsafe-fixes",), "--unsafe-fixes goes with --fix FILE"),
        (("--fix", "a.pt", "--undo", "u.pt"), "--undo got u.pt: expected another file than --fix, one that ends in"),
        (("--fix", "a.safetensors", "--undo", "a.safetensors"), "expected another file than --fix"),
    ],
)
def test_options_that_do_not_go_together_are_refused_before_the_work(recipe, arguments, sentence):
    before = set(os.listdir())
    assert sentence in refused("doctor", recipe, *arguments)
    assert set(os.listdir()) == before
