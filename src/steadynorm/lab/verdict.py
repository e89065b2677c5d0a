"""What the rows say: from which batch size on a norm is as good as it gets, and which norm to take below it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Any, Literal

from steadynorm.lab.noise import Sample, is_below, samples

Row = dict[str, Any]
Status = Literal["ok", "note", "warning", "error"]

MIN_SEEDS = 2
NAMES = {"batch": "batch norm", "group": "group norm", "layer": "layer norm", "none": "no norm"}
HOW = (
    "Within noise means: not below the best by more than the seeds explain. Welch's one-sided t at 5 % over the whole "
    "curve (Bonferroni over all pairs of its points); the variance of each point is drawn towards that of a typical "
    "one, since a few seeds tell little of it (Smyth 2004). ± is the standard deviation over the seeds."
)


@dataclass(frozen=True)
class Curve:
    """One norm over the batch sizes; in a sample higher is better, whatever the metric.

    `failed` are the sizes at which a seed failed; they have no sample.
    """

    norm: str
    points: Mapping[int, Sample]
    failed: tuple[int, ...] = ()

    @cached_property
    def best(self) -> int:
        """The batch size with the best mean; the smallest of several."""
        return max(sorted(self.points), key=lambda size: self.points[size].mean)

    @cached_property
    def good(self) -> tuple[int, ...]:
        """The batch sizes around the best one that are within noise of it, without a gap."""
        sizes = sorted([*self.points, *self.failed])
        comparisons = len(self.points) * (len(self.points) - 1)
        run: list[int] = []
        for size in sizes:
            point = self.points.get(size)
            if point is not None and not is_below(point, self.points[self.best], comparisons):
                run.append(size)
            elif self.best in run:
                break
            else:
                run = []
        return tuple(run)


@dataclass(frozen=True)
class Verdict:
    """The answer in a sentence or two, and the numbers behind it.

    Args:
        status: "ok" the batch size does not matter, "warning" it does, "note" it cannot be told, "error" no result.
        norm: the norm that the answer is about: batch norm where it was measured.
        metric: what was compared.
        seeds: how many seeds every cell has at least.
        smallest: the smallest batch size from which on `norm` is within noise of its best; None if it cannot be told.
        largest: the largest one; above it the metric falls again.
        instead: by batch size outside of that range, the norm that is better by more than noise.
    """

    status: Status
    sentence: str
    metric: str = ""
    norm: str = ""
    seeds: int = 0
    smallest: int | None = None
    largest: int | None = None
    instead: Mapping[int, str] | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {**vars(self), "instead": {str(size): norm for size, norm in (self.instead or {}).items()}}


def metric_of(rows: Sequence[Row]) -> str:
    """The number that decides: the recipe's first metric, or the loss if it has none; empty if no cell finished."""
    names = next((list(row["numbers"]) for row in rows if not row["error"]), [])
    return next((name for name in names if name != "loss"), "loss" if names else "")


def curves_of(rows: Sequence[Row]) -> list[Curve]:
    """A curve for every norm that has a finished cell, in the order of the rows."""
    metric = metric_of(rows)
    sign = -1.0 if metric == "loss" else 1.0
    cells: dict[tuple[str, int], list[float]] = {}
    failed: dict[tuple[str, int], bool] = {}
    for row in rows:
        place = (row["parameters"]["norm"], row["parameters"]["batch_size"])
        failed[place] = failed.get(place, False) or bool(row["error"])
        if not row["error"]:
            cells.setdefault(place, []).append(sign * row["numbers"][metric])
    whole = {place: values for place, values in cells.items() if not failed[place]}
    moderated = dict(zip(whole, samples(list(whole.values())), strict=True))
    curves = []
    for norm in dict.fromkeys(norm for norm, _ in failed):
        points = {size: sample for (name, size), sample in moderated.items() if name == norm}
        lost = sorted(size for (name, size), is_lost in failed.items() if name == norm and is_lost)
        if points:
            curves.append(Curve(norm, dict(sorted(points.items())), tuple(lost)))
    return curves


def judge(rows: Sequence[Row]) -> Verdict:
    """The verdict on the rows of one recipe and budget."""
    errors = [row for row in rows if row["error"]]
    curves = curves_of(rows)
    if not curves:
        cause = f": {errors[0]['error']}" if errors else "; the grid is empty."
        return Verdict("error", f"No cell of the grid finished with every seed{cause}")
    metric = metric_of(rows)
    curve = next((curve for curve in curves if curve.norm == "batch"), curves[0])
    seeds = min(len(point.values) for each in curves for point in each.points.values())
    after = f" {len(errors)} of {len(rows)} cells failed: {errors[0]['error']}" if errors else ""
    if seeds < MIN_SEEDS:
        return Verdict("note", _too_few(curve, metric) + after, metric, curve.norm, seeds)
    instead = _instead(curve, curves)
    dependence = _dependence(curve, metric)
    depends = len(curve.good) < len(curve.points) + len(curve.failed)
    advice = _advice(curve, curves, instead, metric)
    return Verdict(
        "warning" if depends else "note" if len(curve.points) == 1 else "ok",
        " ".join(filter(None, [dependence, advice])) + after,
        metric,
        curve.norm,
        seeds,
        smallest=curve.good[0],
        largest=curve.good[-1],
        instead=instead,
    )


def shown(point: Sample, metric: str) -> str:
    """A point as ``0.981 ± 0.004``."""
    deviation = point.deviation
    value = f"{abs(point.mean) if metric == 'loss' else point.mean:.3g}"
    return value if deviation is None else f"{value} ± {deviation:.1g}"


def _too_few(curve: Curve, metric: str) -> str:
    best = curve.best
    return (
        f"One seed cannot tell a difference from noise, so there is no verdict: with {NAMES[curve.norm]} {metric} was "
        f"best at batch size {best} ({shown(curve.points[best], metric)}); run at least 2 seeds, better 3 to 5."
    )


def _dependence(curve: Curve, metric: str) -> str:
    """How the metric of one norm depends on the batch size."""
    name, sizes = NAMES[curve.norm], sorted([*curve.points, *curve.failed])
    first, last = curve.good[0], curve.good[-1]
    best = f"its best, {shown(curve.points[curve.best], metric)} at batch size {curve.best}"
    if len(sizes) == 1:
        return (
            f"With {name}, {metric} is {shown(curve.points[first], metric)} at batch size {first}, the only one tried."
        )
    if (first, last) == (sizes[0], sizes[-1]):
        return (
            f"With {name}, the batch size makes no difference that the seeds could tell from noise: from {first} to "
            f"{last}, {metric} is within noise of {best}."
        )
    if first == sizes[-1]:
        return (
            f"With {name}, {metric} is best at the largest batch size tried, {first} ({_of(curve, first, metric)})"
            + (f", and worse by more than noise at {_at(curve, [sizes[-2]], metric)}; try larger ones.")
        )
    below, above = [size for size in sizes if size < first], [size for size in sizes if size > last]
    text = f"With {name}, {metric} is within noise of {best}, "
    text += f"from batch size {first} on" if below and not above else f"from batch size {first} to {last}"
    worse = [_at(curve, part, metric) for part in (below, above[:1]) if part]
    return f"{text}; it is worse at {' and at '.join(worse)}."


def _of(curve: Curve, size: int, metric: str) -> str:
    return "failed" if size in curve.failed else shown(curve.points[size], metric)


def _at(curve: Curve, sizes: Sequence[int], metric: str) -> str:
    return ", ".join(f"{size} ({_of(curve, size, metric)})" for size in sizes)


def _instead(curve: Curve, curves: Sequence[Curve]) -> dict[int, str]:
    """For each batch size outside the good ones, the best other norm if it beats this one by more than noise."""
    better = {}
    for size in sorted([*curve.points, *curve.failed]):
        rival = _best_rival(size, curve, curves)
        if size not in curve.good and rival is not None:
            better[size] = rival.norm
    return better


def _best_rival(size: int, curve: Curve, curves: Sequence[Curve]) -> Curve | None:
    """The best other norm at a batch size, if it is better there by more than noise."""
    there = [each for each in curves if size in each.points]
    rivals = [each for each in there if each is not curve]
    if not rivals:
        return None
    rival = max(rivals, key=lambda each: each.points[size].mean)
    if size not in curve.points:
        return rival
    return rival if is_below(curve.points[size], rival.points[size], len(there) * (len(there) - 1)) else None


def _equals(winner: Curve, curves: Sequence[Curve], sizes: Sequence[int]) -> str:
    """The norms that the seeds cannot tell from the winner at any of the sizes, in brackets.

    To be called as good a norm has to pass each single test at 5 %, not the wider one for all of them together.
    """
    equals = [
        NAMES[each.norm]
        for each in curves
        if each is not winner
        and all(size in each.points for size in sizes)
        and not any(is_below(each.points[size], winner.points[size], 1) for size in sizes)
    ]
    return f" ({' and '.join(equals)} {'is' if len(equals) == 1 else 'are'} within noise of it)" if equals else ""


def _advice(curve: Curve, curves: Sequence[Curve], instead: Mapping[int, str], metric: str) -> str:
    """Which norm to take where this one is not at its best, and whether another beats it even there."""
    if len(curves) == 1:
        return ""
    parts = []
    below = [size for size in [*curve.points, *curve.failed] if size < curve.good[0]]
    by_name = {each.norm: each for each in curves}
    named = sorted({norm for size, norm in instead.items() if size in below})
    if named:
        # Of several winners, the one that is best over all the small sizes is the simpler advice.
        norm = max(
            named, key=lambda each: fmean(by_name[each].points[s].mean for s in below if s in by_name[each].points)
        )
        at = [size for size in sorted(below) if size in instead and size in by_name[norm].points]
        reached = ", ".join(f"{shown(by_name[norm].points[size], metric)} at {size}" for size in at)
        parts.append(f"Below {curve.good[0]} take {NAMES[norm]}{_equals(by_name[norm], curves, at)}: {reached}.")
    elif below:
        parts.append(f"Below {curve.good[0]} no other norm was better by more than noise.")
    rival = _best_rival(curve.best, curve, curves)
    if rival is not None:
        there = f"{shown(rival.points[curve.best], metric)} against {shown(curve.points[curve.best], metric)}"
        parts.append(f"Even at batch size {curve.best} {NAMES[rival.norm]} is better: {there}.")
    return " ".join(parts)
