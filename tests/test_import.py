"""Importing the package costs little more than importing torch: the heavy packages come when they are needed."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = ("numba", "llvmlite", "triton", "rich", "plotly", "jinja2", "typer", "sklearn", "scipy", "safetensors")


@pytest.fixture(scope="module")
def loaded() -> set[str]:
    """The top packages that a fresh interpreter has after `import steadynorm` and not after `import torch`."""
    code = (
        "import sys, json, torch; before = set(sys.modules); import steadynorm;"
        "print(json.dumps(sorted({n.partition('.')[0] for n in set(sys.modules) - before})))"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return set(json.loads(done.stdout))


@pytest.mark.parametrize("name", HEAVY)
def test_heavy_packages_are_not_imported(loaded, name):
    assert name not in loaded


def test_the_measurement_sees_something(loaded):
    assert "steadynorm" in loaded


@pytest.mark.slow
def test_importing_adds_less_than_50_ms_to_torch():
    code = "import time, torch; t = time.perf_counter(); import steadynorm; print(time.perf_counter() - t)"
    seconds = [float(subprocess.check_output([sys.executable, "-c", code])) for _ in range(5)]
    assert min(seconds) < 0.05
