"""A rule file is its own test: its Bad example must be found by it, its Good one must not."""

import inspect
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import steadynorm
from steadynorm import doctor
from steadynorm.doctor import rules
from steadynorm.doctor.rules import RULES, advice_of, code_of, is_on
from steadynorm.errors import InputError
from steadynorm.probe import PARTS, Facts
from tests.doctor.cases import FAULTS, HEALTHY
from tests.doctor.controls import CONTROLS
from tests.doctor.planted import PLANTED


@pytest.fixture(autouse=True)
def _no_process_group():
    """Examples may make one; the next begins without."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


CODES = [code_of(rule) for rule in RULES]
SECTIONS = ("Why:", "Bad:", "Good:", "Source:")


def example(rule, name):
    """The code of a section, as names that it defines."""
    text = inspect.cleandoc(rule.__doc__)
    start = text.index(f"\n{name}:\n") + len(name) + 3
    end = min(text.index(section) for section in SECTIONS if section in text[start:] and text.index(section) > start)
    names = {"torch": torch, "nn": nn, "F": F, "DataLoader": DataLoader, "steadynorm": steadynorm}
    exec(inspect.cleandoc("\n" + text[start:end]), names)
    return names


def codes_found(rule, name):
    names = example(rule, name)
    given = {name: names.get(name) for name in ("train_batches", "loss", "optimizer", "step", "checkpoint")}
    # What is off by default is selected; the others are found among all.
    select = () if is_on(rule) else [code_of(rule)]
    result = doctor.examine(names["model"], names["batches"], select=select, **given)
    return [finding.code for finding in result.findings]


@pytest.mark.parametrize("rule", RULES, ids=code_of)
def test_a_rule_speaks_on_its_bad_example(rule):
    assert code_of(rule) in codes_found(rule, "Bad")


@pytest.mark.parametrize("rule", RULES, ids=code_of)
def test_a_rule_is_silent_on_its_good_example(rule):
    assert code_of(rule) not in codes_found(rule, "Good")


def test_every_rule_file_is_in_rules_once_and_in_order():
    files = sorted(path.stem for path in Path(rules.__file__).parent.glob("SN*.py"))
    assert [rule.__name__.rpartition(".")[2] for rule in RULES] == files
    assert len(set(CODES)) == len(CODES)


@pytest.mark.parametrize("rule", RULES, ids=code_of)
def test_a_rule_is_documented(rule):
    text = inspect.cleandoc(rule.__doc__)
    assert advice_of(rule).endswith(".")
    positions = [text.index(f"\n{section}") for section in SECTIONS]
    assert positions == sorted(positions)
    assert set(rule.needs) <= set(PARTS)


@pytest.mark.parametrize("rule", RULES, ids=code_of)
def test_a_rule_has_nothing_to_say_where_nothing_was_seen(rule):
    assert list(rule.check(Facts())) == []


@pytest.mark.parametrize("rule", RULES, ids=code_of)
def test_explain_shows_the_file(rule):
    text = doctor.explain(code_of(rule).lower())
    assert text.startswith(code_of(rule))
    assert advice_of(rule) in text
    assert "Good:" in text


def test_explain_names_the_rules_for_an_unknown_code():
    with pytest.raises(InputError, match=r"'SN999'.*SN001, SN002"):
        doctor.explain("SN999")


def test_the_documentation_counts_the_cases():
    page = (Path(__file__).parents[2] / "docs" / "doctor.md").read_text()
    assert f"plants {len(FAULTS + PLANTED)} faults" in page
    assert f"holds {len(HEALTHY + CONTROLS)} healthy" in page
