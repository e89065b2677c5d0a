"""A process that measures cells: in every line a task with its cell, and an outcome back for each.

Lines of JSON rather than multiprocessing: nothing is pickled, the script that called the lab need not be importable,
and a worker whose parent is gone sees the end of its input and ends.
"""

import json
import os
import signal
import sys
from dataclasses import asdict
from functools import cache

import torch

from steadynorm.errors import SteadynormError
from steadynorm.lab.axes import Cell
from steadynorm.lab.executors import Outcome, measure
from steadynorm.lab.trials import Budget
from steadynorm.recipe import Recipe, load


def main() -> None:
    """Answer lines until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when a run is over
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a recipe prints is no answer
    for line in sys.stdin:
        task = json.loads(line)
        torch.set_num_threads(task["threads"])
        recipe = loaded(task["spec"], task["weights"], task["fingerprint"])
        cell, budget = Cell(**task["cell"]), Budget(**task["budget"])
        outcome = Outcome({}, 0.0, recipe) if isinstance(recipe, str) else measure(recipe, cell, budget)
        try:
            answers.write(json.dumps(asdict(outcome)) + "\n")
            answers.flush()
        except BrokenPipeError:
            os._exit(0)  # the parent is gone; an orderly end would flush into the same broken pipe


@cache
def loaded(spec: str, weights: str | None, fingerprint: str) -> Recipe | str:
    """The recipe, or why every cell fails."""
    try:
        recipe = load(spec, weights)
    except SteadynormError as error:
        return str(error)
    if recipe.fingerprint != fingerprint:
        return f"the recipe {spec} was changed while the lab was running: start the lab again."
    return recipe


if __name__ == "__main__":
    main()
