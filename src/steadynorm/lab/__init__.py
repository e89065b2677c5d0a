"""How does a model depend on its batch size and its norm? Measured in short trainings, with a verdict.

study = lab.run(recipe.load("digits"), batch_sizes=[2, 8, 32], norms=["batch", "group"], seeds=3, store=path)
study.verdict.sentence
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean

from steadynorm import machine
from steadynorm.errors import InputError, RecipeError, SteadynormError
from steadynorm.lab import executors
from steadynorm.lab.axes import NORMS, Cell, grid, set_norm
from steadynorm.lab.executors import Outcome
from steadynorm.lab.store import Row, Store, key
from steadynorm.lab.study import Study
from steadynorm.lab.trials import DEFAULT_STEPS, Budget, Scaling
from steadynorm.lab.verdict import Verdict
from steadynorm.recipe import SIGNATURES, Recipe, seeded, train

__all__ = ["NORMS", "Budget", "Progress", "Study", "Verdict", "run"]


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Args:
        done: cells finished, those of earlier runs included.
        total: cells of the grid.
        skipped: cells whose rows were stored already.
        failed: cells of this run that ended in an error.
        seconds_left: an estimate; None before there is anything to go by.
        cell: what just finished, "batch norm, batch size 8, seed 0"; empty at the start.
    """

    done: int
    total: int
    skipped: int
    failed: int
    seconds_left: float | None
    cell: str = ""


def run(
    recipe: Recipe,
    *,
    batch_sizes: Sequence[int],
    norms: Sequence[str],
    seeds: int,
    store: Path,
    steps: int = DEFAULT_STEPS,
    lr: float | None = None,
    lr_scaling: Scaling = "linear",
    workers: int | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Study:
    """Train the recipe once per norm, batch size and seed, store a row as each finishes, and judge the whole.

    Rows that `store` already has for the same recipe (its file, weights included), cell and budget are not measured
    again, unless they hold an error.

    Args:
        seeds: how many; they are 0, 1, ….
        store: a file of JSON lines; made if missing.
        steps: at batch size 32; every cell sees as many samples as that, see `Budget`.
        lr: at batch size 32; the recipe's own if not given.
        workers: processes; by default one per core up to four, and this process alone for a recipe made in Python.
        on_progress: called at the start and after every cell.

    Raises:
        InputError: an argument makes no sense, or the store is something else.
        RecipeError: the recipe cannot be trained at all.
    """
    budget = Budget(steps, recipe.lr if lr is None else lr, lr_scaling)
    cells = grid(norms=norms, batch_sizes=batch_sizes, seeds=seeds)
    kept = Store(store)
    _ensure_usable(recipe, cells, budget)
    blanks = {key(blank): (cell, blank) for cell in cells for blank in [_blank(recipe, cell, budget)]}
    done = {name: row for name, row in kept.latest().items() if name in blanks and not row["error"]}
    missing = [cell for name, (cell, _) in blanks.items() if name not in done]
    tracker = _Tracker(on_progress, len(cells), budget, missing, done.values(), _worker_count(recipe, workers, missing))
    tracker.report("")
    about = {"machine": machine.describe()}
    for cell, outcome in _execute(recipe, missing, budget, tracker.workers):
        row = {**_blank(recipe, cell, budget), **vars(outcome), "finished": datetime.now(UTC).isoformat(), **about}
        done[key(row)] = kept.append(row)
        tracker.finished(cell, outcome)
    return Study(recipe.name, budget, tuple(done[name] for name in blanks))


def _blank(recipe: Recipe, cell: Cell, budget: Budget) -> Row:
    """What names a row: everything but its results."""
    return {
        "recipe": recipe.name,
        "fingerprint": recipe.fingerprint,
        "parameters": cell.parameters,
        "seed": cell.seed,
        "budget": budget.to_dict(),
    }


def _ensure_usable(recipe: Recipe, cells: Sequence[Cell], budget: Budget) -> None:
    """Raise now what would otherwise be the same error in every row."""
    if not recipe.fingerprint:
        raise InputError(
            f"the recipe {recipe.name} has no fingerprint to know its rows by: load it from a file, "
            "or give it a text that changes when it does."
        )
    if recipe.loss is None:
        raise RecipeError(f"the recipe {recipe.name} cannot be trained without a loss: add {SIGNATURES['loss']}.")
    with seeded(0):
        for norm in dict.fromkeys(cell.norm for cell in cells):
            set_norm(recipe.model(), norm)
        first: SteadynormError | None = None
        for size in dict.fromkeys(cell.batch_size for cell in reversed(cells)):
            try:
                train(recipe.model(), recipe, batch_size=size, steps=1, lr=budget.lr_at(size), seed=0)
            except SteadynormError as error:
                first = first or error
            else:
                return
    assert first is not None  # there is at least one cell
    raise first


def _worker_count(recipe: Recipe, workers: int | None, missing: Sequence[Cell]) -> int:
    if workers is not None and workers < 1:
        raise InputError(f"{workers} workers were given: expected at least 1.")
    if not recipe.spec:
        if workers is not None and workers > 1:
            raise InputError(
                f"the recipe {recipe.name} was made in Python: other processes need a file to load it from."
            )
        return 1
    return min(workers or executors.default_workers(len(missing)), max(1, len(missing)))


def _execute(recipe: Recipe, cells: Sequence[Cell], budget: Budget, workers: int) -> Iterable[tuple[Cell, Outcome]]:
    if workers == 1:
        return executors.in_this_process(recipe, cells, budget)
    return executors.in_processes(recipe, cells, budget, workers)


class _Tracker:
    """Counts cells and estimates the time that is left from those that have finished."""

    def __init__(
        self,
        on_progress: Callable[[Progress], None] | None,
        total: int,
        budget: Budget,
        missing: Sequence[Cell],
        stored: Iterable[Row],
        workers: int,
    ) -> None:
        self.on_progress, self.total, self.budget, self.workers = on_progress, total, budget, workers
        self.left = list(missing)
        self.failed = 0
        self.seconds: dict[int, list[float]] = {}
        for row in stored:
            self.seconds.setdefault(row["parameters"]["batch_size"], []).append(row["seconds"])
        self.skipped = total - len(missing)

    def finished(self, cell: Cell, outcome: Outcome) -> None:
        self.left.remove(cell)
        if outcome.error:
            self.failed += 1
        else:
            self.seconds.setdefault(cell.batch_size, []).append(outcome.seconds)
        self.report(f"{cell.norm} norm, batch size {cell.batch_size}, seed {cell.seed}")

    def report(self, label: str) -> None:
        if self.on_progress is not None:
            done = self.total - len(self.left)
            self.on_progress(Progress(done, self.total, self.skipped, self.failed, self.seconds_left(), label))

    def seconds_left(self) -> float | None:
        """From cells of the same batch size, or else by the number of steps."""
        if not self.seconds:
            return None if self.left else 0.0
        means = {size: fmean(seconds) for size, seconds in self.seconds.items()}
        a_step = sum(means.values()) / sum(self.budget.steps_at(size) for size in means)
        left = (means.get(cell.batch_size, a_step * self.budget.steps_at(cell.batch_size)) for cell in self.left)
        return sum(left) / self.workers
