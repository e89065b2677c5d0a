"""Findings that somebody looked at and keeps: by pyproject.toml with a reason, or by a baseline of what was there.

[[tool.steadynorm.doctor.suppress]]
rule = "SN104"
module = "backbone.*"
reason = "the weights are somebody else's"
"""

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from steadynorm.doctor.diagnosis import Diagnosis, Suppressed
from steadynorm.doctor.finding import SEVERITIES, Finding, Severity
from steadynorm.doctor.rules import RULES, code_of
from steadynorm.errors import InputError
from steadynorm.report import write_text

BASELINE_VERSION = 1
KEYS = ("rule", "module", "reason")
EXAMPLE = 'rule = "SN104", module = "backbone.*", reason = "the weights are somebody else\'s"'


@dataclass(frozen=True)
class Suppression:
    """Findings to be kept out of the verdict.

    Args:
        rule: a code, or how codes begin.
        module: a glob over module paths, `*` also over dots; "" is the whole model.
        reason: why, in words.
        origin: where it stands, for the sentence about one that is not used.
        worst: the severity up to which it holds; a finding that got worse than that is shown.
    """

    rule: str
    module: str
    reason: str
    origin: str = ""
    worst: Severity = "error"

    def fits(self, finding: Finding) -> bool:
        """Whether a finding is meant."""
        is_worse = SEVERITIES.index(finding.severity) < SEVERITIES.index(self.worst)
        return finding.code.startswith(self.rule) and fnmatchcase(finding.where, self.module) and not is_worse

    def could_fit(self, codes: Sequence[str]) -> bool:
        """Whether one of the rules with these codes is meant."""
        return any(code.startswith(self.rule) for code in codes)


@dataclass(frozen=True)
class Settings:
    """The table [tool.steadynorm.doctor] of a pyproject.toml."""

    select: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    baseline: Path | None = None
    suppressions: tuple[Suppression, ...] = ()


def suppress(diagnosis: Diagnosis, suppressions: Sequence[Suppression]) -> Diagnosis:
    """The diagnosis with the findings that are meant counted and listed apart.

    A suppression that fits nothing, though all rules that it names were checked, is named in a sentence.
    """
    used: set[Suppression] = set()
    kept, apart = [], list(diagnosis.suppressed)
    for finding in diagnosis.findings:
        fitting = [each for each in suppressions if each.fits(finding)]
        used.update(fitting)
        if fitting:
            apart.append(Suppressed(finding, fitting[0].reason))
        else:
            kept.append(finding)
    unused = []
    for each in suppressions:
        open_codes = each.could_fit(list(diagnosis.unchecked))
        if each not in used and each.could_fit(diagnosis.checked) and not open_codes:
            where = each.module or "the whole model"
            unused.append(f"{each.origin} suppresses {each.rule} at {where}, where there is nothing: take it out.")
    return replace(
        diagnosis, findings=tuple(kept), suppressed=tuple(apart), unused=(*diagnosis.unused, *dict.fromkeys(unused))
    )


def settings_near(folder: Path) -> Settings:
    """What the nearest pyproject.toml at or above `folder` says of the doctor.

    Raises:
        InputError: the file cannot be read, or says something that it cannot say.
    """
    for parent in (folder.resolve(), *folder.resolve().parents):
        file = parent / "pyproject.toml"
        if file.is_file():
            return settings_of(file)
    return Settings()


def settings_of(file: Path) -> Settings:
    """The settings in one pyproject.toml."""
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read: {error}.") from error
    for name in ("tool", "steadynorm", "doctor"):
        table = table.get(name, {})
        if not isinstance(table, dict):
            raise InputError(f"{name} in {file} is {type(table).__name__}: expected a table, [tool.steadynorm.doctor].")
    known = ("select", "ignore", "baseline", "suppress")
    if unknown := [key for key in table if key not in known]:
        raise InputError(f"[tool.steadynorm.doctor] of {file} has {unknown[0]!r}: expected {', '.join(known)}.")
    for key in ("select", "ignore"):
        if not _is_words(table.get(key, [])):
            raise InputError(f'{key} in {file} is {table[key]!r}: expected a list of codes, such as ["SN104", "SN2"].')
    baseline = table.get("baseline")
    if baseline is not None and not isinstance(baseline, str):
        raise InputError(f"baseline in {file} is {baseline!r}: expected a path in quotes.")
    entries = table.get("suppress", [])
    if not isinstance(entries, list):
        raise InputError(f"suppress in {file} is no list: write [[tool.steadynorm.doctor.suppress]].")
    return Settings(
        tuple(table.get("select", ())),
        tuple(table.get("ignore", ())),
        None if baseline is None else file.parent / baseline,
        tuple(_suppression(entry, file) for entry in entries),
    )


def _is_words(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(word, str) for word in value)


def _suppression(entry: Any, file: Path) -> Suppression:
    given = entry if isinstance(entry, Mapping) else {}
    wrong = [key for key in KEYS if not isinstance(given.get(key), str) or (key != "module" and not given[key].strip())]
    extra = [key for key in given if key not in KEYS]
    if wrong or extra:
        what = f"lacks {wrong[0]!r}" if wrong else f"has {extra[0]!r}"
        raise InputError(f"a suppression in {file} {what}: expected {EXAMPLE}.")
    rule = given["rule"].upper()
    codes = [code_of(each) for each in RULES]
    if not any(code.startswith(rule) for code in codes):
        raise InputError(f"a suppression in {file} names {given['rule']!r}: expected one of {', '.join(codes)}.")
    return Suppression(rule, given["module"], given["reason"].strip(), file.name)


def write_baseline(diagnosis: Diagnosis, file: Path) -> int:
    """Write what was found, so that from now on only what is new or worse is shown; the number of findings.

    Raises:
        OSError: the file cannot be written.
    """
    findings = [*diagnosis.findings, *(each.finding for each in diagnosis.suppressed)]
    entries = sorted({(f.code, f.where, f.severity) for f in findings})
    listed = [{"code": code, "where": where, "severity": severity} for code, where, severity in entries]
    write_text(file, json.dumps({"steadynorm_baseline": BASELINE_VERSION, "findings": listed}, indent=2) + "\n")
    return len(listed)


def read_baseline(file: Path) -> tuple[Suppression, ...]:
    """The findings of a baseline, as suppressions of exactly these modules, at most as bad as they were.

    Raises:
        InputError: the file is not there, or is no baseline.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"the baseline {file} cannot be read: {error.strerror}; --write-baseline makes one."
        ) from error
    except ValueError as error:
        raise InputError(f"the baseline {file} is no JSON: {error}; --write-baseline makes one.") from error
    if not isinstance(content, dict) or content.get("steadynorm_baseline") != BASELINE_VERSION:
        raise InputError(f"{file} is no baseline of version {BASELINE_VERSION}: --write-baseline makes one.")
    entries = content.get("findings")
    found = []
    for entry in entries if isinstance(entries, list) else [None]:
        given = entry if isinstance(entry, dict) else {}
        code, where, severity = (given.get(key) for key in ("code", "where", "severity"))
        if not isinstance(code, str) or not isinstance(where, str) or severity not in SEVERITIES:
            raise InputError(f"the baseline {file} is damaged at {entry!r}: --write-baseline makes a new one.")
        found.append(Suppression(code, _literal(where), "in the baseline", file.name, severity))
    return tuple(found)


def _literal(path: str) -> str:
    """A glob that fits this path alone."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in path)
