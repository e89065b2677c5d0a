"""A diagnosis as a page: the network's layers down the side, what was seen of each beside its findings."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from steadynorm.doctor.finding import SEVERITIES, Finding
from steadynorm.doctor.formats import layers
from steadynorm.doctor.formats.document import card, ending, facts, status
from steadynorm.probe import Facts
from steadynorm.probe.facts import Drift
from steadynorm.report import (
    Block,
    Cell,
    Chart,
    Document,
    Entry,
    Heading,
    Paragraph,
    Parts,
    Series,
    Status,
    Table,
)

if TYPE_CHECKING:
    from steadynorm.doctor.diagnosis import Diagnosis

# More points than this hide one another, and a page of all channels of a large network would be tens of megabytes.
MOST_POINTS = 256
DIGITS = 5


def page(diagnosis: "Diagnosis", after: "Diagnosis | None" = None, repairs: Sequence[str] = ()) -> Document:
    """What concerns the whole model, then the network layer by layer, then what was not checked.

    Args:
        after: the diagnosis after a repair; its statistics are drawn beside those of before.
        repairs: what was done, in sentences.
    """
    blocks: list[Block] = [Paragraph(remark) for remark in diagnosis.remarks]
    if after is not None:
        blocks.append(Heading("Repairs"))
        blocks += [Paragraph(text) for text in repairs or ("Nothing: no finding has a repair that may be done.",)]
        blocks.append(Paragraph(f"Examined again: {after.summary}"))
    blocks += [card(finding) for finding in diagnosis.findings if not finding.where]
    if len(diagnosis.facts.drift) > 1:
        blocks.append(layers.drift_chart(diagnosis.facts, after.facts if after else None))
    if chart := layers.values_chart(diagnosis.facts):
        blocks.append(chart)
    if entries := _entries(diagnosis, after):
        note = "In the order in which they run. ✓ nothing found, · not looked at by itself."
        blocks.append(Parts("The network", entries, note))
    blocks += ending(diagnosis)
    return Document(diagnosis.title, diagnosis.summary, status(diagnosis), blocks, facts(diagnosis))


def _entries(diagnosis: "Diagnosis", after: "Diagnosis | None") -> list[Entry]:
    seen, by_path = diagnosis.facts, dict[str, list[Finding]]()
    for finding in diagnosis.findings:
        if finding.where:
            by_path.setdefault(finding.where, []).append(finding)
    found = []
    for path, note in _modules(seen, by_path).items():
        blocks: list[Block] = []
        for finding in by_path.get(path, ()):
            blocks += [card(finding), *_outcome(finding, after)]
        blocks += _pictures(path, seen, after.facts if after else None)
        worst = min((f.severity for f in by_path.get(path, ())), key=SEVERITIES.index, default=None)
        state: Status | None = worst or ("ok" if path in seen.norms else None)
        found.append(Entry(path or layers.WHOLE, note, state, blocks))  # type: ignore[arg-type]
    return found


def _modules(seen: Facts, by_path: dict[str, list[Finding]]) -> dict[str, str]:
    """The layers of the network with a few words on each, in the order in which they run, and all that has a finding.

    A module stands after what it contains, as its forward ends after theirs.
    """
    called = {call.path: call for call in reversed(seen.calls)}
    order = list(dict.fromkeys(call.path for call in seen.calls))
    parents = {path[:at] for path in order for at in range(len(path)) if path[at] == "."}
    inner = [path for path in order if path in seen.norms or path in by_path or (path and path not in parents)]
    paths = dict.fromkeys([*inner, *seen.norms, *by_path])
    notes = {}
    for path in paths:
        call, norm = called.get(path), seen.norms.get(path)
        name = norm.class_name if norm else call.class_name if call else ""
        shape = "×".join(map(str, call.output_shape[1:])) if call else "" if not seen.calls else "not called"
        notes[path] = f"{name} {shape}".strip()
    return notes


def _outcome(finding: Finding, after: "Diagnosis | None") -> list[Block]:
    """What became of a finding in the repair."""
    if after is None:
        return []
    left = next((f for f in after.findings if (f.code, f.where) == (finding.code, finding.where)), None)
    if left is None:
        return [Paragraph(f"After the repair {finding.code} is gone.")]
    return [Paragraph(f"After the repair {finding.code} is still there: {left.message}")]


def _pictures(path: str, seen: Facts, after: Facts | None) -> list[Block]:
    norm = seen.norms.get(path)
    if norm is None:
        return []
    drift, later = seen.drift.get(path), after.drift.get(path) if after else None
    rows: list[tuple[Cell, ...]] = [("kind", norm.kind, None), ("channels", norm.channels, None)]
    row = dict(zip(layers.COLUMNS, next(r for r in layers.rows(seen) if r[0] == (path or layers.WHOLE)), strict=True))
    rows += [("values behind a statistic", row["values"], None), ("independent ones", row["independent"], None)]
    if norm.momentum is not None:
        rows.append(("momentum", norm.momentum, None))
    if drift is not None:
        rows.append(("divergence from the data", drift.divergence, later.divergence if later else None))
        rows.append(("what matters from", layers.threshold(drift), None))
        rows.append(("largest shift of a mean, deviations", drift.mean_shift, later.mean_shift if later else None))
        rows.append(("variance, stored over measured", drift.variance_ratio, later.variance_ratio if later else None))
    rows = [each for each in rows if each[1] is not None]
    table = Table("", ("", "before", "after"), rows) if later else Table("", ("", "measured"), [r[:2] for r in rows])
    charts: list[Block] = []
    if drift is not None and _spread(drift):
        charts = [_scatter("Means", 0, drift, later), _scatter("Deviations", 1, drift, later)]
    return [*charts, table]


def _scatter(what: str, index: int, drift: Drift, later: Drift | None) -> Chart:
    """Stored against recalibrated statistics of each channel; on the line they are the same."""
    kept = _spread(drift)
    series = [_points("before" if later else "channels", index, drift, kept)]
    if later is not None and len(later.measured) == len(drift.measured):
        series.append(_points("after", index, later, kept))
    count = len(drift.measured)
    note = (
        ""
        if len(kept) == count
        else f"{len(kept)} of {count} channels: the farthest, and others evenly among the rest."
    )
    return Chart(what, "of the data", "stored", series, kind="scatter", note=note)


def _points(name: str, index: int, drift: Drift, kept: Sequence[int]) -> Series:
    def value(pair: tuple[float, float]) -> float:
        drawn = pair[0] if index == 0 else max(pair[1], 0.0) ** 0.5
        return float(f"{drawn:.{DIGITS}g}")

    return Series(name, [value(drift.measured[i]) for i in kept], [value(drift.stored[i]) for i in kept])


def _spread(drift: Drift) -> list[int]:
    """Indices of at most MOST_POINTS channels: the farthest, and others evenly over the order of their distance."""

    def distance(i: int) -> float:
        (mean, var), (mean_data, var_data) = drift.stored[i], drift.measured[i]
        away = abs(mean - mean_data) + abs(max(var, 0.0) ** 0.5 - max(var_data, 0.0) ** 0.5)
        return away if math.isfinite(away) else math.inf

    readable = [i for i, pair in enumerate(drift.measured) if all(map(math.isfinite, pair))]
    order = sorted(readable, key=distance, reverse=True)
    farthest, rest = order[: MOST_POINTS // 2], order[MOST_POINTS // 2 :]
    step = max(1, -(-len(rest) // (MOST_POINTS - MOST_POINTS // 2)))
    return sorted([*farthest, *rest[::step]])
