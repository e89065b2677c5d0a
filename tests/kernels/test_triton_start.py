from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def rows():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.triton_started"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return {row["name"]: row for row in map(json.loads, ended.stdout.splitlines())}


def test_a_repeated_launch_is_the_first_one_again(rows):
    for row in rows.values():
        first, again = row["launches"]
        assert len(first) == len(again) > 10
        different = [place for place, (one, two) in enumerate(zip(first, again, strict=True)) if one != two]
        # Only the output is other memory: it follows the grid, x, the residual and the mask.
        assert set(different) <= {3 + 3}, row["name"]


def test_what_is_remembered_depends_on_all_that_the_compiled_kernel_depends_on(rows):
    expected = dict.fromkeys(rows, 1) | {"another momentum": 0}
    assert {name: row["remembered"] for name, row in rows.items()} == expected


def test_the_momentum_is_that_of_the_call(rows):
    (_, one), (_, two) = rows["ema"]["launches"], rows["another momentum"]["launches"]
    assert {"0.1", "0.2"} <= {*one, *two}
    assert "0.1" not in two
