"""What was typed: values of options, and one sentence for whatever does not fit."""

import difflib
import math
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from steadynorm.cli.output import CLEAN, INTERRUPTED, MISUSE, Format, say

# The root of what typer raises about a command line. It exports only this one of its kind, and from 0.29 on carries a
# click of its own, so that there is no other name for it that holds for all versions.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]

# Names less alike than this are not what was meant: --bogus is not --out.
ALIKE = 0.7


def whole(least: int) -> Callable[[Any], int]:
    """A reader of whole numbers from `least` on."""

    def read(given: Any) -> int:
        text = str(given).strip()
        if not re.fullmatch(r"[+-]?\d+", text) or int(text) < least:
            raise typer.BadParameter(f"got {text!r}: expected a whole number from {least} on")
        return int(text)

    return read


def positive(given: Any) -> float:
    """A number above 0."""
    text = str(given).strip()
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        raise typer.BadParameter(f"got {text!r}: expected a number above 0, such as 0.05")
    return number


def format_among(formats: Sequence[Format]) -> Callable[[Any], Format]:
    """A reader of a format by its name."""

    def read(given: Any) -> Format:
        if str(given) not in formats:
            raise typer.BadParameter(f"got {str(given)!r}: expected {', '.join(formats[:-1])} or {formats[-1]}")
        return Format(given)

    return read


class Group(TyperGroup):
    """The commands; a command line that does not fit ends in one sentence instead of a box."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run a command line; without words it shows the help."""
        words = list(sys.argv[1:] if args is None else args) or ["--help"]
        if not standalone_mode:
            return super().main(words, prog_name, complete_var, False, windows_expand_args, **extra)
        try:
            code = super().main(words, prog_name, complete_var, False, windows_expand_args, **extra)
        except UsageError as error:
            say(sentence(error))
            code = MISUSE
        except typer.Abort:
            say("stopped.")
            code = INTERRUPTED
        sys.exit(code if isinstance(code, int) else CLEAN)


def sentence(error: Any) -> str:
    """What was given, what was expected and what to do, of an error of typer."""
    context: Any = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "steadynorm"
    command = path.rpartition(" ")[2]
    text = " ".join(error.format_message().split()).rstrip(".")
    if (parameter := getattr(error, "param", None)) is not None and error.message.startswith("got "):
        return f"{parameter.opts[0]} {error.message}."
    if parameter is not None and not error.message:
        expected = f"{parameter.help[0].lower()}{parameter.help[1:].rstrip('.')}"
        return f"{command} got no {parameter.metavar}: expected {expected}."
    if hasattr(error, "possibilities"):
        meant = _alike(error.option_name, [name for each in context.command.params for name in each.opts])
        return f"{command} has no option {error.option_name}{meant}: {path} --help lists them."
    if hasattr(error, "option_name"):
        given, expected = ("no value", "one") if "requires" in text else ("a value", "none")
        return f"{error.option_name} got {given}: expected {expected} after it; --help says what each option takes."
    if found := re.match(r"No such command '(.*?)'", text):
        commands = list(context.command.commands)
        return f"there is no command {found[1]!r}{_alike(found[1], commands)}: expected one of {', '.join(commands)}."
    if found := re.match(r"Got unexpected extra arguments?(?:\(s\))? \((.*)\)$", text):
        return (
            f"{command} got more than it takes, {found[1]!r}: a list has commas and no spaces (2,4,8), a name with "
            f"spaces needs quotes; {path} --help shows the rest."
        )
    return f"{text[0].lower()}{text[1:]}: {path} --help shows what is expected."


def _alike(name: str, names: Sequence[str]) -> str:
    found = difflib.get_close_matches(name, names, 1, ALIKE)
    return f" (did you mean {found[0]}?)" if found else ""
