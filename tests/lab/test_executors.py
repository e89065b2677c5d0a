import os
import subprocess
import sys
import threading
import time

import pytest
import torch

from steadynorm import machine
from steadynorm.lab import executors
from steadynorm.lab.axes import Cell, grid
from steadynorm.lab.executors import in_processes, in_this_process
from steadynorm.lab.trials import Budget
from steadynorm.recipe import load
from tests.lab.toy import TOY

BUDGET = Budget(steps=5, lr=0.1)
CELLS = grid(norms=["batch", "group"], batch_sizes=[8, 16], seeds=1)

# Prints, fails at batch size 8 and takes its process down at batch size 16.
TROUBLE = """
import os
print("a recipe may print")
whole = batches

def batches(split, batch_size, seed):
    print("even here")
    if batch_size == 8:
        raise ValueError("eight")
    if batch_size == 16:
        os.abort()
    return whole(split, batch_size, seed)

def metrics(output, batch):
    return {"threads": float(torch.get_num_threads()), "process": float(os.getpid())}
"""


@pytest.fixture
def written(tmp_path):
    def write(text):
        (tmp_path / "toy.py").write_text(text)
        return load(str(tmp_path / "toy.py"))

    return write


def test_processes_and_this_process_agree(written):
    toy = written(TOY)
    here = {cell: outcome.numbers for cell, outcome in in_this_process(toy, CELLS, BUDGET)}
    there = {cell: outcome.numbers for cell, outcome in in_processes(toy, CELLS, BUDGET, 2)}
    assert set(here) == set(there) == set(CELLS)
    assert torch.get_num_threads() == 1, "the workers have threads of their own"
    for cell, numbers in here.items():
        assert there[cell] == pytest.approx(numbers, rel=1e-4)


def test_errors_and_dead_workers_cost_their_cell_only(written):
    toy = written(TOY + TROUBLE)
    cells = [Cell("batch", size, seed) for seed in range(2) for size in (4, 8, 16)]
    outcomes = dict(in_processes(toy, cells, BUDGET, 2))
    processes = set()
    for cell in cells:
        outcome = outcomes[cell]
        assert outcome.seconds > 0
        if cell.batch_size == 4:
            assert outcome.error is None
            assert outcome.numbers["threads"] == max(1, machine.core_count() // 2)
            processes.add(outcome.numbers["process"])
        elif cell.batch_size == 8:
            assert "batches() of the recipe raised ValueError: eight" in outcome.error
        else:
            assert outcome.error == "the worker process died (signal 6)"
    assert os.getpid() not in processes


def test_an_error_in_this_process_costs_its_cell_only(written):
    toy = written(TOY + TROUBLE)
    outcomes = dict(in_this_process(toy, [Cell("batch", 8, 0), Cell("batch", 4, 0)], BUDGET))
    assert [outcome.error is None for outcome in outcomes.values()] == [False, True]


def test_a_recipe_that_changed_meanwhile_is_noticed(written, tmp_path):
    toy = written(TOY)
    (tmp_path / "toy.py").write_text(TOY + "\n# changed\n")
    ((_, outcome),) = in_processes(toy, CELLS[:1], BUDGET, 1)
    assert "was changed while the lab was running" in outcome.error


def test_workers_end_with_the_reader(written):
    running = in_processes(written(TOY), CELLS, BUDGET, 1)
    next(running)
    children = _children()
    assert children
    running.close()
    assert not children & _children()


@pytest.mark.slow
def test_what_a_worker_said_is_not_said_of_the_next_one(written):
    dies = """
whole = batches

def batches(split, batch_size, seed):
    import os, sys
    if batch_size == 8:
        print("out of memory", file=sys.stderr, flush=True)
    os._exit(3)
"""
    outcomes = list(in_processes(written(TOY + dies), [Cell("batch", size, 0) for size in (8, 4)], BUDGET, 1))
    assert [outcome.error for _, outcome in outcomes] == [
        "the worker process died (exit code 3: out of memory)",
        "the worker process died (exit code 3)",
    ]


@pytest.mark.slow
def test_a_run_that_stops_while_a_worker_starts_does_not_wait_for_its_cell(written, monkeypatch):
    toy = written(
        TOY + "\nwhole = batches\ndef batches(split, size, seed):\n    import time\n"
        "    time.sleep(60 if size == 16 else 0)\n    return whole(split, size, seed)\n"
    )
    first, go = threading.Event(), threading.Event()
    start = executors._Worker.start

    def second_waits(self):
        if first.is_set():
            assert go.wait(30)
        first.set()
        return start(self)

    monkeypatch.setattr(executors._Worker, "start", second_waits)
    running = in_processes(toy, [Cell("batch", size, 0) for size in (8, 16)], BUDGET, 2)
    next(running)
    threading.Timer(0.5, go.set).start()
    started = time.monotonic()
    running.close()
    assert time.monotonic() - started < 20


LEAVES_NOTHING_OPEN = """
import gc, sys, threading
from steadynorm.lab.axes import grid
from steadynorm.lab.executors import in_processes
from steadynorm.lab.trials import Budget
from steadynorm.recipe import load

cells = grid(norms=["batch"], batch_sizes=[8, 16], seeds=1)

def run(which, cells=cells, workers=1):
    return in_processes(load(sys.argv[1] + which), cells, Budget(steps=5, lr=0.1), workers)

stopped = run("/toy.py")
next(stopped)
stopped.close()
assert all("died" in outcome.error for _, outcome in run("/dies.py", cells[:1]))

class OnlyOnce(threading.Thread):
    count = 0
    def start(self):
        OnlyOnce.count += 1
        if OnlyOnce.count == 2:
            raise RuntimeError("can't start new thread")
        super().start()

threading.Thread = OnlyOnce
try:
    list(run("/toy.py", workers=2))
except RuntimeError as error:
    print(error)
gc.collect()
"""


@pytest.mark.slow
def test_no_pipe_or_file_stays_open_however_a_run_ends(written, tmp_path):
    written(TOY)
    dies = "\nimport os, sys\nif 'steadynorm.lab.worker' in sys.orig_argv:\n    os.abort()\n"
    (tmp_path / "dies.py").write_text(TOY + dies)
    command = [sys.executable, "-W", "error", "-c", LEAVES_NOTHING_OPEN, tmp_path]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.stdout == "can't start new thread\n"
    assert "ResourceWarning" not in ended.stderr
    assert ended.returncode == 0, ended.stderr


def _children():
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        own = set(file.read().split())
    for task in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{task}/children") as file:
            own |= set(file.read().split())
    return own
