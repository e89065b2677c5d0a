"""A diagnosis as JSON, SARIF, annotations and a page: each valid by its own rules, and all of them saying the same."""

import functools
import json
import math
import re
from pathlib import Path

import jsonschema
import pytest
import torch
from torch import nn

from steadynorm import doctor
from steadynorm.cli.output import as_json
from steadynorm.doctor import Finding, Suppression
from steadynorm.doctor.finding import Location
from steadynorm.doctor.formats import layers
from steadynorm.report import Card, Chart, Parts, Table
from tests.doctor import sarif_schema

SCHEMA = json.loads((Path(__file__).parents[2] / "docs" / "findings.schema.json").read_text())


class Block(nn.Module):
    """A stale norm, a bias that does nothing, and samples that meet."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3)
        self.bn = nn.BatchNorm2d(8)

    def forward(self, x):
        y = self.bn(self.conv(x))
        return y - y.mean(0)


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Block()
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.block(x).relu().mean((2, 3)))


def images(count=4):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(16, 1, 8, 8, generator=generator) for _ in range(count)]


@functools.cache
def diagnosis():
    torch.manual_seed(0)
    model = Network()
    nn.init.uniform_(model.block.bn.bias)
    model.block.bn.running_mean.fill_(3.0)
    found = doctor.examine(model, images())
    assert {(f.code, f.where) for f in found.findings} == {
        ("SN203", "block.bn"),
        ("SN801", "block"),
        ("SN104", "block.conv"),
    }
    return found


@functools.cache
def suppressed():
    return doctor.suppress(diagnosis(), [Suppression("SN104", "block.*", "somebody else's weights", "pyproject.toml")])


def line_of(text):
    lines = Path(__file__).read_text().splitlines()
    return 1 + next(i for i, line in enumerate(lines) if text in line)


def finding(code, within=diagnosis):
    return next(found for found in within().findings if found.code == code)


def test_a_finding_names_the_line_that_makes_the_module():
    assert finding("SN203").source == Location(__file__, line_of("self.bn = nn.BatchNorm2d(8)"))
    assert finding("SN104").source == Location(__file__, line_of("self.conv = nn.Conv2d(1, 8, 3)"))
    assert finding("SN801").source == Location(__file__, line_of("class Block(nn.Module)"))


def test_a_measured_finding_says_what_it_does_to_the_results():
    assert re.fullmatch(
        r"The output changes by \d.* of its deviation when this layer's statistics are refreshed\.",
        finding("SN203").consequence,
    )
    assert "consequence" not in finding("SN203").evidence
    assert finding("SN104").consequence == ""
    assert finding("SN203").cause == "Training uses the statistics of the batch, evaluation the stored ones."


def test_the_json_is_what_the_schema_says():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    for each in (diagnosis(), suppressed(), doctor.examine(Network())):
        content = json.loads(as_json(each.to_dict()))
        jsonschema.validate(content, SCHEMA, jsonschema.Draft202012Validator)
    assert content["unchecked"]["SN203"] == "no batches were given"
    assert [entry["reason"] for entry in suppressed().to_dict()["suppressed"]] == ["somebody else's weights"]


@pytest.mark.parametrize("harm", ["severity", "extra", "missing", "version"])
def test_the_schema_refuses_what_is_not_meant(harm):
    content = json.loads(as_json(diagnosis().to_dict()))
    if harm == "severity":
        content["findings"][0]["severity"] = "fatal"
    elif harm == "extra":
        content["findings"][0]["colour"] = "red"
    elif harm == "missing":
        del content["unchecked"]
    else:
        content["schema_version"] = 1
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(content, SCHEMA, jsonschema.Draft202012Validator)


def test_the_page_of_the_schema_names_every_key():
    page = (Path(__file__).parents[2] / "docs" / "findings.md").read_text()
    for key in (*SCHEMA["properties"], *SCHEMA["$defs"]["finding"]["properties"]):
        assert f"`{key}`" in page, key


def valid(log):
    jsonschema.validate(log, sarif_schema.LOG, jsonschema.Draft202012Validator)
    assert list(sarif_schema.faults(log)) == []
    return log["runs"][0]


@pytest.mark.parametrize("make", [diagnosis, suppressed, lambda: doctor.examine(Network())])
def test_the_sarif_log_is_valid(make):
    found = make()
    run = valid(json.loads(as_json(found.to_sarif())))
    assert len(run["results"]) == len(found.findings) + len(found.suppressed)
    notes = [note["message"]["text"] for note in run["invocations"][0]["toolExecutionNotifications"]]
    for code, reason in found.unchecked.items():
        assert f"{code} was not checked: {reason}." in notes


def test_a_sarif_result_has_the_module_the_line_and_the_evidence():
    run = valid(diagnosis().to_sarif())
    result = next(each for each in run["results"] if each["ruleId"] == "SN203")
    (place,) = result["locations"]
    assert place["logicalLocations"] == [{"name": "bn", "fullyQualifiedName": "block.bn", "kind": "module"}]
    assert place["physicalLocation"]["region"]["startLine"] == finding("SN203").source.line
    assert place["physicalLocation"]["artifactLocation"]["uri"].endswith("tests/doctor/test_formats.py")
    assert result["properties"]["evidence"]["divergence"] == finding("SN203").evidence["divergence"]
    assert result["level"] == finding("SN203").severity


def test_a_suppressed_finding_is_in_the_sarif_log_with_its_reason():
    run = valid(suppressed().to_sarif())
    (result,) = [each for each in run["results"] if "suppressions" in each]
    assert result["ruleId"] == "SN104"
    assert result["suppressions"][0]["justification"] == "somebody else's weights"


@pytest.mark.parametrize("harm", ["level", "line", "rule", "absolute"])
def test_a_wrong_log_is_refused(harm):
    log = json.loads(as_json(diagnosis().to_sarif()))
    result = log["runs"][0]["results"][0]
    place = result["locations"][0]["physicalLocation"]
    if harm == "level":
        result["level"] = "fatal"
    elif harm == "line":
        place["region"]["startLine"] = 0
    elif harm == "rule":
        result["ruleIndex"] += 1
    else:
        place["artifactLocation"]["uri"] = "/a path/with spaces.py"
    with pytest.raises((jsonschema.ValidationError, AssertionError)):
        valid(log)


def test_a_fingerprint_holds_while_numbers_change():
    one = finding("SN203")
    same = Finding(**{**vars(one), "severity": "note", "evidence": {}})
    other = Finding(**{**vars(one), "where": "block.bn2"})
    prints = [doctor.Diagnosis((f,), ("SN203",), {}, diagnosis().facts).to_sarif() for f in (one, same, other)]
    ours, again, different = (log["runs"][0]["results"][0]["partialFingerprints"] for log in prints)
    assert ours == again != different


COMMAND = re.compile(r"::(error|warning|notice) ((?:[a-z]+=[^,:]*,?)+)::([^\r\n]*)")


def test_annotations_are_commands_of_one_line_each():
    lines = suppressed().to_github().splitlines()
    assert len(lines) == len(suppressed().findings) + 1
    commands = [COMMAND.fullmatch(line) for line in lines]
    assert all(commands)
    for found, command in zip(suppressed().findings, commands, strict=False):
        assert command[1] == {"error": "error", "warning": "warning", "note": "notice"}[found.severity]
        properties = dict(pair.split("=") for pair in command[2].split(","))
        assert properties["line"] == str(found.source.line)
        assert properties["file"].endswith("tests/doctor/test_formats.py")
        assert properties["title"].startswith(f"{found.code} {found.where}%3A")
    assert "suppressed: SN104 block.conv" in lines[-1]
    assert "not checked: SN101" in lines[-1]


def test_what_a_message_holds_cannot_end_an_annotation():
    hostile = Finding("SN203", "error", "proved", "a,b:c", "100 %\n::error::owned", {}, None)
    text = doctor.Diagnosis((hostile,), ("SN203",), {}, diagnosis().facts).to_github()
    (line,) = text.splitlines()
    assert COMMAND.fullmatch(line)
    assert line.endswith("::a,b:c: 100 %25%0A::error::owned")
    assert "title=SN203 a%2Cb%3Ac%3A " in line


def test_no_findings_and_nothing_unchecked_are_no_annotations():
    assert doctor.Diagnosis((), ("SN203",), {}, diagnosis().facts).to_github() == ""


def parts(document):
    return next(block for block in document.blocks if isinstance(block, Parts))


def test_the_page_lists_the_network_in_the_order_in_which_it_runs():
    entries = {entry.title: entry for entry in parts(diagnosis().page()).entries}
    assert list(entries) == ["block.conv", "block.bn", "block", "head"]
    assert [entry.status for entry in entries.values()] == ["note", finding("SN203").severity, "error", None]
    assert entries["block.bn"].note == "BatchNorm2d 8×6×6"
    assert [block.code for block in entries["block"].blocks if isinstance(block, Card)] == ["SN801"]
    assert entries["head"].blocks == []


def test_a_layer_is_drawn_with_its_stored_and_recalibrated_statistics():
    entry = next(entry for entry in parts(diagnosis().page()).entries if entry.title == "block.bn")
    means, deviations = (block for block in entry.blocks if isinstance(block, Chart))
    drift = diagnosis().facts.drift["block.bn"]
    (series,) = means.series
    assert series.y == pytest.approx([3.0] * 8)
    assert series.x == pytest.approx([mean for mean, _ in drift.measured], rel=1e-3)
    assert deviations.series[0].x == pytest.approx([var**0.5 for _, var in drift.measured], rel=1e-3)
    assert means.kind == "scatter"
    rows = {row[0]: row[1] for block in entry.blocks if isinstance(block, Table) for row in block.rows}
    assert rows["divergence from the data"] == drift.divergence


def test_a_repair_is_drawn_beside_what_was_before():
    torch.manual_seed(0)
    model = Network()
    nn.init.uniform_(model.block.bn.bias)
    model.block.bn.running_mean.fill_(3.0)
    before = doctor.examine(model, images())
    doctor.repair(model, before, images())
    after = doctor.examine(model, images())
    entries = {entry.title: entry for entry in parts(before.page(after, ["Done."])).entries}
    means = next(block for block in entries["block.bn"].blocks if isinstance(block, Chart))
    assert [series.name for series in means.series] == ["before", "after"]
    assert means.series[1].y == pytest.approx(means.series[1].x, rel=0.05, abs=0.05)
    said = [getattr(block, "text", "") for entry in entries.values() for block in entry.blocks]
    assert "After the repair SN203 is gone." in said
    assert any(text.startswith("After the repair SN801 is still there") for text in said)


def test_large_layers_are_drawn_by_some_of_their_channels_with_the_farthest_among_them():
    model = nn.Sequential(nn.Conv2d(1, 600, 3, bias=False), nn.BatchNorm2d(600))
    nn.init.uniform_(model[1].bias)
    model[1].running_mean[417] = 50.0
    model[1].running_var[11] = math.nan
    entry = parts(doctor.examine(model, images()).page()).entries[1]
    means = next(block for block in entry.blocks if isinstance(block, Chart))
    assert len(means.series[0].x) == 246
    assert 50.0 in means.series[0].y
    assert means.note.startswith("246 of 600 channels")


def test_columns_of_which_nothing_is_known_are_left_out():
    assert layers.table(doctor.examine(Network()).facts).columns == ["layer", "kind"]
