"""The pages of the rules: written from the rule files, up to date, and the same as `steadynorm explain`."""

import inspect
import re
import types
from pathlib import Path

import pytest
import torch

from steadynorm import doctor
from steadynorm.doctor import pages
from steadynorm.doctor.rules import RULES, advice_of, code_of

DOCS = Path(__file__).parents[2] / "docs"


def test_the_pages_are_up_to_date():
    written = {path.name: path.read_text() for path in (DOCS / "rules").glob("*.md")}
    stale = [name for name, text in pages.pages().items() if written.pop(name, "") != text]
    assert (stale, list(written)) == ([], []), "run make docs"


@pytest.mark.parametrize("rule", RULES, ids=code_of)
def test_a_page_says_what_explain_says(rule):
    def compact(text):
        return re.sub(r"[\W_]", "", text).lower()

    page = compact(pages.markdown(rule))
    for part in re.split(r"^(?:Why|Bad|Good|Cost|Source):", doctor.explain(code_of(rule)), flags=re.MULTILINE):
        assert compact(part) in page


@pytest.mark.parametrize("rule", RULES, ids=code_of)
def test_the_examples_of_a_page_are_python(rule):
    blocks = re.findall(r"```python\n(.*?)```", pages.markdown(rule), re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        compile(block, "page", "exec")


def test_the_index_lists_every_rule_by_topic():
    text = pages.index()
    for rule in RULES:
        assert f"| [{code_of(rule)}]({code_of(rule)}.md) | {advice_of(rule)} |" in text
    assert set(re.findall(r"## (SN\d)xx", text)) == {code_of(rule)[:3] for rule in RULES}


def test_pages_of_rules_that_are_gone_are_taken_away(tmp_path):
    (tmp_path / "SN999.md").write_text("gone")
    (tmp_path / "notes.md").write_text("mine")
    pages.write(tmp_path)
    assert not (tmp_path / "SN999.md").exists()
    assert (tmp_path / "notes.md").exists()
    assert len(list(tmp_path.iterdir())) == len(RULES) + 2


def test_a_rule_without_a_section_has_no_page():
    rule = types.SimpleNamespace(__name__="SN999_nothing", __doc__="Advice.\n\nWhy: so.\n", needs=())
    with pytest.raises(ValueError, match="SN999_nothing lacks the section 'Bad'"):
        pages.page_of(rule)


def test_the_reason_of_a_rule_is_a_sentence():
    for rule in RULES:
        why = pages.why_of(rule)
        assert why.endswith(".")
        assert why[0] == why[0].upper()
        assert why[1:] in " ".join(inspect.cleandoc(rule.__doc__).split())


def test_the_example_of_the_monitor_runs():
    (block,) = re.findall(r"```python\n(.*?)```", (DOCS / "monitor.md").read_text(), re.DOTALL)
    names = {}
    torch.manual_seed(0)
    exec(block.replace("print(monitor)", ""), names)
    assert names["monitor"].looks == 3
    assert names["monitor"].findings == ()
