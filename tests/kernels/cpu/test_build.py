from __future__ import annotations

import os
import subprocess
import sys

import pytest

from steadynorm.kernels import numba_cpu
from steadynorm.kernels.cpu import build

pytestmark = pytest.mark.skipif(bool(numba_cpu.why_not()), reason=numba_cpu.why_not() or "runs")


class Maker:
    """Makes a kernel that does nothing, and counts how often it was asked to."""

    def __init__(self):
        self.asked = 0

    def __call__(self):
        self.asked += 1

        def kernel(arguments):
            pass

        return kernel


@pytest.fixture
def maker():
    return Maker()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    folder = tmp_path / "not there yet"
    monkeypatch.setenv("STEADYNORM_CACHE", str(folder))
    return folder


def test_compiled_once_and_kept(folder, maker):
    build.load("nothing", maker)(0)
    assert [path.suffix for path in folder.iterdir()] == [".o"]
    build.load("nothing", maker)(0)
    assert maker.asked == 1


def test_processes_that_begin_together_compile_once(folder, tmp_path):
    """As the ranks of one machine do: the first compiles, the others wait for what it has made."""
    made = tmp_path / "made"
    code = (
        "import sys, time, pathlib\n"
        "from steadynorm.kernels.cpu import build\n"
        "def make():\n"
        f"    with open({str(made)!r}, 'a') as file: file.write('x')\n"
        "    time.sleep(1)\n"
        "    def kernel(arguments):\n"
        "        pass\n"
        "    return kernel\n"
        "print('ready', flush=True)\n"
        "sys.stdin.readline()\n"
        "build.load('nothing', make)(0)\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    ranks = [subprocess.Popen([sys.executable, "-c", code], **pipes) for _ in range(3)]
    for rank in ranks:
        assert rank.stdout.readline() == "ready\n"
    for rank in ranks:
        rank.communicate("go\n", timeout=100)
    assert [rank.returncode for rank in ranks] == [0, 0, 0]
    assert made.read_text() == "x"
    assert [path.suffix for path in folder.iterdir()] == [".o"]


def test_a_file_cut_short_is_made_again(folder, maker):
    """In a process of its own: LLVM given half an object file ends the process."""
    cut = {}
    for kept in (0, 50, 99):
        build.load(f"nothing{kept}", maker)
        (path,) = set(folder.iterdir()) - set(cut)
        whole = path.read_bytes()
        cut[path] = whole[: kept * len(whole) // 100]
        path.write_bytes(cut[path])
    run_in_python(
        "from steadynorm.kernels.cpu import build\n"
        "def make():\n"
        "    def kernel(arguments):\n"
        "        pass\n"
        "    return kernel\n"
        "for kept in (0, 50, 99):\n"
        "    build.load(f'nothing{kept}', make)(0)\n"
    )
    assert all(path.read_bytes() != left for path, left in cut.items())
    assert set(folder.iterdir()) == set(cut)


def test_a_folder_that_cannot_be_written_costs_time_only(folder, maker):
    folder.write_text("a file stands where the folder should be")
    for _ in range(2):
        build.load("nothing", maker)(0)
    assert maker.asked == 2
    assert folder.is_file()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_costs_time_only(folder, maker):
    folder.mkdir()
    folder.chmod(0o500)
    build.load("nothing", maker)(0)
    assert not list(folder.iterdir())


def run_in_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_does_not_wait_for_threads_it_does_not_have():
    """A DataLoader's worker that normalizes: https://github.com/pytorch/pytorch/issues/17199."""
    run_in_python(
        "import os, signal, torch; torch.set_num_threads(2)\n"
        "from steadynorm.functional import normalize_batch\n"
        "x = torch.randn(8, 16, 64, 64); expected = normalize_batch(x)[0].numpy().tobytes()\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    signal.alarm(60)\n"
        "    os._exit(0 if normalize_batch(x)[0].numpy().tobytes() == expected else 1)\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
    )


def test_several_python_threads_at_once():
    run_in_python(
        "import torch; from concurrent.futures import ThreadPoolExecutor\n"
        "from steadynorm.functional import normalize_batch\n"
        "torch.set_num_threads(2)\n"
        "inputs = [torch.randn(8, 16, 40, 40 + i) for i in range(8)]\n"
        "alone = [normalize_batch(x, activation='relu')[0] for x in inputs]\n"
        "with ThreadPoolExecutor(4) as pool:\n"
        "    for _ in range(5):\n"
        "        together = list(pool.map(lambda x: normalize_batch(x, activation='relu')[0], inputs))\n"
        "        assert all(map(torch.equal, alone, together))\n"
    )


def test_no_threads_beyond_those_of_torch():
    """Our kernels run on torch's own pool: the process has as many threads after them as torch alone would make."""
    counted = run_in_python(
        "import torch, os; torch.set_num_threads(2)\n"
        "from steadynorm.functional import normalize_batch\n"
        "x = torch.randn(8, 16, 64, 64)\n"
        "count = lambda: len(os.listdir('/proc/self/task'))\n"
        "F = torch.nn.functional.batch_norm; F(x, None, None, training=True)\n"
        "before = count()\n"
        "for _ in range(5): normalize_batch(x)\n"
        "print(before, count())\n"
    )
    before, after = map(int, counted.split())
    assert after <= before
