"""How a command ends: its result in the format that was asked for, or one sentence and an exit code."""

import json
import math
import sys
import traceback as tracebacks
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from enum import StrEnum
from io import StringIO
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from steadynorm.blame import in_a_line
from steadynorm.errors import InputError, SteadynormError
from steadynorm.report import Document, ensure_writable, terminal, write_text

CLEAN, FINDINGS, MISUSE, FAULT, INTERRUPTED = 0, 1, 2, 3, 130
TEXT_FILE_WIDTH = 100


class Format(StrEnum):
    """How a result is written."""

    TEXT = "text"
    JSON = "json"
    HTML = "html"
    SARIF = "sarif"
    GITHUB = "github"


# What every command can write; the others are for those that find something in somebody's code.
PLAIN = (Format.TEXT, Format.JSON, Format.HTML)
SUFFIXES = {".html": Format.HTML, ".htm": Format.HTML, ".json": Format.JSON, ".sarif": Format.SARIF}


@dataclass(frozen=True)
class Output:
    """Where a result goes, and as what; `path` is None for standard output."""

    format: Format
    path: Path | None

    def write(self, documents: Sequence[Document], data: Mapping[str, Any], title: str) -> None:
        """Write the result: to standard output, or to the file, whose path is then what standard output gets."""
        if self.path is None:
            self._print(documents, data)
            return
        self.write_text(self._text(documents, data, title))

    def write_text(self, text: str) -> None:
        """Write a result that is text already."""
        if self.path is None:
            typer.echo(text, nl=False)
            return
        with writing(self.path):
            write_text(self.path, text)
        typer.echo(self.path.resolve())

    def _text(self, documents: Sequence[Document], data: Mapping[str, Any], title: str) -> str:
        if self.format is Format.HTML:
            from steadynorm.report import html

            return html.render(documents, title)
        return as_json(data) if self.format is Format.JSON else _as_text(documents)

    def _print(self, documents: Sequence[Document], data: Mapping[str, Any]) -> None:
        if self.format is Format.JSON:
            typer.echo(as_json(data), nl=False)
            return
        console = terminal.console()
        for document in documents:
            terminal.show(document, console)


def output(chosen: Format | None, path: Path | None, name: str, extra: Sequence[Format] = ()) -> Output:
    """The output that the options ask for, found to be possible before any long work starts.

    Args:
        chosen: the format; None takes it from the suffix of `path`, else text.
        path: the file; None is standard output, for HTML a file in the folder ``reports``.
        name: of that file.
        extra: formats beside the plain ones that the command can write.

    Raises:
        InputError: the file cannot be written, or not in this format by this command.
    """
    taken = chosen or (SUFFIXES.get(path.suffix.lower()) if path else None) or Format.TEXT
    if taken not in (*PLAIN, *extra):
        raise InputError(f"this command cannot write {taken}: expected {', '.join(PLAIN[:-1])} or {PLAIN[-1]}.")
    if taken is Format.HTML:
        from steadynorm.report import html  # noqa: F401  a missing extra is said now and not after the work

        path = path or Path("reports") / f"{name}.html"
    if path is not None:
        with writing(path):
            ensure_writable(path)
    return Output(taken, path)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say which file could not be written, and why."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}; give another place.") from error


def as_json(data: Mapping[str, Any]) -> str:
    """Indented JSON that every parser reads: NaN and infinities, which JSON lacks, become "nan", "inf" and "-inf"."""
    return json.dumps(_finite(data), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, list | tuple) else value


def _as_text(documents: Sequence[Document]) -> str:
    stream = StringIO()
    console = Console(file=stream, width=TEXT_FILE_WIDTH, highlight=False)
    for document in documents:
        terminal.show(document, console)
    return "\n".join(line.rstrip() for line in stream.getvalue().strip().splitlines()) + "\n"


@contextmanager
def working(title: str, unit: str = "") -> Iterator[terminal.Advance]:
    """A progress bar while the user's code runs; what that code prints is no result and goes to standard error."""
    with redirect_stdout(sys.stderr), terminal.progress(title, terminal.console(stderr=True), unit) as advance:
        yield advance


def say(text: str) -> None:
    """Say something to the person at the terminal, beside the result."""
    typer.echo(f"steadynorm: {text}", err=True)


@contextmanager
def worded(show_traceback: bool, when_stopped: str = "Nothing was written.") -> Iterator[None]:
    """Turn whatever stops a command into one sentence and an exit code.

    Args:
        show_traceback: show the whole traceback before the sentence.
        when_stopped: what Ctrl-C leaves behind, and how to go on.
    """
    try:
        yield
    except KeyboardInterrupt:
        say(f"stopped. {when_stopped}")
        raise typer.Exit(INTERRUPTED) from None
    except (typer.Exit, BrokenPipeError):
        raise
    except (SteadynormError, ImportError) as error:
        _stop(str(error), MISUSE, show_traceback)
    except OSError as error:
        _stop(f"{error.filename or 'the system'}: {error.strerror or error}.", MISUSE, show_traceback)
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):
            raise  # whoever read our output has had enough
        # Passing it on would end with the exit code of the recipe, and 0 means clean.
        _stop(f"the recipe called exit({error.code!r}): a recipe only defines its functions.", MISUSE, show_traceback)
    except Exception as error:
        hint = "" if show_traceback else " Run it again with --traceback to see where."
        _stop(f"unexpected {in_a_line(error)}.{hint}", FAULT, show_traceback)


def _stop(sentence: str, code: int, show_traceback: bool) -> None:
    if show_traceback:
        tracebacks.print_exc(file=sys.stderr)
    say(sentence)
    raise typer.Exit(code)
