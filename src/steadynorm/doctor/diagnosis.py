"""The result of an examination, which shows itself in a terminal, in a notebook and as JSON."""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from steadynorm import machine
from steadynorm.doctor.finding import SEVERITIES, Finding
from steadynorm.doctor.rules import RULES, advice_of, code_of
from steadynorm.probe import Facts, Loss, Metrics, Source
from steadynorm.probe.facts import CHANCE_FACTOR, MATERIAL_DIVERGENCE
from steadynorm.report import Block, Card, Cell, Chart, Document, Paragraph, Series, Status, Table

SCHEMA_VERSION = 1
NOTEBOOK_HEIGHT = 640


@dataclass(frozen=True)
class Judgement:
    """How an examination was asked for, so that a repair is judged in the same way."""

    train_batches: Source | None = None
    loss: Loss | None = None
    metrics: Metrics | None = None


@dataclass(frozen=True)
class Diagnosis:
    """What was found, what was looked at, and what was not.

    Args:
        findings: the worst first.
        checked: codes of the rules that could look at all they need.
        unchecked: code to the reason why not.
        remarks: what a reader has to know about the examination itself.
    """

    findings: tuple[Finding, ...]
    checked: tuple[str, ...]
    unchecked: Mapping[str, str]
    facts: Facts = field(repr=False)
    remarks: tuple[str, ...] = ()
    title: str = "Diagnosis"
    judgement: Judgement = field(default=Judgement(), repr=False, compare=False)

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
        count = len(self.facts.norms)
        norms = f"{count} norm layer{'' if count == 1 else 's'}"
        return f"{head} {len(self.checked)} of {len(self.checked) + len(self.unchecked)} rules checked {norms}."

    def document(self) -> Document:
        """The diagnosis as a document."""
        blocks: list[Block] = [Paragraph(remark) for remark in self.remarks]
        blocks += [_card(finding) for finding in self.findings]
        blocks += _layers(self.facts)
        if self.unchecked:
            rows = [(code, _advice(code), reason) for code, reason in self.unchecked.items()]
            blocks.append(Table("Not checked", ("rule", "what it says", "why not"), rows))
        status: Status = self.findings[0].severity if self.findings else "ok"
        facts = {"samples": str(self.facts.batches.used), **machine.describe()}
        return Document(self.title, self.summary, status, tuple(blocks), facts)

    def to_dict(self) -> dict[str, Any]:
        """The diagnosis as JSON has it; numbers that JSON lacks are the strings "nan", "inf" and "-inf"."""
        described: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "title": self.title,
            "summary": self.summary,
            "is_clean": self.is_clean,
            "findings": [_as_dict(finding) for finding in self.findings],
            "checked": list(self.checked),
            "unchecked": dict(self.unchecked),
            "remarks": list(self.remarks),
            "layers": [dict(zip(LAYER_COLUMNS, row, strict=True)) for row in _layer_rows(self.facts)],
            "machine": machine.describe(),
        }
        return {key: _jsonable(value) for key, value in described.items()}

    def __str__(self) -> str:
        from steadynorm.report import terminal

        console = terminal.console()
        with console.capture() as captured:
            terminal.show(self.document(), console)
        return captured.get()

    def _repr_html_(self) -> str:
        from steadynorm.report import html as page

        document = self.document()
        # The plotting library is larger than a notebook should be: a chart is shown as its table.
        blocks = tuple(block.table() if isinstance(block, Chart) else block for block in document.blocks)
        shown = Document(document.title, document.summary, document.status, blocks, document.facts)
        source = html.escape(page.render([shown], self.title), quote=True)
        return f'<iframe srcdoc="{source}" style="width: 100%; height: {NOTEBOOK_HEIGHT}px; border: 0"></iframe>'


def _card(finding: Finding) -> Card:
    details: list[tuple[str, Cell]] = list(finding.evidence.items())
    return Card(
        status=finding.severity,
        code=finding.code,
        title=_advice(finding.code),
        where=finding.where or "the whole model",
        text=finding.message,
        details=(*details, ("confidence", finding.confidence)),
        fix=finding.fix.text if finding.fix else "",
    )


def _advice(code: str) -> str:
    return next((advice_of(rule).rstrip(".") for rule in RULES if code_of(rule) == code), "")


LAYER_COLUMNS = ("layer", "kind", "values", "independent", "divergence", "threshold")


def _layer_rows(facts: Facts) -> list[tuple[Cell, ...]]:
    size = max(facts.train_batches.sizes, default=0) if facts.train_batches else 0
    rows: list[tuple[Cell, ...]] = []
    for path, norm in facts.norms.items():
        values, drift = facts.values.get(path), facts.drift.get(path)
        independent = values.independent_per_sample if values else None
        rows.append(
            (
                path or "the model",
                norm.kind,
                round(values.per_sample * size) if values and size else None,
                independent * size if independent and size else None,
                drift.divergence if drift else None,
                max(MATERIAL_DIVERGENCE, CHANCE_FACTOR * drift.null) if drift else None,
            )
        )
    return rows


def _layers(facts: Facts) -> list[Block]:
    rows = _layer_rows(facts)
    if not rows:
        return []
    note = "Divergence: of the stored statistics from those of the data (Jeffreys, mean over channels)."
    if facts.train_batches:
        size = max(facts.train_batches.sizes, default=0)
        note += (
            f" Values: behind each statistic in a training batch of {size} samples. Independent: how many unrelated "
            "values these are worth, since values of one sample resemble each other."
        )
    blocks: list[Block] = [Table("Normalization layers", LAYER_COLUMNS, rows, note)]
    if len(facts.drift) > 1:
        blocks.append(_chart(facts))
    return blocks


def _chart(facts: Facts) -> Chart:
    """Divergence by layer, as its logarithm: a stale layer is a thousand times a healthy one."""
    found = facts.drift.values()
    heights = [math.log10(max(d.divergence, 1e-6) / MATERIAL_DIVERGENCE) for d in found]
    return Chart(
        "How far the stored statistics are from the data",
        "layer",
        "orders of magnitude over 0.01",
        [Series("divergence", [d.path for d in found], [h if math.isfinite(h) else None for h in heights])],
        kind="bar",
        note="Below zero is what healthy layers show; no bar is a layer whose statistics are broken.",
    )


def _as_dict(finding: Finding) -> dict[str, Any]:
    fix = finding.fix and {"text": finding.fix.text, "is_safe": finding.fix.is_safe}
    return {
        "code": finding.code,
        "rule": _advice(finding.code),
        "severity": finding.severity,
        "confidence": finding.confidence,
        "where": finding.where,
        "message": finding.message,
        "evidence": dict(finding.evidence),
        "fix": fix,
    }


def _jsonable(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _jsonable(item) for key, item in value.items()}
    return [_jsonable(item) for item in value] if isinstance(value, Sequence) and not isinstance(value, str) else value
