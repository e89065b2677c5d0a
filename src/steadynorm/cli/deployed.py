"""What the deployment commands show: changes, exports, comparisons and moved statistics as documents and as data."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from steadynorm import machine
from steadynorm.convert.change import Change
from steadynorm.deploy import Comparison, Difference, Exported, OutputDifference, default_tolerance
from steadynorm.deploy.exported import output_to_dict
from steadynorm.report import Block, Cell, Document, Paragraph, Status, Table
from steadynorm.training.statistics import StatisticsReport

LONGEST_TABLE = 40
"""Layers that a table lists; the rest are counted, and all are in the JSON."""


def difference_table(
    title: str,
    measured: Sequence[tuple[str, OutputDifference]],
    tolerance: float | None,
    batches: Sequence[str] = (),
) -> Table:
    """Outputs with how far they are apart, and what that was held to.

    Args:
        measured: what was compared, and the difference of one output.
        batches: what to call them; else they are counted.
    """
    rows: list[tuple[Cell, ...]] = []
    for what, output in measured:
        bar = default_tolerance(output.dtype) if tolerance is None else tolerance
        batch = batches[output.batch] if batches else str(output.batch)
        place = (output.sample, batch) if output.absolute else (None, None)
        name = output.name or "output"
        rows.append((what, name, f"{output.absolute:.1e}", f"{output.relative:.1e}", f"{bar:.1e}", *place))
    columns = ("compared", "output", "absolute", "relative", "allowed", "worst in sample", "of batch")
    return Table(title, columns, rows)


def of_change(title: str, change: Change, remarks: Sequence[str]) -> Document:
    """What was changed layer by layer, what was left and why, and how far the outputs moved."""
    log, left = change.log, change.left
    done = "1 layer" if len(log) == 1 else f"{len(log) or 'no'} layers"
    summary = f"{done} {change.done}" + (
        f", {len(left)} left as {'it is' if len(left) == 1 else 'they are'}." if left else "."
    )
    blocks: list[Block] = [Paragraph(remark) for remark in remarks]
    noted = any(one.note for one in log)
    rows = [(" = ".join(one.paths) or "(model)", one.before, one.after, *([one.note] if noted else [])) for one in log]
    if rows:
        blocks.append(_shortened("Changed", ("layer", "was", "became", *(["note"] if noted else [])), rows))
    if left:
        blocks.append(
            _shortened("Left as they are", ("layer", "why"), [(path or "(model)", why) for path, why in left.items()])
        )
    if isinstance(change.difference, Difference):
        blocks += _difference_blocks(change.difference)
    elif change.difference is not None:
        blocks += [Paragraph(line[:1].upper() + line[1:] + ".") for line in repr(change.difference).splitlines()]
    return Document(title, summary, "ok", blocks, machine.describe())


def _difference_blocks(difference: Difference) -> list[Block]:
    measured = [("folded", output) for output in difference.outputs]
    measured += [("folded, in float64", output) for output in difference.float64]
    blocks: list[Block] = [difference_table("Difference from the model", measured, None)]
    if difference.not_in_float64:
        blocks.append(Paragraph(f"Not compared in float64: {difference.not_in_float64}."))
    return blocks


def of_exported(title: str, exported: Exported, remarks: Sequence[str]) -> Document:
    """What an artefact is, how far it is from the model, and whether a sample depends on its batch."""
    kind = f"ONNX, opset {exported.opset}" if exported.opset is not None else "torch.export"
    count = sum(exported.operators.values())
    agrees = f"{exported.engine} ran it and gave what the model gives"
    summary = f"{exported.path} ({kind}, {exported.size / 1e6:.2f} MB, {count} operators): {agrees}."
    status: Status = "ok"
    blocks: list[Block] = [Paragraph(remark) for remark in remarks]
    measured = [(exported.engine, output) for output in exported.outputs]
    named = [str(number) for number in range(exported.batches)] + [f"of {size}" for size in exported.batch_sizes]
    table = difference_table("Difference from the model", measured, exported.tolerance, named)
    ran = f"Run on {_counted(exported.batches, 'example batch', 'example batches')}"
    if exported.batch_sizes:
        ran += f" and on batches of {', '.join(map(str, exported.batch_sizes))}"
    blocks.append(dataclasses.replace(table, note=f"{ran}."))
    if exported.invariance is None:
        blocks.append(Paragraph("Whether a sample depends on its batch was not seen: the batch size is fixed."))
    else:
        text = str(exported.invariance)
        blocks.append(Paragraph(text[:1].upper() + text[1:] + "."))
        status = "ok" if exported.invariance.holds else "warning"
    return Document(title, summary, status, blocks, exported.machine)


def of_comparison(title: str, comparison: Comparison, names: tuple[str, str], batches: int) -> Document:
    """Whether two models agree, and where they part."""
    ran = _counted(batches, "batch", "batches")
    measured = [(f"{names[0]} – {names[1]}", output) for output in comparison.outputs]
    blocks: list[Block] = [difference_table("Differences", measured, comparison.tolerance)]
    if comparison.agrees:
        return Document(title, f"They agree on {ran}.", "ok", blocks, machine.describe())
    worst = comparison.worst
    summary = f"They differ: most in sample {worst.sample} of batch {worst.batch}, of {ran}."
    if comparison.first is not None:
        summary += f" They part at {comparison.first or 'the model itself'}."
    return Document(title, summary, "error", blocks, machine.describe())


def of_statistics(
    title: str, report: StatisticsReport, scores: Sequence[tuple[str, float, float]], remarks: Sequence[str]
) -> Document:
    """How far running statistics moved, and what that did to loss and metrics."""
    summary = f"{repr(report).splitlines()[0]}."
    blocks: list[Block] = [Paragraph(remark) for remark in remarks]
    if scores:
        blocks.append(Table("On the test data", ("", "before", "after"), [tuple(score) for score in scores]))
    rows = [
        (path or "(model)", moved.mean_shift, moved.deviation_ratio, moved.standard_error)
        for path, moved in report.layers.items()
    ]
    columns = ("layer", "mean moved, deviations", "deviation, times", "standard error")
    blocks.append(_shortened("Statistics", columns, rows))
    if report.left_out:
        left = [(path or "(model)", reason) for path, reason in report.left_out.items()]
        blocks.append(_shortened("Left as they are", ("layer", "why"), left))
    return Document(title, summary, "ok", blocks, machine.describe())


def change_to_dict(change: Change) -> dict[str, Any]:
    """A change as plain data."""
    difference = change.difference
    measured: Mapping[str, Any] | None = None
    if isinstance(difference, Difference):
        measured = {
            "outputs": [output_to_dict(output, None) for output in difference.outputs],
            "float64": [output_to_dict(output, None) for output in difference.float64],
            "not_in_float64": difference.not_in_float64,
        }
    elif dataclasses.is_dataclass(difference) and not isinstance(difference, type):
        measured = dataclasses.asdict(difference)
    log = [dataclasses.asdict(one) for one in change.log]
    return {"done": change.done, "log": log, "left": dict(change.left), "difference": measured}


def comparison_to_dict(comparison: Comparison) -> dict[str, Any]:
    """A comparison as plain data."""
    outputs = [output_to_dict(output, comparison.tolerance) for output in comparison.outputs]
    return {"agrees": comparison.agrees, "first": comparison.first, "outputs": outputs}


def statistics_to_dict(
    report: StatisticsReport, scores: Sequence[tuple[str, float, float]], out: Path
) -> dict[str, Any]:
    """A report on moved statistics as plain data."""
    return {
        "out": str(out),
        "action": report.action,
        "layers": [dataclasses.asdict(moved) for moved in report.layers.values()],
        "left_out": report.left_out,
        "samples": report.samples,
        "batches": report.batches,
        "passes": report.passes,
        "stopped": report.stopped,
        "scores": {name: {"before": before, "after": after} for name, before, after in scores},
    }


def _shortened(title: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> Table:
    more = len(rows) - LONGEST_TABLE
    return Table(title, columns, rows[:LONGEST_TABLE], f"and {more} more" if more > 0 else "")


def _counted(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"
