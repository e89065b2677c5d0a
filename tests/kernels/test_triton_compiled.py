from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("triton")

# Mean, var, weight, bias, the two sums, and a count: numbers of a channel, not tensors.
NUMBERS = 7
ODD = "7x7"
"""Planes of 49 values, which no wide load fits."""


# Of the calls within a sample, those that are compiled on every push; the slow run has all.
SAMPLES = ("layer 1024, torch.bfloat16", "rms 16384, addend, torch.bfloat16", "group, channels last", "group, bfloat16")


def _compiled(module: str, *names: str) -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", f"tests.kernels.{module}", *names]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return [json.loads(line) for line in ended.stdout.splitlines()]


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return _compiled("triton_compiled")


@pytest.fixture(scope="module", params=["some", pytest.param("all", marks=pytest.mark.slow)])
def sample_rows(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return _compiled("compiled_samples", *(SAMPLES if request.param == "some" else ()))


def test_every_kernel_is_compiled(rows):
    kernels = {"moments", "merge_moments", "normalize", "forward", "sums", "merge_sums", "input_gradient", "backward"}
    assert {row["kernel"] for row in rows} >= kernels


def test_nothing_spills(rows):
    assert [row for row in rows if row["stack"] or row["local"]] == []


def test_loads_are_16_bytes_wide(rows):
    for row in rows:
        narrow = sum(count for size, count in row["loads"].items() if int(size) < 16)
        wide = row["loads"].get("16", 0)
        assert row["of"] == ODD or (wide and narrow <= NUMBERS), row


def test_blocks_share_a_multiprocessor(rows):
    """Two blocks of 8 warps have 128 registers for each thread: one loads while the other adds."""
    for row in rows:
        assert row["registers"] * row["warps"] * 32 * 2 <= 65536, row


def test_nothing_within_a_sample_spills(sample_rows):
    assert [row for row in sample_rows if row["stack"] or row["local"]] == []


def test_loads_within_a_sample_are_16_bytes_wide(sample_rows):
    for row in sample_rows:
        # Planes of 49 values are read for themselves backward.
        assert "16" in row["loads"] or row["of"] == "group 7x7", row


@pytest.mark.slow
def test_a_planted_spill_is_seen():
    """A tile of ten times the registers, in the place of the one that is used."""
    code = (
        "from steadynorm.kernels.gpu import launch; launch.TILE *= 16; "
        "import sys; sys.argv[1:] = ['112x112']; from tests.kernels.triton_compiled import main; main()"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert any(json.loads(line)["stack"] for line in ended.stdout.splitlines())
