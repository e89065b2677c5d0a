"""The rules: one file each, which is its documentation and its test too.

A rule file is named by its code and its slug. Its docstring is one sentence of advice, then the paragraphs Why, Bad,
Good and Source; `tests/doctor/test_rules.py` runs Bad and Good. `needs` names the parts of the probe that it reads:
where one of them could not be looked at, the rule is reported as not checked. `measures_by` names parts that it reads
where they are there. `check` is a pure function of the facts.

A code is never used again for another fault. Hundreds are topics, and within them a rule keeps its number whatever it
becomes. A rule that speaks of taste, or that is right in fewer than nine of ten networks that people train on purpose,
has `is_optional = True`: it is checked only where its code, or a beginning of its code, is selected.
"""

import inspect
from collections.abc import Iterator
from importlib import import_module
from pkgutil import iter_modules
from typing import Protocol, cast

from steadynorm.doctor.finding import Finding
from steadynorm.errors import InputError
from steadynorm.probe import Facts, Part


class Rule(Protocol):
    """A rule file, as a module."""

    __name__: str
    __doc__: str | None
    needs: tuple[Part, ...]

    def check(self, facts: Facts) -> Iterator[Finding]:
        """The faults of this kind that the facts show."""
        ...


RULES: tuple[Rule, ...] = tuple(
    cast(Rule, import_module(f"{__name__}.{file.name}"))
    for file in sorted(iter_modules(__path__), key=lambda file: file.name)
)
"""Every file of this folder, by code."""


def is_on(rule: Rule) -> bool:
    """Whether a rule is checked without being selected by its code."""
    return not getattr(rule, "is_optional", False)


def code_of(rule: Rule) -> str:
    """The code of a rule, from the name of its file."""
    return rule.__name__.rpartition(".")[2].partition("_")[0]


def slug_of(rule: Rule) -> str:
    """The name of a rule, from the name of its file."""
    return rule.__name__.rpartition(".")[2].partition("_")[2].replace("_", "-")


def advice_of(rule: Rule) -> str:
    """The one sentence of a rule."""
    return (rule.__doc__ or "").strip().partition("\n")[0]


def explain(code: str) -> str:
    """What a rule says, why, an example that it finds and one that it does not, and where it comes from.

    Raises:
        InputError: no rule has this code.
    """
    for rule in RULES:
        if code.upper() == code_of(rule):
            return f"{code_of(rule)} {slug_of(rule)}\n\n{inspect.cleandoc(rule.__doc__ or '')}"
    codes = ", ".join(map(code_of, RULES))
    raise InputError(f"no rule has the code {code!r}: expected one of {codes}.")
