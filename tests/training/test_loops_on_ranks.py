from __future__ import annotations

from tests.processes import run_checks


def test_loops_on_several_processes():
    failures = run_checks("tests.training.loops_on_ranks")
    assert not failures, "\n".join(failures)
