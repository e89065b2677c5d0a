"""The rows of a finished grid, what they say, and the document that shows it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Any

from steadynorm.lab.store import SCHEMA_VERSION, Row
from steadynorm.lab.trials import MIN_STEPS, REFERENCE_BATCH_SIZE, Budget
from steadynorm.lab.verdict import HOW, NAMES, Curve, Verdict, curves_of, judge, metric_of
from steadynorm.report import Block, Cell, Chart, Document, Paragraph, Series, Table

SCALING_TEXTS = {
    "linear": "in proportion to the batch size",
    "sqrt": "with the square root of the batch size",
    "none": "the same for all",
}


@dataclass(frozen=True)
class Study:
    """The rows of one recipe under one budget."""

    recipe: str
    budget: Budget
    rows: tuple[Row, ...]

    @cached_property
    def verdict(self) -> Verdict:
        """What the rows say."""
        return judge(self.rows)

    def to_dict(self) -> dict[str, Any]:
        """As plain data that can be written as JSON."""
        return {
            "schema_version": SCHEMA_VERSION,
            "recipe": self.recipe,
            "budget": self.budget.to_dict(),
            "verdict": self.verdict.to_dict(),
            "rows": list(self.rows),
        }

    def document(self) -> Document:
        """The verdict, the chart, the table behind it, what every cell could spend, and the cells that failed."""
        curves = curves_of(self.rows)
        blocks: list[Block] = []
        if curves:
            blocks += [self._chart(curves), self._table(curves), Paragraph(HOW)]
        blocks.append(Paragraph(self._budget_text()))
        failures = [row for row in self.rows if row["error"]]
        if failures:
            blocks.append(_failures(failures))
        return Document(
            title=f"Batch size and norm: {self.recipe}",
            summary=self.verdict.sentence,
            status=self.verdict.status,
            blocks=tuple(blocks),
            facts=self._facts(),
        )

    def _sign(self) -> float:
        return -1.0 if metric_of(self.rows) == "loss" else 1.0

    def _chart(self, curves: Sequence[Curve]) -> Chart:
        metric, sign = metric_of(self.rows), self._sign()
        series = []
        for curve in curves:
            values = [sorted(sign * value for value in point.values) for point in curve.points.values()]
            series.append(
                Series(
                    NAMES[curve.norm],
                    list(curve.points),
                    [fmean(each) for each in values],
                    [each[0] for each in values],
                    [each[-1] for each in values],
                )
            )
        seeds = self.verdict.seeds
        note, spread = "One seed.", ""
        if seeds > 1:
            note, spread = (
                f"Mean over {seeds} seeds.",
                "The bars at the points reach from the lowest seed to the highest.",
            )
        return Chart(f"Test {metric} by batch size", "batch size", metric, series, log_x=True, note=note, spread=spread)

    def _table(self, curves: Sequence[Curve]) -> Table:
        metric, sign = metric_of(self.rows), self._sign()
        rows: list[list[Cell]] = []
        for curve in curves:
            for size, point in curve.points.items():
                values = [sign * value for value in point.values]
                same = [row for row in self.rows if row["parameters"] == {"norm": curve.norm, "batch_size": size}]
                rows.append(
                    [
                        curve.norm,
                        size,
                        fmean(values),
                        point.deviation,
                        min(values),
                        max(values),
                        self._standing(curve, size),
                        self.budget.steps_at(size),
                        f"{self.budget.lr_at(size):.4g}",
                        fmean(row["seconds"] for row in same),
                    ]
                )
        columns = [
            "norm",
            "batch size",
            metric,
            "±",
            "lowest seed",
            "highest seed",
            "standing",
            "steps",
            "lr",
            "seconds",
        ]
        return Table(f"Test {metric} of every cell", columns, rows, "Standing: among the batch sizes of the same norm.")

    def _standing(self, curve: Curve, size: int) -> str:
        if self.verdict.smallest is None:
            return "unknown"
        if size == curve.best:
            return "best"
        return "within noise" if size in curve.good else "worse"

    def _budget_text(self) -> str:
        sizes = sorted({row["parameters"]["batch_size"] for row in self.rows})
        floored = [size for size in sizes if self.budget.steps_at(size) * size > self.budget.samples + size]
        exception = f" (batch size {', '.join(map(str, floored))}: more, for {MIN_STEPS} steps)" if floored else ""
        return (
            f"Every cell saw {self.budget.samples:,} training samples{exception}, so that a small batch took more "
            f"steps than a large one: {self.budget.steps} at batch size {REFERENCE_BATCH_SIZE}. The learning rate was "
            f"{self.budget.lr:g} at batch size {REFERENCE_BATCH_SIZE}, {SCALING_TEXTS[self.budget.lr_scaling]}, and "
            "fell to 0 over the run. "
            "These are short trainings with one learning rate for all norms: they rank, they do not replace a long one."
        )

    def _facts(self) -> dict[str, str]:
        machines = {tuple(row["machine"].items()): row["machine"] for row in self.rows}
        facts = dict(next(iter(machines.values()), {}))
        if len(machines) > 1:
            facts["machines"] = f"{len(machines)} different ones or versions, see the stored rows"
        return {"recipe": self.recipe, "cells": str(len(self.rows)), **facts}


def _failures(rows: Sequence[Row]) -> Table:
    cells: list[list[Cell]] = [
        [NAMES[row["parameters"]["norm"]], row["parameters"]["batch_size"], row["seed"], row["error"]] for row in rows
    ]
    return Table("Cells that failed", ["norm", "batch size", "seed", "error"], cells, "They are tried again next time.")
