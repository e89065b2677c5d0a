import pytest

from tests.processes import run_checks


@pytest.mark.slow
def test_on_ranks():
    failures = run_checks("tests.doctor.on_ranks")
    assert not failures, "\n".join(failures)
