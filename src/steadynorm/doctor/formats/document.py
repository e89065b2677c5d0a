"""A diagnosis as a document, for the terminal, text files and notebooks."""

from typing import TYPE_CHECKING

from steadynorm import machine
from steadynorm.doctor.finding import Finding
from steadynorm.doctor.formats import layers
from steadynorm.doctor.pages import advice_for
from steadynorm.doctor.source import line_of
from steadynorm.report import Block, Card, Cell, Document, Paragraph, Status, Table

if TYPE_CHECKING:
    from steadynorm.doctor.diagnosis import Diagnosis

WHOLE = "the whole model"


def document(diagnosis: "Diagnosis") -> Document:
    """What was found, then what was looked at, then what was not."""
    blocks: list[Block] = [Paragraph(remark) for remark in diagnosis.remarks]
    blocks += [card(finding) for finding in diagnosis.findings]
    blocks += layers.blocks(diagnosis.facts)
    return Document(
        diagnosis.title, diagnosis.summary, status(diagnosis), (*blocks, *ending(diagnosis)), facts(diagnosis)
    )


def status(diagnosis: "Diagnosis") -> Status:
    """The verdict in a word."""
    return diagnosis.findings[0].severity if diagnosis.findings else "ok"


def facts(diagnosis: "Diagnosis") -> dict[str, str]:
    """What was used, and on which machine."""
    used = diagnosis.facts.batches.used
    return {**({"samples": str(used)} if used else {}), **machine.describe()}


def ending(diagnosis: "Diagnosis") -> list[Block]:
    """What was suppressed, and what was not checked: a report must not look fuller than it is."""
    found: list[Block] = []
    if diagnosis.suppressed:
        kept = [(s.finding, s.reason) for s in diagnosis.suppressed]
        listed = [(f.code, f.where or WHOLE, f.severity, reason) for f, reason in kept]
        found.append(Table("Suppressed", ("rule", "where", "severity", "reason"), listed))
    found += [Paragraph(sentence) for sentence in diagnosis.unused]
    if diagnosis.unchecked:
        rows = [(code, advice_for(code).rstrip("."), reason) for code, reason in diagnosis.unchecked.items()]
        found.append(Table("Not checked", ("rule", "what it says", "why not"), rows))
    if diagnosis.off:
        found.append(Paragraph(f"Not asked for: {', '.join(diagnosis.off)}. --select takes them."))
    return found


def card(finding: Finding) -> Card:
    """One finding: what it says, where, what was measured, where it comes from, what to do."""
    details: list[tuple[str, Cell]] = [*finding.evidence.items(), ("confidence", finding.confidence)]
    return Card(
        status=finding.severity,
        code=finding.code,
        title=advice_for(finding.code).rstrip("."),
        where=finding.where or WHOLE,
        text=finding.message,
        details=details,
        cause=finding.cause,
        source=line_of(finding.source) if finding.source else "",
        fix=finding.fix.text if finding.fix else "",
    )
