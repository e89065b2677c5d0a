"""Where recipes are found: the ones that ship, which run offline on real data, a file, or a module."""

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from steadynorm.blame import in_a_line
from steadynorm.errors import RecipeError

SHIPPED = ("digits", "digits_faulty")


def find(spec: str) -> ModuleType:
    """The module that `spec` names, newly executed if it is a file."""
    if spec in SHIPPED:
        try:
            return importlib.import_module(f"steadynorm.recipes.{spec}")
        except ModuleNotFoundError as error:
            raise RecipeError(
                f"the recipe {spec} needs {error.name}, the extra [recipes]: pip install scikit-learn."
            ) from error
    if spec.endswith(".py") or "/" in spec or "\\" in spec:
        return _import_file(Path(spec))
    return _import_dotted(spec)


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise RecipeError(f"there is no recipe file {path}: give a .py file, a dotted module or one of {_shipped()}.")
    if path.suffix != ".py":
        raise RecipeError(f"{path} is not a Python file: a recipe is a .py file that defines model() and batches().")
    _put_first(path.resolve().parent)
    name = f"steadynorm_recipe_{path.stem}"
    described = importlib.util.spec_from_file_location(name, path.resolve())
    assert described is not None  # always found for a .py file
    assert described.loader is not None
    module = importlib.util.module_from_spec(described)
    sys.modules[name] = module  # dataclasses and pickle look their module up by name
    try:
        with _importing(str(path)):
            described.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _import_dotted(spec: str) -> ModuleType:
    if not all(part.isidentifier() for part in spec.split(".")):
        raise RecipeError(f"'{spec}' is no recipe: give a .py file, a dotted module or one of {_shipped()}.")
    _put_first(Path.cwd())
    with _importing(spec):
        try:
            return importlib.import_module(spec)
        except ModuleNotFoundError as error:
            # Only the module itself: a package that the recipe lacks is reported with the line that imports it.
            if error.name is None or not (spec == error.name or spec.startswith(error.name + ".")):
                raise
            raise RecipeError(
                f"there is no recipe '{spec}': give a .py file, a dotted module or one of {_shipped()}."
            ) from error


def _put_first(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _shipped() -> str:
    return ", ".join(SHIPPED)


@contextmanager
def _importing(spec: str) -> Iterator[None]:
    try:
        yield
    except RecipeError:
        raise
    except (Exception, SystemExit) as error:
        raise RecipeError(f"the recipe {spec} cannot be imported: {in_a_line(error)}.") from error
