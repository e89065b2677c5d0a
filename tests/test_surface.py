"""What the package shows is decided here: a name that appears or goes away is a change that people notice."""

from __future__ import annotations

import subprocess
import sys

import pytest

import steadynorm
from steadynorm import errors


def test_the_public_names_are_listed_in_order():
    listed = getattr(steadynorm, "__all__", None)
    assert listed is not None, "steadynorm lists its public names in __all__"
    assert list(listed) == sorted(listed)
    for name in listed:
        assert hasattr(steadynorm, name), f"{name} is listed and not there"


def test_nothing_else_shows():
    """In a fresh interpreter, where no test has imported a submodule. Submodules may show, other names may not."""
    code = (
        "import steadynorm as s; from types import ModuleType as M;"
        "print([n for n, v in vars(s).items() if n[0] != '_' and n not in s.__all__ and not isinstance(v, M)])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", sorted(name for name in vars(errors) if name.endswith("Error")))
def test_every_error_is_in_the_drawn_tree_and_in_the_family(name):
    kind = getattr(errors, name)
    assert issubclass(kind, errors.SteadynormError)
    assert name in errors.__doc__, f"{name} is not in the tree of errors.py"
