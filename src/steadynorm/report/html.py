"""Draws Documents as one self-contained page that opens offline, on a phone, in the dark and without a mouse.

Nothing is fetched: style, script and Plotly are inside the page, and its content security policy tells the browser to
run these exact scripts (by their hashes), no others, and to make no request at all.
"""

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import resources
from typing import Any

try:
    import jinja2
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs
except ImportError as error:
    raise ImportError("HTML reports need jinja2 and plotly, the extra [report]: pip install jinja2 plotly") from error

from steadynorm.report.document import Block, Chart, Document, Parts, Table, drawn_columns, is_value, text_of

# A table with more columns than this gets the whole width instead of a place beside a chart.
NARROW_TABLE = 5


def render(documents: Sequence[Document], title: str) -> str:
    """One page that shows `documents` one after the other under `title`, as HTML text.

    Facts that all documents share (the machine, the versions) stand once, in the footer.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("steadynorm.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["text"] = text_of
    environment.filters["anchor"] = _anchors(documents)
    environment.globals["table_of"] = _table
    environment.globals["chart_data"] = _chart_data
    environment.globals["rows_in"] = lambda blocks: list(_rows(blocks))
    has_charts = any(isinstance(block, Chart) for document in documents for block in _flat(document.blocks))
    scripts = [str(get_plotlyjs()), _asset("page.js")] if has_charts else []
    shared = _shared_facts(documents)
    return environment.get_template("page.html").render(
        title=title,
        sections=[(document, list(_rows(document.blocks)), _without(document.facts, shared)) for document in documents],
        shared=shared,
        style=Markup(_asset("page.css")),
        scripts=[Markup(script) for script in scripts],
        hashes=[_hash(script) for script in scripts],
    )


def _anchors(documents: Sequence[Document]) -> Callable[[Parts], str]:
    """How the entries of a block are addressed: by its title, which may come once in every document."""
    blocks = [block for document in documents for block in document.blocks if isinstance(block, Parts)]
    numbers = {id(block): number for number, block in enumerate(blocks)}

    def anchor(block: Parts) -> str:
        name = re.sub(r"\W+", "-", block.title.lower()).strip("-")
        return f"{name}-in-{numbers[id(block)] + 1}" if numbers[id(block)] else name

    return anchor


def _flat(blocks: Sequence[Block]) -> Iterator[Block]:
    for block in blocks:
        yield block
        if isinstance(block, Parts):
            for entry in block.entries:
                yield from entry.blocks


def _asset(name: str) -> str:
    return resources.files("steadynorm.report").joinpath(name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _shared_facts(documents: Sequence[Document]) -> dict[str, str]:
    first, *others = [document.facts for document in documents] or [{}]
    return {label: value for label, value in first.items() if all(facts.get(label) == value for facts in others)}


def _without(facts: Mapping[str, str], shared: Mapping[str, str]) -> dict[str, str]:
    return {label: value for label, value in facts.items() if label not in shared}


def _rows(blocks: Sequence[Block]) -> Iterator[tuple[str, list[Block]]]:
    """Blocks in rows of the page: neighbouring charts and narrow tables share one, all else stands alone.

    Yields:
        (kind, blocks): kind is "figures" for charts and tables, else the name of the block in lower case.
    """
    beside: list[Block] = []
    for block in blocks:
        if isinstance(block, Chart) or (isinstance(block, Table) and len(block.columns) <= NARROW_TABLE):
            beside.append(block)
            continue
        if beside:
            yield "figures", beside
            beside = []
        yield ("figures" if isinstance(block, Table) else type(block).__name__.lower()), [block]
    if beside:
        yield "figures", beside


def _table(block: Table | Chart) -> dict[str, Any]:
    """What the template needs of a table: (name, is numeric) per column, and the texts of every row."""
    columns = drawn_columns(block if isinstance(block, Table) else block.table())
    return {
        "columns": [(name, numeric) for name, _, numeric in columns],
        "rows": list(zip(*(texts for _, texts, _ in columns), strict=True)),
    }


def _chart_data(chart: Chart) -> str:
    """A chart as the page's script reads it: JSON, with null for the gaps."""
    series = [
        {
            "name": one.name,
            "x": [x if isinstance(x, str) else float(x) for x in one.x],
            **{key: _points(values) for key, values in (("y", one.y), ("low", one.low), ("high", one.high))},
        }
        for one in chart.series
    ]
    axes = {"xLabel": chart.x_label, "yLabel": chart.y_label, "logX": chart.log_x}
    return json.dumps({"kind": chart.kind, **axes, "series": series}, allow_nan=False)


def _points(values: Sequence[float | None] | None) -> list[float | None] | None:
    return None if values is None else [float(y) if is_value(y) else None for y in values]
