"""The page of every rule, from the docstring of its file: `make docs` writes them to docs/rules.

`steadynorm explain` shows the same text.
"""

import inspect
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

from steadynorm.doctor.rules import RULES, Rule, advice_of, code_of, slug_of
from steadynorm.report import write_text

SECTIONS = ("Why", "Bad", "Good", "Source")
OPTIONAL = ("Cost",)
GENERATED = "<!-- Written by `make docs` from src/steadynorm/doctor/rules/{}.py: change that file, not this one. -->"
TOPICS = {
    "SN0": "What stands in the way of the examination",
    "SN1": "Structure: how layers are put together, and how many values they see",
    "SN2": "State: what is stored in buffers and checkpoints",
    "SN3": "Steps: what changes in which phase of a training step",
    "SN4": "Data: how batches are made",
    "SN5": "Numerics",
    "SN6": "Distributed training",
    "SN7": "Optimizer",
    "SN8": "Deployment",
}


@dataclass(frozen=True)
class Page:
    """The docstring of a rule, in its parts; `bad` and `good` are code."""

    code: str
    slug: str
    advice: str
    why: str
    bad: str
    good: str
    source: str
    cost: str = ""


def page_of(rule: Rule) -> Page:
    """The page of a rule.

    Raises:
        ValueError: a section is missing.
    """
    text = inspect.cleandoc(rule.__doc__ or "")
    names = "|".join((*SECTIONS, *OPTIONAL))
    parts = dict(re.findall(rf"^({names}):(.*?)(?=^(?:{names}):|\Z)", text, re.M | re.S))
    if missing := [name for name in SECTIONS if name not in parts]:
        raise ValueError(f"{rule.__name__} lacks the section {missing[0]!r}: expected {', '.join(SECTIONS)}")
    advice = text[: text.index("Why:")]
    flowing = (" ".join(part.split()) for part in (advice, parts["Why"], parts["Source"], parts.get("Cost", "")))
    advice, why, source, cost = flowing
    bad, good = (textwrap.dedent(parts[name].strip("\n")).rstrip() for name in ("Bad", "Good"))
    return Page(code_of(rule), slug_of(rule), advice, why[:1].upper() + why[1:], bad, good, source, cost)


def why_of(rule: Rule) -> str:
    """The first sentence of a rule's reasons."""
    return re.split(r"(?<=[a-z0-9)`\"]\.)\s", page_of(rule).why, maxsplit=1)[0]


def advice_for(code: str) -> str:
    """The one sentence of the rule with this code; empty if there is none."""
    return next((advice_of(rule) for rule in RULES if code_of(rule) == code), "")


def why_for(code: str) -> str:
    """The first sentence of the reasons of the rule with this code; empty if there is none."""
    return next((why_of(rule) for rule in RULES if code_of(rule) == code), "")


def markdown(rule: Rule) -> str:
    """The page of a rule as Markdown."""
    page = page_of(rule)
    blocks = [
        GENERATED.format(rule.__name__.rpartition(".")[2]),
        f"# {page.code} {page.slug}",
        page.advice,
        "\n".join(textwrap.wrap(f"**Why.** {page.why}", 118, break_long_words=False, break_on_hyphens=False)),
        f"This is found:\n\n```python\n{page.bad}\n```",
        f"This is not:\n\n```python\n{page.good}\n```",
        *([f"**Cost.** {page.cost}"] if page.cost else []),
        f"**Looks at** {', '.join(rule.needs)} ([what these are](../doctor.md#what-it-looks-at)).",
        f"**Source.** {_linked(page.source)}",
        f"Select it with `--select {page.code}`, leave it out with `--ignore {page.code}`; "
        "[findings.md](../findings.md#suppressing) says how one module is left out. [All rules](README.md)",
    ]
    return "\n\n".join(blocks) + "\n"


def index() -> str:
    """The table of all rules as Markdown, by topic."""
    blocks = [
        "<!-- Written by `make docs` from the files in src/steadynorm/doctor/rules/. -->",
        "# The rules of the doctor",
        f"{len(RULES)} rules. A code is never used again for another fault; hundreds are topics. "
        "`steadynorm explain SN203` shows the page of a rule in the terminal. "
        "[doctor.md](../doctor.md) says how a model is examined.",
    ]
    for topic, title in TOPICS.items():
        rules = [rule for rule in RULES if code_of(rule).startswith(topic)]
        if rules:
            rows = [f"| [{code_of(rule)}]({code_of(rule)}.md) | {advice_of(rule)} |" for rule in rules]
            blocks += [f"## {topic}xx {title}", "\n".join(["| code | what it says |", "|---|---|", *rows])]
    return "\n\n".join(blocks) + "\n"


def pages() -> dict[str, str]:
    """Every page by its file name."""
    return {"README.md": index(), **{f"{code_of(rule)}.md": markdown(rule) for rule in RULES}}


def write(folder: Path) -> None:
    """Write every page into `folder`, and take away those of rules that are gone."""
    written = pages()
    for name, text in written.items():
        write_text(folder / name, text)
    for path in folder.glob("SN*.md"):
        if path.name not in written:
            path.unlink()


def _linked(source: str) -> str:
    return re.sub(r"https?://[^\s,;)]+", lambda found: f"<{found[0]}>", source)
