"""Rivals that take turns in one process: their errors, their times, and the ratios as a table shows them."""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from torch import Tensor

SECONDS_PER_RIVAL = 0.5
MOST_ROUNDS = 40
LEAST_ROUNDS = 5


class Case(Protocol):
    """What is timed: a shape in a layout, and how many passes over one tensor it takes at least."""

    family: str
    shape: tuple[int, ...]
    layout: str
    residual: bool
    forward_passes: int
    backward_passes: int


def check(ours: list[Tensor], theirs: list[Tensor], exact: list[Tensor]) -> tuple[float, float]:
    """Largest error of ours and of torch against float64, over the largest value; a wrong kernel is not timed."""
    errors = [
        max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, exact, strict=True))
        for found in (ours, theirs)
    ]
    if errors[0] > max(2 * errors[1], 1e-6):
        raise AssertionError(f"wrong by {errors[0]:.1e} where torch is wrong by {errors[1]:.1e}: not timed")
    return errors[0], errors[1]


def check_each(ours: list[Tensor], theirs: list[Tensor], exact: list[Tensor], most: float) -> tuple[float, float]:
    """`check`, result by result; and whatever torch's own error is, ours may not be more than `most`."""
    errors = []
    for place, results in enumerate(zip(ours, theirs, exact, strict=True)):
        *found, wanted = results
        own, torch_own = (((t - wanted).abs().max() / wanted.abs().max()).item() for t in found)
        if not own <= min(max(2 * torch_own, 1e-6), most):
            raise AssertionError(
                f"result {place} is wrong by {own:.1e} where torch is wrong by {torch_own:.1e}: not timed"
            )
        errors.append((own, torch_own))
    return max(own for own, _ in errors), max(other for _, other in errors)


def take_turns(
    rivals: Mapping[str, Any],
    step: Callable[[Any], tuple[float, float]],
    copy: Callable[[], float],
    least: int = LEAST_ROUNDS,
) -> dict[str, float]:
    """Median seconds of every rival's forward and backward pass and of the copy, round after round.

    Args:
        rivals: by name; each is warmed up by one step.
        step: runs a rival; seconds of its two passes.
        copy: seconds of a copy of one tensor.
        least: rounds, however long they take.
    """
    seconds: dict[str, list[float]] = {"copy": []}
    for name, rival in rivals.items():
        step(rival)
        seconds[f"{name}_forward"], seconds[f"{name}_backward"] = [], []
    once = sum(sum(step(rival)) for rival in rivals.values()) / len(rivals)
    rounds = max(least, min(MOST_ROUNDS, round(SECONDS_PER_RIVAL / once)))
    turns = list(rivals.items())
    for _ in range(rounds):
        seconds["copy"].append(copy())
        turns.append(turns.pop(0))  # nobody always comes behind the copy, which leaves the caches full of its own
        for name, rival in turns:
            forward, backward = step(rival)
            seconds[f"{name}_forward"].append(forward)
            seconds[f"{name}_backward"].append(backward)
    return {name: statistics.median(values) for name, values in seconds.items()} | {"rounds": rounds}


def row_of(case: Case, found: dict[str, float]) -> list[str | float]:
    """One line of the table: times over the floor, and how much faster than the others."""

    def over(name: str) -> str:
        forward, backward = found[f"{name}_forward"], found[f"{name}_backward"]
        floor = found["copy"] / 2 * case.forward_passes, found["copy"] / 2 * case.backward_passes
        return f"{forward / floor[0]:.1f} {backward / floor[1]:.1f} {(forward + backward) / sum(floor):.1f}"

    def times(name: str) -> str:
        if f"{name}_forward" not in found:
            return ""
        forward, backward = (found[f"{name}_{way}"] / found[f"ours_{way}"] for way in ("forward", "backward"))
        return f"{forward:.1f} {backward:.1f} {ratio(found, name):.2f}"

    what = "x".join(map(str, case.shape)) + (" +add" if case.residual else "")
    megabytes = math.prod(case.shape) * 4 / 1e6
    return [what, case.layout, f"{megabytes:.1f}", over("ours"), times("eager"), times("compile")]


def ratio(found: dict[str, float], name: str) -> float:
    """How much faster than a rival, forward and backward together."""
    return (found[f"{name}_forward"] + found[f"{name}_backward"]) / (found["ours_forward"] + found["ours_backward"])


def geometric_mean(values: list[float]) -> float:
    """exp(mean(log(v)))."""
    return math.exp(statistics.fmean(math.log(v) for v in values))


def summary(results: list[tuple[Case, dict[str, float]]], name: str) -> Iterator[str]:
    """Geometric means over a rival by family and layout, and the worst case."""
    for family, layout in dict.fromkeys((case.family, case.layout) for case, _ in results):
        ratios = [ratio(found, name) for case, found in results if (case.family, case.layout) == (family, layout)]
        yield f"{family} {layout} over {name}: geometric mean {geometric_mean(ratios):.2f}, least {min(ratios):.2f}"
