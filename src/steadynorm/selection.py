"""Which layers of a model are meant, or which parameters: by name, by class, or by a function."""

import difflib
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from steadynorm.errors import InputError

T = TypeVar("T")
Selection = str | type | Iterable[str | type] | Callable[[str, Any], bool]
"""A pattern for dotted paths, a class, several of them, or a function of path and layer."""

# What wrappers put into the paths of the model inside: torch.compile, activation checkpointing, FSDP.
WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def select(named: Iterable[tuple[str, T]], only: Selection | None, argument: str, what: str) -> list[tuple[str, T]]:
    """Those of `named` that `only` means, each once, under its first name.

    A pattern means what it matches and all that is inside: ``"backbone"`` is ``backbone.layer1.bn1`` too. ``*`` and
    ``?`` stand for any characters, dots included. Names are read without what wrappers add to them.

    Args:
        named: dotted paths and what is there; a shared object may come several times, under each of its names.
        only: what is meant; None is all.
        argument, what: what `only` is called by the caller, and what it picks, for messages.

    Raises:
        InputError: a pattern or class that means none of them.
    """
    named = list(named)
    tests = [_test(one) for one in several(only)]
    chosen: dict[int, tuple[str, T]] = {}
    used = set[int]()
    for path, one in named:
        meant = [number for number, test in enumerate(tests) if test(path, one)]
        used.update(meant)
        if only is None or meant:
            chosen.setdefault(id(one), (path, one))
    for number, pattern in enumerate(several(only)):
        # A function may well mean nothing.
        if number not in used and isinstance(pattern, str | type):
            raise InputError(_about(pattern, [path for path, _ in named], argument, what))
    return list(chosen.values())


def several(only: Selection | None) -> list[Any]:
    """The patterns, classes and functions of a selection."""
    if only is None:
        return []
    return [only] if isinstance(only, str) or not isinstance(only, Iterable) else list(only)


def _test(one: Any) -> Callable[[str, Any], bool]:
    if isinstance(one, type):
        return lambda path, x: isinstance(x, one)
    if isinstance(one, str):
        return lambda path, x: any(fnmatchcase(reading, one) for reading in _readings(path))
    if callable(one):
        return lambda path, x: bool(one(path, x))
    raise InputError(f"expected a pattern for names, a class or a function of name and layer, got {one!r}.")


def _readings(path: str) -> set[str]:
    """The names by which a path can be meant: its own and those of what it is inside, with and without wrappers."""
    parts = [part for part in path.split(".") if part not in WRAPPERS]
    # DistributedDataParallel, DataParallel and AveragedModel hold their model as `module`.
    starts = (parts, parts[1:]) if parts[0] == "module" else (parts,)
    inside = {".".join(start[:end]) for start in starts for end in range(1, len(start) + 1)}
    return inside | {path}


def _about(pattern: Any, paths: list[str], argument: str, what: str) -> str:
    if isinstance(pattern, type):
        return f"{argument} got {pattern.__name__}, expected the class of a {what} of the model: it has none of it."
    near = difflib.get_close_matches(pattern, paths, n=3, cutoff=0.3) or paths[:3]
    advice = f"such as {', '.join(map(repr, near))}" if near else "of which it has none"
    return f"{argument} got {pattern!r}, expected the name of a {what} of the model, {advice}."
