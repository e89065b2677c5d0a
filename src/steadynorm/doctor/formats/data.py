"""A diagnosis as JSON: docs/findings.md says what each key means, docs/findings.schema.json what it may hold.

A key that is added leaves `VERSION` as it is; one that goes, or that means something else, counts it up.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from steadynorm import machine
from steadynorm.doctor.finding import Finding
from steadynorm.doctor.formats import layers
from steadynorm.doctor.pages import advice_for
from steadynorm.doctor.source import shown_file

if TYPE_CHECKING:
    from steadynorm.doctor.diagnosis import Diagnosis

VERSION = 2
FINGERPRINT_DIGITS = 32


def data(diagnosis: "Diagnosis") -> dict[str, Any]:
    """The diagnosis as plain data; numbers that JSON lacks are the strings "nan", "inf" and "-inf"."""
    described: dict[str, Any] = {
        "schema_version": VERSION,
        "title": diagnosis.title,
        "summary": diagnosis.summary,
        "is_clean": diagnosis.is_clean,
        "findings": [finding_data(finding) for finding in diagnosis.findings],
        "suppressed": [{**finding_data(s.finding), "reason": s.reason} for s in diagnosis.suppressed],
        "unused_suppressions": list(diagnosis.unused),
        "checked": list(diagnosis.checked),
        "unchecked": dict(diagnosis.unchecked),
        "off": list(diagnosis.off),
        "remarks": list(diagnosis.remarks),
        "layers": [dict(zip(layers.COLUMNS, row, strict=True)) for row in layers.rows(diagnosis.facts)],
        "machine": machine.describe(),
    }
    return {key: jsonable(value) for key, value in described.items()}


def finding_data(finding: Finding) -> dict[str, Any]:
    """One finding as plain data."""
    fix, source = finding.fix, finding.source
    return {
        "code": finding.code,
        "rule": advice_for(finding.code).rstrip("."),
        "severity": finding.severity,
        "confidence": finding.confidence,
        "where": finding.where,
        "source": source and {"file": shown_file(source), "line": source.line},
        "message": finding.message,
        "consequence": finding.consequence,
        "cause": finding.cause,
        "evidence": dict(finding.evidence),
        "fix": fix and {"text": fix.text, "is_safe": fix.is_safe, "is_automatic": fix.apply is not None},
        "fingerprint": fingerprint(finding),
    }


def fingerprint(finding: Finding) -> str:
    """What a finding is known again by in the next run: its code and its module, not its numbers."""
    return hashlib.sha256(f"{finding.code}\0{finding.where}".encode()).hexdigest()[:FINGERPRINT_DIGITS]


def jsonable(value: Any) -> Any:
    """The same value with what JSON lacks in words."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: jsonable(item) for key, item in value.items()}
    return [jsonable(item) for item in value] if isinstance(value, Sequence) and not isinstance(value, str) else value
