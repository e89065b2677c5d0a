"""Results as lines of JSON in a file that only grows: one row per finished cell, whatever happens to the process.

A row is one line and is appended with one write, which the system does not mix with the writes of another process. A
process that is killed can leave one torn line at the end: it is never read, and the next row starts on a new line.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from steadynorm.errors import InputError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

SCHEMA_VERSION = 1
# Every row starts like this, so that a torn one is told from somebody else's file.
OPENING = f'{{"schema_version": {SCHEMA_VERSION}'

# What makes two rows the same measurement.
KEY = ("recipe", "fingerprint", "parameters", "seed", "budget")

Row = dict[str, Any]


class Store:
    """The rows in one file.

    Raises:
        InputError: the file is something else, or cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows()  # refuse somebody else's file before anything is measured

    def rows(self) -> list[Row]:
        """The whole rows, in the order they were written."""
        return list(self._read())

    def latest(self) -> dict[str, Row]:
        """The last row of every measurement by its key."""
        return {key(row): row for row in self.rows()}

    def append(self, row: Row) -> Row:
        """Add a row; it is on the disk when this returns.

        Returns: the row as `rows` will give it.

        Raises:
            OSError: the disk is full or the file cannot be written.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"schema_version": SCHEMA_VERSION, **row}, allow_nan=False) + "\n"
        file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            _lock(file)  # until it is closed: another process must not be seen in the middle of its write
            data = (line if _ends_whole(file) else "\n" + line).encode()
            if os.write(file, data) != len(data):
                raise OSError(f"{self.path}: the row was written only in part, the disk may be full")
            os.fsync(file)
        finally:
            os.close(file)
        return cast(Row, json.loads(line))

    def _read(self) -> Iterator[Row]:
        try:
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            return
        except OSError as error:
            raise InputError(f"the results in {self.path} cannot be read: {error.strerror}.") from error
        for line in lines:
            if not line:
                continue
            if not (line.startswith(OPENING) or OPENING.startswith(line)):
                raise InputError(
                    f"{self.path} holds something else than results of this version of the lab: give another file."
                )
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                continue  # torn


def key(row: Row) -> str:
    """The same text for two rows if they measure the same."""
    return json.dumps([row[name] for name in KEY], sort_keys=True)


def _lock(file: int) -> None:
    """Wait until no other process is appending; where the system or the file system has no locks, do without."""
    if fcntl is not None:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)


def _ends_whole(file: int) -> bool:
    size = os.fstat(file).st_size
    return size == 0 or os.pread(file, 1, size - 1) == b"\n"
