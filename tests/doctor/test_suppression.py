"""What somebody looked at and keeps: with a reason, listed, and named once it fits nothing."""

import json

import pytest

from steadynorm import doctor
from steadynorm.doctor import Diagnosis, Finding, Suppression, suppression
from steadynorm.errors import InputError
from steadynorm.probe import Facts

STALE = Finding("SN203", "error", "measured", "backbone.layer1.bn", "Stale.")
BIAS = Finding("SN104", "note", "proved", "backbone.conv", "Dead.")
RAGGED = Finding("SN402", "warning", "heuristic", "", "Ragged.")
CHECKED = ("SN104", "SN203", "SN402")


def diagnosis(*findings, checked=CHECKED, unchecked=None):
    return Diagnosis(findings or (STALE, RAGGED, BIAS), checked, unchecked or {}, Facts())


def suppressed(*entries, of=None):
    kept = [Suppression(rule, module, "known", "pyproject.toml") for rule, module in entries]
    return doctor.suppress(of or diagnosis(), kept)


@pytest.mark.parametrize(
    ("rule", "module", "codes"),
    [
        ("SN104", "backbone.*", ["SN104"]),
        ("SN", "backbone.*", ["SN203", "SN104"]),
        ("SN2", "*", ["SN203"]),
        ("SN203", "backbone.*.bn", ["SN203"]),
        ("SN402", "", ["SN402"]),
        ("SN203", "backbone", []),
        ("SN203", "backbone.LAYER1.bn", []),
        ("SN402", "backbone.*", []),
    ],
)
def test_a_rule_and_a_glob_say_what_is_meant(rule, module, codes):
    found = suppressed((rule, module))
    assert [s.finding.code for s in found.suppressed] == codes
    assert [f.code for f in found.findings] == [f.code for f in diagnosis().findings if f.code not in codes]


def test_what_is_suppressed_is_counted_and_listed_and_does_not_count_against_the_model():
    found = suppressed(("SN203", "*"), ("SN402", ""))
    assert found.is_clean
    assert found.summary.startswith("1 note. 2 suppressed.")
    text = str(found)
    assert "Suppressed" in text
    assert "known" in text
    assert "backbone.layer1.bn" in text


def test_a_suppression_that_fits_nothing_is_named():
    found = suppressed(("SN203", "head.*"), ("SN203", "backbone.*"))
    assert found.unused == ("pyproject.toml suppresses SN203 at head.*, where there is nothing: take it out.",)
    assert found.unused[0] in " ".join(str(found).split())


def test_a_suppression_of_a_rule_that_was_not_checked_is_not_called_unused():
    assert suppressed(("SN8", "head"), of=diagnosis()).unused == ()
    of = diagnosis(STALE, checked=("SN203",), unchecked={"SN201": "no batches were given"})
    assert suppressed(("SN2", "head"), of=of).unused == ()


def test_a_baseline_hides_what_was_there_and_shows_what_is_new_or_worse(tmp_path):
    file = tmp_path / "baseline.json"
    assert suppression.write_baseline(diagnosis(STALE, BIAS), file) == 2
    kept = suppression.read_baseline(file)
    assert doctor.suppress(diagnosis(STALE, BIAS), kept).findings == ()
    worse = Finding(**{**vars(BIAS), "severity": "warning"})
    better = Finding(**{**vars(STALE), "severity": "note"})
    assert doctor.suppress(diagnosis(worse, RAGGED), kept).findings == (worse, RAGGED)
    assert doctor.suppress(diagnosis(better), kept).findings == ()


def test_a_baseline_that_outlived_a_finding_is_named(tmp_path):
    file = tmp_path / "baseline.json"
    suppression.write_baseline(diagnosis(), file)
    found = doctor.suppress(diagnosis(BIAS), suppression.read_baseline(file))
    assert found.unused == (
        "baseline.json suppresses SN203 at backbone.layer1.bn, where there is nothing: take it out.",
        "baseline.json suppresses SN402 at the whole model, where there is nothing: take it out.",
    )


def test_a_baseline_holds_what_was_suppressed_and_paths_with_stars(tmp_path):
    file, star = tmp_path / "baseline.json", Finding("SN203", "error", "measured", "a.*[0]", "Odd.")
    suppression.write_baseline(suppressed(("SN104", "*"), of=diagnosis(star, BIAS)), file)
    content = json.loads(file.read_text())
    assert [entry["code"] for entry in content["findings"]] == ["SN104", "SN203"]
    kept = suppression.read_baseline(file)
    assert doctor.suppress(diagnosis(star, STALE), kept).findings == (STALE,)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "cannot be read: No such file"),
        ("{", "is no JSON"),
        ("[]", "is no baseline of version 1"),
        ('{"steadynorm_baseline": 2, "findings": []}', "is no baseline of version 1"),
        ('{"steadynorm_baseline": 1}', "is damaged at None"),
        ('{"steadynorm_baseline": 1, "findings": [{"code": "SN203", "where": "a", "severity": "bad"}]}', "is damaged"),
    ],
)
def test_a_baseline_that_cannot_be_used_is_refused(tmp_path, content, sentence):
    file = tmp_path / "baseline.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(InputError, match=sentence):
        suppression.read_baseline(file)


SETTINGS = """
[tool.steadynorm.doctor]
select = ["SN1", "SN2"]
ignore = ["SN112"]
baseline = "known/findings.json"

[[tool.steadynorm.doctor.suppress]]
rule = "sn104"
module = "backbone.*"
reason = " published weights "
"""


def test_the_nearest_pyproject_says_what_is_kept(tmp_path):
    (tmp_path / "pyproject.toml").write_text(SETTINGS)
    inner = tmp_path / "models" / "recipes"
    inner.mkdir(parents=True)
    found = suppression.settings_near(inner)
    assert (found.select, found.ignore) == (("SN1", "SN2"), ("SN112",))
    assert found.baseline == tmp_path / "known" / "findings.json"
    assert found.suppressions == (Suppression("SN104", "backbone.*", "published weights", "pyproject.toml"),)
    (tmp_path / "models" / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    assert suppression.settings_near(inner) == suppression.Settings()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[tool.steadynorm.doctor", "cannot be read"),
        ("[tool.steadynorm]\ndoctor = 3", "doctor in .* is int: expected a table"),
        ("[tool.steadynorm.doctor]\nselct = ['SN1']", "has 'selct': expected select, ignore"),
        ("[tool.steadynorm.doctor]\nselect = 'SN1'", "select in .* is 'SN1': expected a list of codes"),
        ("[tool.steadynorm.doctor]\nbaseline = 3", "baseline in .* is 3: expected a path"),
        ("[tool.steadynorm.doctor]\nsuppress = 'SN104'", "suppress in .* is no list"),
        ("[[tool.steadynorm.doctor.suppress]]\nrule = 'SN104'\nmodule = 'a'", "lacks 'reason'"),
        ("[[tool.steadynorm.doctor.suppress]]\nrule = 'SN104'\nmodule = 'a'\nreason = ' '", "lacks 'reason'"),
        ("[[tool.steadynorm.doctor.suppress]]\nrule = 'SN104'\nreason = 'x'", "lacks 'module'"),
        (
            "[[tool.steadynorm.doctor.suppress]]\nrule = 'SN104'\nmodule = 'a'\nreason = 'x'\nuntil = '2030'",
            "has 'until'",
        ),
        ("[[tool.steadynorm.doctor.suppress]]\nrule = 'SN999'\nmodule = 'a'\nreason = 'x'", "names 'SN999'"),
    ],
)
def test_settings_that_say_nothing_sensible_are_refused(tmp_path, text, sentence):
    (tmp_path / "pyproject.toml").write_text(text)
    with pytest.raises(InputError, match=sentence):
        suppression.settings_near(tmp_path)
