"""Every exception of steadynorm.

    SteadynormError
    ├── InputError (ValueError)         a tensor, option or file that cannot be used: the message says what to do
    │   ├── DegenerateStatisticsError   one value per statistic in training
    │   └── RecipeError                 a recipe that lacks a piece, or whose piece is wrong
    ├── NonFiniteStatisticsError        a batch whose statistics are not finite, under guard="raise"
    ├── DifferenceError (ArithmeticError) a changed model does not compute what it did, within the tolerance
    ├── DistributedError (RuntimeError) ranks that cannot be joined: one is gone, or came with something else
    └── BackendError (RuntimeError)     a backend that was asked for by name and cannot run here

A message has three parts: what was given, what was expected, what to do.
"""

import sys
from typing import Any


class SteadynormError(Exception):
    """The root of every error that steadynorm raises on purpose."""


class InputError(SteadynormError, ValueError):
    """A tensor, option or file that cannot be used."""


class DegenerateStatisticsError(InputError):
    """One value per statistic in training: its variance is zero and the output would not depend on the input."""


class RecipeError(InputError):
    """A recipe that lacks a piece, or whose piece does not do what its signature says."""


class NonFiniteStatisticsError(SteadynormError, ArithmeticError):
    """A batch whose statistics are not finite reached a layer with ``guard="raise"``."""


class DifferenceError(SteadynormError, ArithmeticError):
    """A changed model does not compute what the model did, within the tolerance: the message has the numbers."""


class DistributedError(SteadynormError, RuntimeError):
    """Ranks that cannot be joined: one is gone, did not come in time, or came with something else."""


class BackendError(SteadynormError, RuntimeError):
    """A backend that was asked for by name and cannot run here."""


def module_path(module: Any) -> str:
    """Dotted path of `module` inside the outermost model that is being called, for error messages.

    A module does not know its own name. The call stack does: every ``forward`` above us has its module as ``self``.
    Walked only when an error is about to be raised. Returns the class name where no model is found.
    """
    name = type(module).__name__
    frame = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        named_modules = getattr(owner, "named_modules", None)
        if owner is not module and callable(named_modules):
            for path, child in named_modules():
                if child is module and path:
                    name = path
        frame = frame.f_back  # type: ignore[assignment]
    return name
