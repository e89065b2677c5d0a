"""A diagnosis as SARIF 2.1.0, which code hosts and editors read.

Source: OASIS, Static Analysis Results Interchange Format (SARIF) Version 2.1.0 Plus Errata 01, sections 3.13 to 3.58.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steadynorm import machine
from steadynorm.doctor.finding import Finding
from steadynorm.doctor.formats.data import fingerprint, jsonable
from steadynorm.doctor.pages import advice_for, markdown, page_of
from steadynorm.doctor.rules import RULES, Rule, code_of, explain, slug_of
from steadynorm.doctor.source import shown_file

if TYPE_CHECKING:
    from steadynorm.doctor.diagnosis import Diagnosis

VERSION = "2.1.0"
SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"


def sarif(diagnosis: "Diagnosis") -> dict[str, Any]:
    """One run: every rule that was asked for, every finding, suppressed ones too, and what was not checked."""
    codes = [*diagnosis.checked, *diagnosis.unchecked]
    rules = [rule for rule in RULES if code_of(rule) in codes]
    index = {code_of(rule): number for number, rule in enumerate(rules)}
    results = [_result(finding, index) for finding in diagnosis.findings]
    for each in diagnosis.suppressed:
        why = [{"kind": "external", "justification": each.reason}]
        results.append({**_result(each.finding, index), "suppressions": why})
    notes = [
        _notification(f"{code} was not checked: {reason}.", code, index) for code, reason in diagnosis.unchecked.items()
    ]
    if diagnosis.off:
        notes.append(_notification(f"Not asked for: {', '.join(diagnosis.off)}."))
    notes += [_notification(text) for text in (*diagnosis.remarks, *diagnosis.unused)]
    run: dict[str, Any] = {
        "tool": {
            "driver": {
                "name": "steadynorm",
                "version": machine.describe()["steadynorm"],
                "rules": list(map(_rule, rules)),
            }
        },
        "invocations": [{"executionSuccessful": True, "toolExecutionNotifications": notes}],
        "results": results,
        "properties": {"title": diagnosis.title, "summary": diagnosis.summary},
    }
    return {"$schema": SCHEMA, "version": VERSION, "runs": [run]}


def _rule(rule: Rule) -> dict[str, Any]:
    page = page_of(rule)
    return {
        "id": page.code,
        "name": "".join(word.capitalize() for word in slug_of(rule).split("-")),
        "shortDescription": {"text": page.advice},
        "fullDescription": {"text": page.why},
        "help": {"text": explain(page.code), "markdown": markdown(rule)},
    }


def _result(finding: Finding, index: dict[str, int]) -> dict[str, Any]:
    rest = {"rule": {"ruleIndex": index[finding.code]}} if finding.code in index else {}
    fix = finding.fix
    return {
        "ruleId": finding.code,
        **rest.get("rule", {}),
        "level": finding.severity,
        "message": {"text": _message(finding)},
        "locations": [_location(finding)],
        "partialFingerprints": {"codeAndModule/v1": fingerprint(finding)},
        "properties": {
            "confidence": finding.confidence,
            "evidence": jsonable(dict(finding.evidence)),
            "consequence": finding.consequence,
            "cause": finding.cause,
            **({"fix": fix.text, "fixIsSafe": fix.is_safe} if fix else {}),
        },
    }


def _message(finding: Finding) -> str:
    fix = f" Fix: {finding.fix.text}" if finding.fix else ""
    return f"{finding.message or advice_for(finding.code)}{fix}"


def _location(finding: Finding) -> dict[str, Any]:
    name = finding.where.rpartition(".")[2] or "model"
    logical = {"name": name, "fullyQualifiedName": finding.where or "model", "kind": "module"}
    found: dict[str, Any] = {"logicalLocations": [logical]}
    if finding.source is not None:
        file = shown_file(finding.source)
        uri = Path(file).as_uri() if os.path.isabs(file) else file.replace("%", "%25").replace(" ", "%20")
        place = {"artifactLocation": {"uri": uri}, "region": {"startLine": finding.source.line}}
        found["physicalLocation"] = place
    return found


def _notification(text: str, code: str = "", index: dict[str, int] | None = None) -> dict[str, Any]:
    found: dict[str, Any] = {"level": "note", "message": {"text": text}}
    if index and code in index:
        found["associatedRule"] = {"id": code, "index": index[code]}
    return found
