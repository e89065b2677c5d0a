"""Where cells run: one after the other in this process, or in local worker processes."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from queue import Queue
from typing import IO, Any

from steadynorm import machine
from steadynorm.errors import SteadynormError
from steadynorm.lab.axes import Cell
from steadynorm.lab.trials import Budget, trial
from steadynorm.recipe import Recipe

# Each worker holds a model and its data; more than this is for whoever knows that the memory is there.
MAX_DEFAULT_WORKERS = 4
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")


@dataclass(frozen=True)
class Outcome:
    """What became of a cell: its numbers, or the error that ended it."""

    numbers: dict[str, float]
    seconds: float
    error: str | None = None


def default_workers(cells: int) -> int:
    """As many workers as there are cores and cells, up to four."""
    return max(1, min(machine.core_count(), cells, MAX_DEFAULT_WORKERS))


def measure(recipe: Recipe, cell: Cell, budget: Budget) -> Outcome:
    """Run one cell; whatever it raises is its outcome."""
    started = time.perf_counter()
    try:
        numbers, error = trial(recipe, cell, budget), None
    except SteadynormError as raised:
        numbers, error = {}, str(raised)
    except Exception as raised:
        numbers, error = {}, f"{type(raised).__name__}: {raised}"
    return Outcome(numbers, time.perf_counter() - started, error)


def in_this_process(recipe: Recipe, cells: Sequence[Cell], budget: Budget) -> Iterator[tuple[Cell, Outcome]]:
    """Run the cells one after the other."""
    for cell in cells:
        yield cell, measure(recipe, cell, budget)


def in_processes(recipe: Recipe, cells: Sequence[Cell], budget: Budget, workers: int) -> Iterator[tuple[Cell, Outcome]]:
    """Run the cells in `workers` processes, which share the cores; outcomes come as they finish.

    A process that dies (out of memory, a crash in native code) costs the cell it was at, not the run.
    """
    waiting = iter(cells)
    lock = threading.Lock()
    finished: Queue[tuple[Cell, Outcome] | BaseException] = Queue()
    crew = [_Worker(recipe, budget, max(1, machine.core_count() // workers)) for _ in range(workers)]

    def keep_busy(worker: _Worker) -> None:
        try:
            while True:
                with lock:  # who stops the run sees either no cell taken or a process to kill
                    cell = next(waiting, None)
                    if cell is None:
                        return
                    worker.start()
                finished.put((cell, worker.measure(cell)))
        except BaseException as error:  # a thread's exception would be lost, and the reader wait for ever
            finished.put(error)
        finally:
            worker.close()

    threads = [threading.Thread(target=keep_busy, args=(worker,), daemon=True) for worker in crew]
    try:
        for thread in threads:
            thread.start()
        for _ in cells:
            result = finished.get()
            if isinstance(result, BaseException):
                raise result
            yield result
    finally:
        with lock:
            waiting = iter(())
        for worker in crew:
            worker.kill()  # its thread reads the end of the answers and closes it
        for thread in threads:
            if thread.ident is not None:  # else the system gave no thread
                thread.join()


class _Worker:
    """A process that measures one cell after the other; `start` makes another one when it has died."""

    def __init__(self, recipe: Recipe, budget: Budget, threads: int) -> None:
        self.task = {
            "spec": recipe.spec,
            "weights": recipe.weights,
            "fingerprint": recipe.fingerprint,
            "budget": budget.to_dict(),
            "threads": threads,
        }
        self.threads = threads
        self.process: subprocess.Popen[str] | None = None
        self.complaints: IO[str] | None = None

    def start(self) -> None:
        """Start the process unless it runs."""
        if self.process is not None:
            return
        limits = dict.fromkeys(THREAD_VARIABLES, str(self.threads))
        path = os.pathsep.join(filter(None, sys.path))
        # One file for each process: what the last one said is not said of the next.
        self.complaints = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  closed by _end()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "steadynorm.lab.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.complaints,
            text=True,
            env={**os.environ, **limits, "PYTHONPATH": path},
        )

    def measure(self, cell: Cell) -> Outcome:
        """The outcome of a cell; a process that dies over it is the outcome too."""
        started = time.perf_counter()
        assert self.process is not None
        answer = self._ask(self.process, {**self.task, "cell": asdict(cell)})
        if answer.endswith("\n"):
            return Outcome(**json.loads(answer))
        error = f"the worker process died ({self._end()})"
        return Outcome({}, time.perf_counter() - started, error)

    def kill(self) -> None:
        """End the process now; whoever waits for its answer gets none."""
        if (process := self.process) is not None:
            process.kill()

    def close(self) -> None:
        """End the process and close what leads to it."""
        self.kill()
        self._end()

    def _ask(self, process: subprocess.Popen[str], message: dict[str, Any]) -> str:
        """The line that the process answers, or less if it dies before."""
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(message) + "\n")
            process.stdin.flush()
            return process.stdout.readline()
        except BrokenPipeError:
            return ""

    def _end(self) -> str:
        """Wait for the process to end, close its pipes and its file, and say how it ended."""
        process, self.process = self.process, None
        complaints, self.complaints = self.complaints, None
        with contextlib.ExitStack() as stack:
            if complaints is not None:
                stack.enter_context(complaints)
            if process is None or complaints is None:
                return ""
            for pipe in (process.stdin, process.stdout):
                stack.callback(_close, pipe)
            code = process.wait()
            complaints.seek(0)
            lines = complaints.read().strip().splitlines()
            return f"signal {-code}" if code < 0 else f"exit code {code}{f': {lines[-1]}' if lines else ''}"


def _close(pipe: IO[str] | None) -> None:
    if pipe is not None:
        with contextlib.suppress(BrokenPipeError):  # what was left to send to a dead process
            pipe.close()
