from __future__ import annotations

from tests.processes import run_checks


def test_statistics_on_several_processes():
    failures = run_checks("tests.training.statistics_on_ranks")
    assert not failures, "\n".join(failures)
