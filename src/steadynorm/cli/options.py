"""Arguments and options that several commands take."""

from pathlib import Path
from typing import Annotated

import typer

from steadynorm.cli.output import PLAIN, Format
from steadynorm.cli.usage import format_among, whole

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A shipped recipe (digits), a .py file or a module.")]
FormatOption = Annotated[
    Format | None,
    typer.Option(
        "--format",
        parser=format_among(PLAIN),
        metavar="FORMAT",
        help="text, json or html; text unless --out ends in .json or .html.",
    ),
]
OutOption = Annotated[Path | None, typer.Option("--out", help="Write the result to this file.")]
TracebackOption = Annotated[bool, typer.Option("--traceback", help="Show the whole traceback of an error.")]
SeedOption = Annotated[int, typer.Option(parser=whole(0), metavar="NUMBER", help="Of the training and of the data.")]
BatchSizeOption = Annotated[int, typer.Option(parser=whole(1), metavar="NUMBER", help="Samples per batch.")]
WeightsOption = Annotated[Path | None, typer.Option(help="A .safetensors or .pt file for the recipe's model.")]


def words(text: str) -> tuple[str, ...]:
    """The words of a list with commas; spaces do not matter."""
    return tuple(word for word in (part.strip() for part in text.split(",")) if word)
