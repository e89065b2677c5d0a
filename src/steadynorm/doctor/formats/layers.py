"""What is known of each normalization layer, as rows and charts that every format shows alike."""

import math

from steadynorm.probe import Facts
from steadynorm.probe.facts import CHANCE_FACTOR, MATERIAL_DIVERGENCE, Drift
from steadynorm.report import Block, Cell, Chart, Series, Table

COLUMNS = ("layer", "kind", "values", "independent", "divergence", "threshold")
WHOLE = "the model"


def rows(facts: Facts) -> list[tuple[Cell, ...]]:
    """One row of `COLUMNS` for each normalization layer, in the order of definition."""
    size = batch_size(facts)
    found: list[tuple[Cell, ...]] = []
    for path, norm in facts.norms.items():
        values, drift = facts.values.get(path), facts.drift.get(path)
        independent = values.independent_per_sample if values else None
        found.append(
            (
                path or WHOLE,
                norm.kind,
                round(values.per_sample * size) if values and size else None,
                independent * size if independent and size else None,
                drift.divergence if drift else None,
                threshold(drift) if drift else None,
            )
        )
    return found


def batch_size(facts: Facts) -> int:
    """Samples of the largest training batch; 0 where none was given."""
    return max(facts.train_batches.sizes, default=0) if facts.train_batches else 0


def threshold(drift: Drift) -> float:
    """The divergence from which on a layer's stored statistics are not those of the data."""
    return max(MATERIAL_DIVERGENCE, CHANCE_FACTOR * drift.null)


def table(facts: Facts) -> Table:
    """The rows with what their columns mean."""
    note = "Divergence: of the stored statistics from those of the data (Jeffreys, mean over channels)."
    if size := batch_size(facts):
        note += (
            f" Values: behind each statistic in a training batch of {size} samples. Independent: how many unrelated "
            "values these are worth, since values of one sample resemble each other."
        )
    found = rows(facts)
    known = [i for i in range(len(COLUMNS)) if any(row[i] is not None for row in found)]
    shown = [tuple(row[i] for i in known) for row in found]
    return Table("Normalization layers", [COLUMNS[i] for i in known], shown, note if facts.drift else "")


def blocks(facts: Facts) -> list[Block]:
    """The table of the layers, and the chart of their divergences where there are several."""
    if not facts.norms:
        return []
    return [table(facts), *([drift_chart(facts)] if len(facts.drift) > 1 else [])]


def drift_chart(facts: Facts, after: Facts | None = None) -> Chart:
    """Divergence by layer, as its logarithm: a stale layer is a thousand times a healthy one."""

    def series(name: str, seen: Facts) -> Series:
        found = list(seen.drift.values())
        heights = [math.log10(max(d.divergence, 1e-6) / MATERIAL_DIVERGENCE) for d in found]
        return Series(name, [d.path or WHOLE for d in found], [h if math.isfinite(h) else None for h in heights])

    return Chart(
        "How far the stored statistics are from the data",
        "layer",
        "orders of magnitude over 0.01",
        [series("divergence" if after is None else "before", facts), *([series("after", after)] if after else [])],
        kind="bar",
        note="Below zero is what healthy layers show; no bar is a layer whose statistics are broken.",
    )


def values_chart(facts: Facts) -> Chart | None:
    """Values behind a statistic by layer, as the logarithm; None where there was no training batch."""
    size = batch_size(facts)
    found = [values for values in facts.values.values() if values.per_sample * size > 0]
    if not found:
        return None
    paths = [values.path or WHOLE for values in found]
    drawn = [Series("values", paths, [math.log10(values.per_sample * size) for values in found])]
    if any(values.independent_per_sample for values in found):
        heights = [math.log10(n * size) if (n := values.independent_per_sample) else None for values in found]
        drawn.append(Series("independent", paths, heights))
    return Chart(
        f"Values behind a statistic, at {size} samples a batch",
        "layer",
        "orders of magnitude (2 is a hundred)",
        drawn,
        kind="bar",
        note="Independent: how many unrelated values these are worth.",
    )
