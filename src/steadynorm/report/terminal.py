"""Draws a Document on a rich console.

The console is passed in, so that the caller owns the stream, the width and the colours.
Every string of a document becomes a rich Text: square brackets in a module path are no markup, and control
characters never reach the terminal.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import singledispatch
from typing import Protocol

try:
    from rich import box
    from rich.bar import Bar
    from rich.cells import cell_len
    from rich.console import Console, ConsoleOptions, Group, JustifyMethod, RenderableType, RenderResult
    from rich.padding import Padding
    from rich.progress import BarColumn, Progress, TextColumn
    from rich.table import Table as Grid
    from rich.text import Text
except ImportError as error:
    raise ImportError("reports in the terminal need rich, the extra [cli]: pip install rich") from error

from steadynorm.report.document import (
    Card,
    Cell,
    Chart,
    Code,
    Document,
    Heading,
    Paragraph,
    Parts,
    Status,
    Table,
    column_texts,
    drawn_columns,
    is_value,
    text_of,
)

STYLES: dict[Status, str] = {"ok": "green", "note": "cyan", "warning": "yellow", "error": "red"}
SYMBOLS: dict[Status, str] = {"ok": "✔", "note": "●", "warning": "▲", "error": "✖"}
LEVELS = "▁▂▃▄▅▆▇█"
GAP = "·"

# Lines longer than this are tiring to read, however wide the terminal is.
LONGEST_LINE = 110
LONGEST_SCALE = 12
LONGEST_BAR = 30


def console(*, stderr: bool = False) -> Console:
    """The console of this process: standard output, or standard error for what is not the result."""
    return Console(stderr=stderr, highlight=False)


class Advance(Protocol):
    """Tells a progress bar how far the work is."""

    def __call__(self, done: int, total: int, seconds_left: float | None = None) -> None:
        """`done` of `total`; without `seconds_left` it is estimated from what is done so far."""
        ...


@contextmanager
def progress(title: str, where: Console, unit: str = "") -> Iterator[Advance]:
    """A progress bar with the time left, gone when the block ends; silent where `where` is not a terminal.

    Args:
        unit: what is counted ("cells"); without it the share that is done is shown, in percent.
    """
    texts = ("{task.description}", "{task.fields[done]}", "{task.fields[left]}")
    name, done_of, left = (TextColumn(text, markup=False) for text in texts)
    with Progress(
        name, BarColumn(), done_of, left, console=where, transient=True, disable=not where.is_terminal
    ) as bar:
        task = bar.add_task(title, total=None, done="", left="")
        started = time.monotonic()

        def advance(done: int, total: int, seconds_left: float | None = None) -> None:
            if seconds_left is None and done:
                seconds_left = (time.monotonic() - started) / done * (total - done)
            left = "" if seconds_left is None else f"{timedelta(seconds=round(seconds_left))} left"
            shown = f"{done}/{total} {unit}" if unit else f"{done / max(total, 1):.0%}"
            bar.update(task, completed=done, total=total, done=shown, left=left)

        yield advance


def show(document: Document, console: Console) -> None:
    """Draw `document` on `console`, at its width and in what its encoding can show."""
    width = min(console.width, LONGEST_LINE)
    console.print(_verdict(document), width=width)
    for block in document.blocks:
        console.print()
        drawn = _charts_in_words(block) if isinstance(block, Chart) else _draw(block)
        console.print(drawn, width=console.width if isinstance(block, Table) else width)
    if document.facts:
        console.print()
        facts = " · ".join(f"{label} {value}" for label, value in document.facts.items())
        console.print(_plain(facts, "dim"), width=width)
    console.print()


def _plain(text: str, style: str = "") -> Text:
    """Text without markup, and without the control characters that could move the cursor or set colours."""
    return Text("".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text), style)


def _verdict(document: Document) -> RenderableType:
    style = STYLES[document.status]
    title = Text.assemble((f"{SYMBOLS[document.status]} ", f"bold {style}"), _plain(document.title, "bold"))
    return Group(Text(), title, Padding(_plain(document.summary), (0, 0, 0, 2)))


@singledispatch
def _draw(block: object) -> RenderableType:
    raise TypeError(f"a document holds blocks, got {type(block).__name__}")


@_draw.register
def _(block: Heading) -> RenderableType:
    return _plain(block.text, "bold underline")


@_draw.register
def _(block: Paragraph) -> RenderableType:
    return _plain(block.text)


@_draw.register
def _(block: Code) -> RenderableType:
    return Padding(_plain(block.text, "cyan"), (0, 0, 0, 4))


@_draw.register
def _(block: Card) -> RenderableType:
    style = STYLES[block.status]
    head = Grid.grid(padding=(0, 2, 0, 0), expand=True)
    head.add_column(no_wrap=True)
    head.add_column(ratio=1)
    head.add_row(
        Text(f"{SYMBOLS[block.status]} {block.status}", f"bold {style}"),
        Text.assemble(_plain(block.code, "bold"), " ", _plain(block.title, "bold")),
    )
    place = Text("  ").join([_plain(block.where, "cyan"), *([_plain(block.source, "dim")] if block.source else [])])
    body: list[RenderableType] = [text for text in (place, _plain(block.text)) if text]
    if block.details:
        body.append(_pairs(block.details))
    if block.cause:
        body.append(Text.assemble(("Why: ", "bold"), _plain(block.cause)))
    if block.fix:
        body.append(Text.assemble(("Fix: ", "bold green"), _plain(block.fix)))
    return Group(head, Padding(Group(*body), (0, 0, 0, 2)))


@_draw.register
def _(block: Parts) -> RenderableType:
    drawn: list[RenderableType] = [_plain(block.title, "bold")]
    for entry in block.entries:
        mark = Text(f"{SYMBOLS[entry.status]} ", STYLES[entry.status]) if entry.status else Text("  ")
        drawn.append(Text.assemble(mark, _plain(entry.title, "cyan"), "  ", _plain(entry.note, "dim")))
        inside = [_charts_in_words(one) if isinstance(one, Chart) else _draw(one) for one in entry.blocks]
        drawn += [Padding(one, (0, 0, 1, 4)) for one in inside]
    return Group(*drawn, *([_plain(block.note, "dim")] if block.note else []))


@_draw.register
def _(block: Table) -> RenderableType:
    return _figure(block.title, _Grid(block), block.note)


@dataclass(frozen=True)
class _Grid:
    """The rows of a table; where space is short, first the gaps and then the columns of words give way.

    A number that is broken in two is another number. A module path goes on in the next line: cut off, it names nothing.
    """

    table: Table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        columns = drawn_columns(self.table)
        natural = [max(map(cell_len, [name, *texts])) for name, texts, _ in columns]
        least = [max(map(cell_len, " ".join([name, *texts]).split()), default=1) for name, texts, _ in columns]
        is_short = sum(natural) + 2 * len(columns) > options.max_width
        gap = 0 if sum(least) + 2 * len(columns) > options.max_width else 1
        grid = Grid(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, gap, 0, 0))
        for (name, _, numeric), width in zip(columns, least, strict=True):
            justify: JustifyMethod = "right" if numeric else "left"
            fixed = width if numeric and is_short else None
            grid.add_column(_plain(name), justify=justify, overflow="fold", width=fixed)
        for row in zip(*(texts for _, texts, _ in columns), strict=True):
            grid.add_row(*map(_plain, row))
        yield grid


def _figure(title: str, body: RenderableType, note: str) -> RenderableType:
    return Group(*([_plain(title, "bold")] if title else []), body, *([_plain(note, "dim")] if note else []))


def _pairs(pairs: Sequence[tuple[str, Cell]]) -> RenderableType:
    grid = Grid.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="dim")
    grid.add_column(overflow="fold")
    for label, value in pairs:
        grid.add_row(_plain(label), _plain(text_of(value)))
    return grid


def _charts_in_words(chart: Chart) -> RenderableType:
    return _bars(chart) if chart.kind == "bar" else _sparklines(chart)


def _sparklines(chart: Chart) -> RenderableType:
    """One row a series: its shape on a scale that all share, and the numbers at its ends, so that it cannot mislead."""
    order = list(dict.fromkeys(x for series in chart.series for x in series.x))
    values = [y for series in chart.series for y in series.y if is_value(y)]
    low, high = min(values, default=0.0), max(values, default=0.0)
    ends: list[Cell] = []
    for series in chart.series:
        drawn = [y for y in series.y if is_value(y)]
        ends += [drawn[0], drawn[-1], min(drawn), max(drawn)] if drawn else [None] * 4
    texts = column_texts(ends)
    rows = []
    for number, series in enumerate(chart.series):
        at = dict(zip(series.x, series.y, strict=True))
        shape = "".join(_level(at.get(x), low, high) for x in order)
        rows.append([series.name, shape, *texts[4 * number : 4 * number + 4]])
    shown = order if len(order) <= LONGEST_SCALE else [order[0], "…", order[-1]]
    gap = f", {GAP} no value" if any(GAP in row[1] for row in rows) else ""
    across = f"{chart.x_label} {', '.join(map(text_of, shown))}"
    scale = f"{across}; {LEVELS[0]} {text_of(low)}, {LEVELS[-1]} {text_of(high)}{gap}"
    columns = [chart.y_label, "shape", "first", "last", "lowest", "highest"]
    return _draw(Table(chart.title, columns, rows, f"{scale}\n{chart.note}".rstrip()))


def _level(y: float | None, low: float, high: float) -> str:
    if not is_value(y):
        return GAP
    return LEVELS[round((y - low) / (high - low) * (len(LEVELS) - 1))] if high > low else LEVELS[0]


def _bars(chart: Chart) -> RenderableType:
    """One bar a row, all from the same zero: half as long is half as much, and to the left is below zero."""
    points = [(series.name, x, y) for series in chart.series for x, y in zip(series.x, series.y, strict=True)]
    values = [float(y) for _, _, y in points if is_value(y)]
    low, high = min(0.0, *values, 0.0), max(0.0, *values, 0.0)
    grid = Grid(box=None, pad_edge=False)
    names = [chart.x_label, *([""] if len(chart.series) > 1 else [])]
    for name in names:
        grid.add_column(_plain(name, "dim"), overflow="fold")
    grid.add_column(max_width=LONGEST_BAR)
    grid.add_column(_plain(chart.y_label, "dim"), justify="right", no_wrap=True)
    for (name, x, y), text in zip(points, column_texts([y for _, _, y in points]), strict=True):
        labels = [text_of(x), name][: len(names)]
        ends = sorted((0.0, float(y) if is_value(y) else 0.0))
        bar = Bar((high - low) or 1.0, ends[0] - low, ends[1] - low, color="cyan")
        grid.add_row(*map(_plain, labels), bar, _plain(text))
    return _figure(chart.title, grid, chart.note)
