"""The benchmark of a device goes through where there is none: its time on one is too dear for a slip in it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def rehearse(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[2])


@pytest.mark.slow
@pytest.mark.parametrize("what", ["launch", "step", "batch", "sample", "tune"])
def test_every_case_is_checked_and_told(what):
    done = rehearse("--rehearse", "--no-compile", what)
    assert done.returncode == 0, done.stderr
    first, *lines = done.stdout.splitlines()
    assert "a rehearsal" in first
    assert lines
    assert not any(word in line for line in lines for word in ("Error", "wrong", "refused"))


def test_what_is_not_there_is_said():
    done = rehearse("--rehearse", "everything")
    assert done.returncode == 2
    assert "got everything, expected some of launch, step, batch, sample, tune" in done.stderr
