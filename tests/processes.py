"""Checks that run on several real processes over gloo, many in one launch, since a process takes seconds to start.

A check is a function of (rank, world) under `@on_ranks(2, 3)`. Every process goes through all the checks in
the same order, each with a process group of its own, so that a check that fails on one rank leaves the next alone.

    failures = run_checks("tests.distributed.equality")
    assert not failures, "\\n".join(failures)

As a program: `python -m tests.processes MODULE,MODULE FOLDER RANK`, one process of a launch.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[1]
GROUP_TIMEOUT = timedelta(seconds=60)
"""Of the process group of a check: how long ranks wait for one that does not come."""
LAUNCH_TIMEOUT = 500.0
"""Seconds for all the checks of a launch; a process that is still there shows where it is, and is ended."""

Check = Callable[[int, int], None]


def on_ranks(*worlds: int, dies: int | None = None) -> Callable[[Check], Check]:
    """Marks a check, to be run by each of these numbers of processes; rank `dies` must not come back from it."""

    def mark(check: Check) -> Check:
        check.worlds, check.dies = worlds, dies  # type: ignore[attr-defined]
        return check

    return mark


def checks_of(modules: str) -> Iterator[tuple[str, Check, int]]:
    """Name, function and number of processes, in the order in which they are run."""
    for module in modules.split(","):
        for name, check in list(vars(importlib.import_module(module)).items()):
            for world in getattr(check, "worlds", ()):
                yield f"{name}[{world}]", check, world


def run_checks(*modules: str) -> list[str]:
    """Run every check of `modules` on real processes; what failed, with the rank and its traceback."""
    listed = ",".join(modules)
    checks = list(checks_of(listed))
    assert checks, f"{listed} has no checks"
    with TemporaryDirectory() as folder:
        count = max(world for _, _, world in checks)
        processes = [_start(listed, folder, rank) for rank in range(count)]
        deadline = time.monotonic() + LAUNCH_TIMEOUT
        outputs = [_wait(process, deadline) for process in processes]
        results = [_results(Path(folder), rank) for rank in range(count)]
    failures = []
    for name, check, world in checks:
        for rank in range(world):
            problem = results[rank].get(name, "did not come back from it")
            if rank == check.dies:  # type: ignore[attr-defined]
                problem = None if name not in results[rank] else "was to die and did not"
            if problem:
                failures.append(f"{name}, rank {rank}: {problem}\n{outputs[rank][-4000:]}")
    return failures


def _start(modules: str, folder: str, rank: int) -> subprocess.Popen[str]:
    # The sources beside these tests, wherever an installed copy may point.
    sources = os.pathsep.join([str(ROOT), str(ROOT / "src")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": sources}
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "tests.processes", modules, folder, str(rank)],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def _wait(process: subprocess.Popen[str], deadline: float) -> str:
    try:
        return process.communicate(timeout=max(deadline - time.monotonic(), 1))[0]
    except subprocess.TimeoutExpired:
        process.kill()
        return process.communicate()[0]


def _results(folder: Path, rank: int) -> dict[str, str | None]:
    path = folder / f"{rank}.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return dict(json.loads(line) for line in lines)


def work(modules: str, folder: str, rank: int) -> None:
    """One process of a launch: its part of every check it is in."""
    faulthandler.dump_traceback_later(LAUNCH_TIMEOUT - 10)
    torch.set_num_threads(1)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    for name, check, world in checks_of(modules):
        if rank >= world:
            continue
        torch.manual_seed(0)
        store = dist.FileStore(str(Path(folder, f"{name}.store")), world)
        _wait_for_all(store, world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=GROUP_TIMEOUT)
        try:
            with warnings.catch_warnings():
                check(rank, world)
            problem = None
        except Exception:
            problem = traceback.format_exc()
        else:
            # A rank that leaves early closes connections that a slower one may still be making; a failed one is gone.
            with suppress(RuntimeError):
                dist.barrier()
        with Path(folder, f"{rank}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps([name, problem]) + "\n")
        dist.destroy_process_group()


def _wait_for_all(store: dist.FileStore, world: int) -> None:
    """Until every rank is here: some are in fewer checks, and early, and the timeout of a group is short."""
    count, deadline = store.add("here", 1), time.monotonic() + LAUNCH_TIMEOUT
    while count < world and time.monotonic() < deadline:
        time.sleep(0.01)
        count = store.add("here", 0)


if __name__ == "__main__":
    # Imported by its name, so that the marks are those that the checks have.
    importlib.import_module("tests.processes").work(sys.argv[1], sys.argv[2], int(sys.argv[3]))
