"""Results as plain data, and what draws them.

The renderers are imported by name, since each needs an extra: ``from steadynorm.report import terminal`` (rich) and
``from steadynorm.report import html`` (jinja2, and plotly where there are charts).
"""

from steadynorm.report.document import (
    Block,
    Card,
    Cell,
    Chart,
    Code,
    Document,
    Entry,
    Heading,
    Paragraph,
    Parts,
    Series,
    Status,
    Table,
)
from steadynorm.report.files import ensure_writable, write_text

__all__ = [
    "Block",
    "Card",
    "Cell",
    "Chart",
    "Code",
    "Document",
    "Entry",
    "Heading",
    "Paragraph",
    "Parts",
    "Series",
    "Status",
    "Table",
    "ensure_writable",
    "write_text",
]
