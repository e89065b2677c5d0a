"""Where in the user's code a module is made: the line that a finding points at."""

import ast
import inspect
import sys
import textwrap
from pathlib import Path

from torch import nn

from steadynorm.blame import is_users
from steadynorm.doctor.finding import Location
from steadynorm.recipe import Recipe

ADDERS = ("add_module", "register_module")


def locate(model: nn.Module, path: str) -> Location | None:
    """The line of the user's code that makes the module at `path`; None if it is made in a library.

    That is the class of the module where the user wrote it, else the assignment in the innermost class of the user's
    that it is part of, else the line of that class.
    """
    modules = [model]
    for name in path.split(".") if path else ():
        child = getattr(modules[-1], name, None)
        if not isinstance(child, nn.Module):
            break
        modules.append(child)
    if own := _class_line(type(modules[-1])):
        return own
    for parent, name in reversed(list(zip(modules, path.split("."), strict=False))):
        if line := _assignment(type(parent), name) or _class_line(type(parent)):
            return line
    return None


def locate_piece(recipe: Recipe, piece: str) -> Location | None:
    """The line of a recipe on which its function `piece` begins."""
    file = recipe.spec
    if not file.endswith(".py"):
        module = sys.modules.get(file) or sys.modules.get(f"steadynorm.recipes.{file}")
        file = getattr(module, "__file__", None) or ""
    try:
        tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return None
    found = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == piece]
    return Location(str(Path(file).resolve()), found[0].lineno if found else 1)


def _class_line(cls: type) -> Location | None:
    found = _source(cls)
    return found and found[0]


def _source(cls: type) -> tuple[Location, str] | None:
    """Where a class of the user's begins, and its text."""
    try:
        file = inspect.getsourcefile(cls)
        if file is None or not is_users(file):
            return None
        lines, start = inspect.getsourcelines(cls)
    except (OSError, TypeError):  # built in, made by exec, or typed at a prompt
        return None
    return Location(str(Path(file).resolve()), start), "".join(lines)


def _assignment(cls: type, name: str) -> Location | None:
    """The line on which a class of the user's, or one that it inherits from, makes its child `name`."""
    for each in cls.__mro__:
        found = _source(each)
        if found is None:
            continue
        place, text = found
        try:
            tree = ast.parse(textwrap.dedent(text))
        except SyntaxError:  # a class inside something whose indentation is not that of its own
            continue
        for node in ast.walk(tree):
            if _makes(node, name):
                return Location(place.file, place.line + node.lineno - 1)  # type: ignore[attr-defined]
    return None


def _makes(node: ast.AST, name: str) -> bool:
    if isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return any(isinstance(target, ast.Attribute) and target.attr == name for target in targets)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ADDERS:
        first = node.args[0] if node.args else None
        return isinstance(first, ast.Constant) and first.value == name
    return False


def shown_file(place: Location) -> str:
    """The file of a place as people and annotations name it: from the current folder, with forward slashes."""
    path = Path(place.file)
    here = Path.cwd()
    return (path.relative_to(here) if path.is_relative_to(here) else path).as_posix()


def line_of(place: Location) -> str:
    """A place as ``model.py:12``."""
    return f"{shown_file(place)}:{place.line}"
