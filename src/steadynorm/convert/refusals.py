"""Refusals of layers, gathered, so that one error names all of them."""

from collections.abc import Callable
from typing import Any, TypeVar

from steadynorm.errors import InputError

T = TypeVar("T")


class Refusals:
    """What cannot be converted and why, by path; `what` is being done."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.found: list[tuple[str, str]] = []

    def or_take(self, path: str, function: Callable[..., T], *arguments: Any) -> T | None:
        """The result of `function`, or None where it refuses the layer at `path`, which is written down."""
        try:
            return function(*arguments)
        except InputError as refusal:
            self.found.append((path, str(refusal)))
            return None

    def raise_any(self) -> None:
        """Raise InputError with all that were written down, if any were."""
        if not self.found:
            return
        lines = [f"{path or 'the model'} {reason.rstrip('.')}." for path, reason in self.found]
        which = "one layer" if len(lines) == 1 else f"{len(lines)} layers"
        about = f"{self.what} cannot take {which}, and nothing was changed; leave= leaves a layer out."
        raise InputError("\n".join([about, *lines]))
