"""What a rule says: a finding, how sure and how bad it is, and what repairs it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

Severity = Literal["error", "warning", "note"]
Confidence = Literal["proved", "measured", "heuristic"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
"""From the worst. An error makes results wrong, a warning makes them worse, a note is worth knowing."""

Apply = Callable[[nn.Module, Sequence[tuple[str, ...]], Iterable[Any]], None]
"""Repairs the targets of several findings at once, in place, with batches to measure on."""


@dataclass(frozen=True)
class Location:
    """A line of the user's code; `file` is absolute."""

    file: str
    line: int


@dataclass(frozen=True)
class Fix:
    """What to do about a finding.

    Args:
        text: what to do, or what `apply` does.
        is_safe: whether `apply` leaves what the model computes alone, or only brings its statistics up to date.
        apply: does it; None is advice only.
        target: the module paths that `apply` is about.
    """

    text: str
    is_safe: bool = False
    apply: Apply | None = None
    target: tuple[str, ...] = ()


@dataclass(frozen=True)
class Finding:
    """One fault.

    Args:
        code: of the rule.
        severity: from the measured effect where there is one.
        confidence: apart from severity: shown to be so, measured against a threshold, or likely.
        where: dotted path of the module; empty is the whole model or its data.
        message: one sentence, in the terms of the model's user.
        evidence: what was measured, by name.
        consequence: what it does to the results, in a sentence, where that was measured; `examine` reads it off the
            evidence where a rule leaves it out.
        cause: where it comes from; `examine` takes it from the page of the rule where a rule leaves it out.
        source: the line that makes the module, where it is known.
    """

    code: str
    severity: Severity
    confidence: Confidence
    where: str
    message: str
    evidence: Mapping[str, float | int | str] = field(default_factory=dict)
    fix: Fix | None = None
    consequence: str = ""
    cause: str = ""
    source: Location | None = None
