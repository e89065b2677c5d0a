"""A diagnosis as workflow commands of GitHub Actions, which become annotations on the lines of a change.

Source: GitHub, Workflow commands for GitHub Actions. GitHub shows ten errors and ten warnings of a step.
"""

from typing import TYPE_CHECKING

from steadynorm.doctor.finding import Finding, Severity
from steadynorm.doctor.pages import advice_for
from steadynorm.doctor.source import shown_file

if TYPE_CHECKING:
    from steadynorm.doctor.diagnosis import Diagnosis

COMMANDS: dict[Severity, str] = {"error": "error", "warning": "warning", "note": "notice"}


def github(diagnosis: "Diagnosis") -> str:
    """A line for each finding, and one for what was suppressed or not checked."""
    lines = [_line(finding) for finding in diagnosis.findings]
    rest = list(diagnosis.unused)
    if diagnosis.suppressed:
        rest.append("suppressed: " + ", ".join(f"{s.finding.code} {s.finding.where}" for s in diagnosis.suppressed))
    if diagnosis.unchecked:
        rest.append("not checked: " + "; ".join(f"{code}, {why}" for code, why in diagnosis.unchecked.items()))
    if rest:
        lines.append(f"::notice title={_property(diagnosis.title)}::{_data(chr(10).join([diagnosis.summary, *rest]))}")
    return "".join(f"{line}\n" for line in lines)


def _line(finding: Finding) -> str:
    properties = {}
    if finding.source is not None:
        properties = {"file": shown_file(finding.source), "line": str(finding.source.line)}
    where = finding.where or "the model"
    properties["title"] = f"{finding.code} {where}: {advice_for(finding.code).rstrip('.')}"
    fix = f"\nFix: {finding.fix.text}" if finding.fix else ""
    named = ",".join(f"{key}={_property(value)}" for key, value in properties.items())
    return f"::{COMMANDS[finding.severity]} {named}::{_data(f'{where}: {finding.message}{fix}')}"


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
