"""What went wrong in the user's own code, in one sentence with the line where it did."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from steadynorm.errors import RecipeError, SteadynormError


@contextmanager
def attributed(piece: str) -> Iterator[None]:
    """Turn an exception of the user's code into a RecipeError of one sentence that names `piece` and the line."""
    try:
        yield
    except SteadynormError:
        raise  # already one sentence
    except Exception as error:
        raise RecipeError(f"{piece} raised {in_a_line(error)}.") from error


def in_a_line(error: BaseException) -> str:
    """`error` as ``KeyError: 'x' (recipe.py:12)``, with the deepest line of the user's own code."""
    text = (str(error).strip().splitlines() or [""])[0].rstrip(".")
    name = type(error).__name__
    if isinstance(error, SyntaxError) and error.filename:
        return f"{name}: {error.msg} ({_shown(error.filename)}:{error.lineno})"
    place = _place(error)
    return f"{name}{': ' if text else ''}{text}{f' ({place})' if place else ''}"


def _place(error: BaseException) -> str:
    place = ""
    trace = error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if is_users(file):
            place = f"{_shown(file)}:{trace.tb_lineno}"
        trace = trace.tb_next
    return place


def is_users(file: str) -> bool:
    """Whether `file` is neither an installed package, nor Python itself, nor steadynorm outside of its recipes."""
    ours = Path(__file__).parent
    path = Path(file)
    if file.startswith("<") or "site-packages" in path.parts or path.is_relative_to(Path(inspect.__file__).parent):
        return False
    return not path.is_relative_to(ours) or path.is_relative_to(ours / "recipes")


def _shown(file: str) -> str:
    path = Path(file)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else file
