"""The result of an examination, which shows itself in a terminal, in a notebook and as JSON."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from steadynorm.doctor.finding import SEVERITIES, Finding
from steadynorm.doctor.formats.data import data
from steadynorm.doctor.formats.document import document
from steadynorm.doctor.formats.github import github
from steadynorm.doctor.formats.page import page
from steadynorm.doctor.formats.sarif import sarif
from steadynorm.probe import Facts, Loss, Metrics, Optimizers, Source, Step
from steadynorm.report import Chart, Document

NOTEBOOK_HEIGHT = 640


@dataclass(frozen=True)
class Judgement:
    """How an examination was asked for, so that a repair is judged in the same way."""

    train_batches: Source | None = None
    loss: Loss | None = None
    metrics: Metrics | None = None
    optimizer: Optimizers | None = None
    step: Step | None = None
    checkpoint: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Suppressed:
    """A finding that somebody looked at and keeps, and why."""

    finding: Finding
    reason: str


@dataclass(frozen=True)
class Diagnosis:
    """What was found, what was looked at, and what was not.

    Args:
        findings: the worst first.
        checked: codes of the rules that could look at all they need.
        unchecked: code to the reason why not.
        remarks: what a reader has to know about the examination itself.
        suppressed: findings that are kept on purpose; they count for nothing but are listed.
        unused: sentences about suppressions that fit nothing.
        off: codes of the rules that were not asked for, by choice or by default.
    """

    findings: tuple[Finding, ...]
    checked: tuple[str, ...]
    unchecked: Mapping[str, str]
    facts: Facts = field(repr=False)
    remarks: tuple[str, ...] = ()
    title: str = "Diagnosis"
    judgement: Judgement = field(default=Judgement(), repr=False, compare=False)
    suppressed: tuple[Suppressed, ...] = ()
    unused: tuple[str, ...] = ()
    off: tuple[str, ...] = ()

    @property
    def is_clean(self) -> bool:
        """Whether nothing was found that is worse than a note. What was not checked may still hold faults."""
        return all(finding.severity == "note" for finding in self.findings)

    @property
    def summary(self) -> str:
        """The verdict in a sentence."""
        counts = [(s, sum(finding.severity == s for finding in self.findings)) for s in SEVERITIES]
        found = [f"{count} {severity}{'s' if count > 1 else ''}" for severity, count in counts if count]
        head = f"{', '.join(found)}." if found else "No faults found."
        if self.suppressed:
            head += f" {len(self.suppressed)} suppressed."
        count = len(self.facts.norms)
        norms = f"{count} norm layer{'' if count == 1 else 's'}"
        return f"{head} {len(self.checked)} of {len(self.checked) + len(self.unchecked)} rules checked {norms}."

    def document(self) -> Document:
        """The diagnosis as a document, for the terminal."""
        return document(self)

    def page(self, after: "Diagnosis | None" = None, repairs: Sequence[str] = ()) -> Document:
        """The diagnosis as a document for a browser, with the network down the side.

        Args:
            after: the diagnosis after a repair; its statistics are drawn beside these.
            repairs: what was done, in sentences.
        """
        return page(self, after, repairs)

    def to_dict(self) -> dict[str, Any]:
        """The diagnosis as JSON has it; numbers that JSON lacks are the strings "nan", "inf" and "-inf"."""
        return data(self)

    def to_sarif(self) -> dict[str, Any]:
        """The diagnosis as SARIF 2.1.0."""
        return sarif(self)

    def to_github(self) -> str:
        """The diagnosis as annotations of GitHub Actions, a line each."""
        return github(self)

    def __str__(self) -> str:
        from steadynorm.report import terminal

        console = terminal.console()
        with console.capture() as captured:
            terminal.show(self.document(), console)
        return captured.get()

    def _repr_html_(self) -> str:
        from steadynorm.report import html as pages

        document = self.document()
        # The plotting library is larger than a notebook should be: a chart is shown as its table.
        blocks = tuple(block.table() if isinstance(block, Chart) else block for block in document.blocks)
        shown = Document(document.title, document.summary, document.status, blocks, document.facts)
        source = html.escape(pages.render([shown], self.title), quote=True)
        return f'<iframe srcdoc="{source}" style="width: 100%; height: {NOTEBOOK_HEIGHT}px; border: 0"></iframe>'
