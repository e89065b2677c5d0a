"""`python -m tests.doctor.corpus`: how well the doctor does on its corpus, for the tables of docs/doctor_corpus.md."""

import sys
import time
import warnings
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch import nn

from steadynorm import doctor, recipe
from steadynorm.recipes import digits
from tests.doctor.cases import FAULTS, HEALTHY, Case, trained
from tests.doctor.controls import CONTROLS
from tests.doctor.networks import Residual
from tests.doctor.planted import PLANTED
from tests.doctor.twins import TWINS

PAGE = Path(__file__).parents[2] / "docs" / "doctor_corpus.md"
MARK = "<!-- tables: python -m tests.doctor.corpus -->"
# What a repair has to come within of the healthy twin.
ONE_POINT = 0.01


class Row(NamedTuple):
    """One case: what was planted, what was found, the accuracy before and after the safe repairs, and the time."""

    name: str
    expected: frozenset[tuple[str, str]]
    found: set[tuple[str, str]]
    seconds: float
    before: float | None = None
    after: float | None = None
    twin: float | None = None


def accuracy(model: nn.Module, case: Case) -> float:
    """Share of the evaluation samples that are told right."""
    right = total = 0
    with torch.no_grad():
        for batch in case.batches():
            right += int((recipe.call(model.eval(), batch).argmax(1) == batch[1]).sum())
            total += len(batch[1])
    return right / total


def row(case: Case) -> Row:
    """Examine a case, and repair it where that is safe."""
    start = time.perf_counter()
    with recipe.seeded(0):
        model = case.make()
    judged = {"loss": case.loss, "metrics": digits.metrics if case.loss is digits.loss else None}
    given = {"train_batches": case.train_batches, "optimizer": case.optimizer(model), "step": case.step, **judged}
    given["checkpoint"] = case.checkpoint(model)
    diagnosis = doctor.examine(model, case.batches, **given)
    found = {(f.code, f.where) for f in diagnosis.findings if case.notes or f.severity != "note"}
    seconds = time.perf_counter() - start
    safe = [f for f in diagnosis.findings if f.fix and f.fix.is_safe and f.fix.apply and f.severity != "note"]
    if case.loss is not digits.loss or not safe:
        return Row(case.name, case.expected, found, seconds)
    before = accuracy(model, case)
    doctor.repair(model, diagnosis, case.batches)
    # On other digits than it was trained on it is nobody's twin.
    has_twin = isinstance(model, Residual) and case.batches is Case.batches
    twin = accuracy(trained(), case) if has_twin else None
    return Row(case.name, case.expected, found, seconds, before, accuracy(model, case), twin)


def rows(cases: list[Case]) -> list[Row]:
    """All rows, with a dot on the way for each."""
    found_rows = []
    for case in cases:
        found_rows.append(row(case))
        sys.stderr.write(".")
        sys.stderr.flush()
    return found_rows


def of(pairs: frozenset[tuple[str, str]] | set[tuple[str, str]]) -> str:
    """Codes and places in a cell; more than two places of a code as their number."""
    places: dict[str, list[str]] = {}
    for code, where in sorted(pairs):
        places.setdefault(code, []).append(f"`{where}`" if where else "the whole")
    return ", ".join(f"{code} {' '.join(w) if len(w) < 3 else f'at {len(w)} layers'}" for code, w in places.items())


def summary(faults: list[Row], healthy: list[Row]) -> list[str]:
    """The numbers over all cases."""
    recalled = sum({c for c, _ in r.expected} <= {c for c, _ in r.found} for r in faults)
    exact = sum(r.found == r.expected for r in faults)
    alarmed = [r for r in healthy if r.found != r.expected]
    repaired = [r for r in faults if r.after is not None and r.twin is not None]
    back = sum(r.after >= r.twin - ONE_POINT for r in repaired if r.after is not None and r.twin is not None)
    times = [r.seconds for r in faults + healthy]
    return [
        "| what | number |",
        "|---|---|",
        f"| faults whose codes are found | {recalled} of {len(faults)} |",
        f"| faults found at their exact places, and nothing else above a note | {exact} of {len(faults)} |",
        f"| healthy models with a finding above a note | {len(alarmed)} of {len(healthy)} |",
        f"| of those with a safe repair and a twin: repaired to within a point of it | {back} of {len(repaired)} |",
        f"| time for one model, training included, median and largest | {median(times):.1f} s, {max(times):.1f} s |",
    ]


def tables() -> str:
    """Both tables and the numbers over them."""
    faults = rows([*FAULTS, *PLANTED, *(fault for fault, _ in TWINS)])
    healthy = rows([*HEALTHY, *CONTROLS, *(twin for _, twin in TWINS)])
    lines = [*summary(faults, healthy), "", "| fault | planted | missed | besides | accuracy, repaired (twin) |"]
    lines.append("|---|---|---|---|---|")
    for r in faults:
        accuracies = "" if r.before is None else f"{r.before:.3f}, {r.after:.3f}"
        accuracies += "" if r.twin is None else f" ({r.twin:.3f})"
        missed, besides = of(r.expected - r.found), of(r.found - r.expected)
        lines.append(f"| {r.name} | {of(r.expected)} | {missed or '-'} | {besides or '-'} | {accuracies or '-'} |")
    lines += ["", "| healthy | false alarms |", "|---|---|"]
    lines += [f"| {r.name} | {of(r.found) or '-'} |" for r in healthy]
    return "\n".join(lines)


def main() -> None:
    """Print the tables, and put them into the page."""
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        text = tables()
    sys.stdout.write(text + "\n")
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(page[: page.index(MARK) + len(MARK)] + "\n\n" + text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
