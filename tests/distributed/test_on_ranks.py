"""Real processes, many checks a launch: see tests/processes.py."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import run_checks

ROOT = Path(__file__).parents[2]


CHECKS = (
    "distributed.equality",
    "distributed.behaviour",
    "distributed.frameworks",
    "convert.on_ranks",
    "training.loops_on_ranks",
    "training.microbatch_on_ranks",
    "training.statistics_on_ranks",
    "doctor.on_ranks",
    # Last: they leave fewer and fewer processes.
    "distributed.faults",
)


def test_on_ranks():
    """One launch of four processes for all of it: they take longer to start than most checks to run."""
    failures = run_checks(*(f"tests.{name}" for name in CHECKS))
    assert not failures, "\n".join(failures)


@pytest.mark.slow
def test_on_ranks_with_the_default_compiler():
    failures = run_checks("tests.distributed.inductor")
    assert not failures, "\n".join(failures)


@pytest.mark.slow
def test_the_example_runs_under_torchrun(tmp_path):
    page = (ROOT / "docs" / "sync.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n# train\.py\n(.*?)```", page, flags=re.DOTALL)
    (tmp_path / "train.py").write_text(example, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "the same on 2 ranks" in done.stdout
