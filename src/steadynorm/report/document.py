"""What a result says of itself, as plain data. Renderers draw it; nothing here knows how.

A Document is a title, a verdict with its status, blocks in reading order, and the facts (machine, versions) behind
them. Values stay numbers until they are drawn, so that every renderer shows the same ones.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Literal, TypeGuard, get_args

Status = Literal["ok", "note", "warning", "error"]
Cell = str | int | float | None

STATUSES: tuple[Status, ...] = get_args(Status)
MISSING = "–"

# Four significant digits tell two accuracies of a thousand samples apart; a fifth would be noise.
DIGITS = 4


@dataclass(frozen=True)
class Heading:
    """A heading over the blocks that follow it."""

    text: str


@dataclass(frozen=True)
class Paragraph:
    """Running text; a newline is kept."""

    text: str


@dataclass(frozen=True)
class Code:
    """Text to be copied as it stands: a command, a few lines of Python."""

    text: str


@dataclass(frozen=True)
class Table:
    """Rows of numbers and words under column names.

    Raises:
        ValueError: a row that is longer or shorter than the columns.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""

    def __post_init__(self) -> None:
        for number, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(
                    f"table {self.title!r} has {len(self.columns)} columns, row {number} has {len(row)} cells"
                )


@dataclass(frozen=True)
class Series:
    """One line or one set of bars of a chart; a y of None or NaN is a gap.

    Args:
        name: as the legend shows it.
        x: (points,) numbers, or words for categories.
        y: (points,) values.
        low: (points,) lower end of the spread, where there is one.
        high: (points,) upper end of the spread.

    Raises:
        ValueError: sequences of different lengths, or `low` without `high`.
    """

    name: str
    x: Sequence[float | str]
    y: Sequence[float | None]
    low: Sequence[float | None] | None = None
    high: Sequence[float | None] | None = None

    def __post_init__(self) -> None:
        if (self.low is None) != (self.high is None):
            raise ValueError(f"series {self.name!r} needs both ends of the spread, low and high, or neither")
        lengths = [len(values) for values in (self.x, self.y, self.low, self.high) if values is not None]
        if len(set(lengths)) > 1:
            raise ValueError(f"series {self.name!r} has sequences of different lengths: {lengths}")


@dataclass(frozen=True)
class Chart:
    """Series over one pair of axes, as lines, as bars, or as points beside the line on which both axes are equal.

    Args:
        note: below the chart, in words that hold for every renderer.
        spread: what the bars at the points are, for renderers that draw `low` and `high`; the terminal does not.

    Raises:
        ValueError: no series.
    """

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    kind: Literal["line", "bar", "scatter"] = "line"
    log_x: bool = False
    note: str = ""
    spread: str = ""

    def __post_init__(self) -> None:
        if not self.series:
            raise ValueError(f"chart {self.title!r} has no series")

    def table(self) -> Table:
        """The numbers behind the chart, one row per x; x in the order of first appearance."""
        order = list(dict.fromkeys(x for series in self.series for x in series.x))
        columns: list[str] = [self.x_label]
        cells: list[list[Cell]] = [[x] for x in order]
        for series in self.series:
            for label, values in (("", series.y), (" (low)", series.low), (" (high)", series.high)):
                if values is None:
                    continue
                columns.append(series.name + label)
                at = dict(zip(series.x, values, strict=True))
                for row, x in zip(cells, order, strict=True):
                    row.append(at.get(x))
        return Table(self.title, columns, cells, self.note)


@dataclass(frozen=True)
class Card:
    """One finding: what is wrong, where, what was measured, and what to do.

    Args:
        status: how bad it is.
        code: of the rule, "SN101".
        title: of the rule, a few words.
        where: dotted module path.
        text: the finding in a sentence or two.
        details: (label, value) pairs, the measured evidence.
        cause: where it comes from, or empty.
        source: the line of code behind `where`, "model.py:12", or empty.
        fix: what to do, or empty.
    """

    status: Status
    code: str
    title: str
    where: str
    text: str
    details: Sequence[tuple[str, Cell]] = ()
    fix: str = ""
    cause: str = ""
    source: str = ""


@dataclass(frozen=True)
class Entry:
    """One of the things that `Parts` lists; without blocks it is a name in the list and nothing more.

    Args:
        title: its name, a dotted module path.
        note: beside the name, a few words.
        status: the worst of what is in it; None where nothing was looked for.
        blocks: what is shown of it.
    """

    title: str
    note: str = ""
    status: Status | None = None
    blocks: "Sequence[Heading | Paragraph | Table | Chart | Card | Code]" = ()


@dataclass(frozen=True)
class Parts:
    """Entries with a list of them beside: the layers of a network."""

    title: str
    entries: Sequence[Entry]
    note: str = ""


Block = Heading | Paragraph | Table | Chart | Card | Code | Parts


@dataclass(frozen=True)
class Document:
    """A result that can be shown: a verdict, blocks in reading order, and the facts behind them.

    Args:
        title: a few words.
        summary: the verdict in a sentence or two.
        status: the verdict in a word.
        blocks: in reading order.
        facts: label to value: machine, versions, settings.
    """

    title: str
    summary: str
    status: Status = "ok"
    blocks: Sequence[Block] = ()
    facts: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"document {self.title!r} has status {self.status!r}, expected one of {STATUSES}")


def text_of(cell: Cell) -> str:
    """A cell as readers see it: four significant digits, and a dash where there is no value."""
    if cell is None:
        return MISSING
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, (str, Integral)) or not isinstance(cell, Real):
        return str(cell)
    return f"{float(cell):.{DIGITS}g}"


def column_texts(cells: Sequence[Cell]) -> list[str]:
    """The cells of one column as readers see them: numbers of similar size get the same number of decimals."""
    floats = [abs(float(c)) for c in cells if _is_float(c) and math.isfinite(c)]
    largest, smallest = max(floats, default=0.0), min((v for v in floats if v), default=0.0)
    # Fixed decimals would hide values far below the largest, and spell out very large ones.
    if not 1e-3 <= largest < 1e6 or smallest < largest * 10.0 ** (1 - DIGITS):
        return [text_of(c) for c in cells]
    decimals = max(0, DIGITS - 1 - math.floor(math.log10(largest)))
    return [f"{c:.{decimals}f}" if _is_float(c) else text_of(c) for c in cells]


def is_numeric(cells: Sequence[Cell]) -> bool:
    """Whether a column holds numbers, or text that begins like one ("0.93 ± 0.01"), and is aligned to the right."""
    present = [c for c in cells if c not in (None, MISSING)]
    return bool(present) and all(
        not isinstance(c, bool) and (isinstance(c, Real) or re.match(r"[-−+±]?\.?\d", str(c)) is not None)
        for c in present
    )


def drawn_columns(table: Table) -> list[tuple[str, list[str], bool]]:
    """Name, texts and alignment (True is to the right) of every column; row labels that are words stay at the left."""
    columns = []
    for number, name in enumerate(table.columns):
        cells = [row[number] for row in table.rows]
        # "1" in the first column is a layer of a Sequential.
        is_label = number == 0 and any(isinstance(cell, str) for cell in cells)
        columns.append((name, column_texts(cells), is_numeric(cells) and not is_label))
    return columns


def is_value(y: object) -> TypeGuard[float]:
    """Whether a point can be drawn: a finite number, no gap."""
    return isinstance(y, Real) and math.isfinite(y)


def _is_float(cell: object) -> TypeGuard[float]:
    return isinstance(cell, Real) and not isinstance(cell, Integral)
