"""Micro-batches and ranks together are one batch: two real processes over gloo."""

from __future__ import annotations

from tests.processes import run_checks


def test_on_ranks():
    failures = run_checks("tests.training.microbatch_on_ranks")
    assert not failures, "\n".join(failures)
