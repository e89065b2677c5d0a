"""What was changed in a model, as a value that shows itself."""

from dataclasses import dataclass
from itertools import groupby
from typing import Any

from torch import nn

LISTED = 6
"""Paths shown of each kind of conversion; the rest are counted."""


@dataclass(frozen=True)
class Converted:
    """One layer that is of another class now.

    Args:
        paths: where it is in the model; a shared layer has several.
        before, after: its class.
        note: what is to be known about it, or nothing.
        error: how far its own output is from what it was, in deviations, where weight and bias were made to fit.
    """

    paths: tuple[str, ...]
    before: str
    after: str
    note: str = ""
    error: float | None = None


@dataclass(frozen=True, repr=False)
class Change:
    """A changed model and the log of what was changed; printed, it is a short report.

    Args:
        model: the model.
        log: what was changed, layer by layer, in the order of definition.
        left: what was not, by path, and why: what one could have expected to change.
        done: what the report calls it.
        difference: how far the outputs are from what they were, where that was measured.
        apart: paths of modules whose own output is another by intent, though that of the model is not.
    """

    model: nn.Module
    log: tuple[Converted, ...]
    left: dict[str, str]
    done: str = "converted"
    difference: Any = None
    apart: tuple[str, ...] = ()

    def __repr__(self) -> str:
        lines = [f"{_counted(len(self.log))} {self.done}"]
        kinds = sorted(self.log, key=lambda one: (one.before, one.after, one.note))
        for (before, after, note), group in groupby(kinds, key=lambda one: (one.before, one.after, one.note)):
            alike = list(group)
            paths = [" = ".join(one.paths) or "the model" for one in alike]
            notes = ", ".join(filter(None, (note, _errors(alike))))
            lines.append(f"  {len(paths)} {before} -> {after}: {_listed(paths)}" + (f" ({notes})" if notes else ""))
        lines += [f"  left {path}: {reason}" for path, reason in self.left.items()]
        if self.difference is not None:
            lines += [f"  {line}" for line in repr(self.difference).splitlines()]
        return "\n".join(lines)


def _counted(number: int) -> str:
    return "1 layer" if number == 1 else f"{number or 'no'} layers"


def _listed(paths: list[str]) -> str:
    more = f" and {len(paths) - LISTED} more" if len(paths) > LISTED else ""
    return ", ".join(paths[:LISTED]) + more


def _errors(alike: list[Converted]) -> str:
    errors = sorted(one.error for one in alike if one.error is not None)
    if not errors:
        return ""
    least, most = f"{errors[0]:.2g}", f"{errors[-1]:.2g}"
    return f"error {least}" if least == most else f"error {least} to {most}"
