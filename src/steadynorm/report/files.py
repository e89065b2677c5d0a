"""Files that are written whole or not at all."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; it takes the place of `path` if the block ends well, else it is gone.

    Missing folders are made. A symbolic link keeps pointing where it did: its target is replaced. A device or a pipe
    cannot be replaced and is written to directly.

    Raises:
        OSError: the folder cannot be made or written to, or `path` is a folder.
    """
    target = Path(path).resolve()
    if target.is_dir():
        raise IsADirectoryError(f"{path} is a folder")
    if target.exists() and not target.is_file():
        yield target
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name[:40]}.{secrets.token_hex(8)}")
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, whole or not at all.

    Raises:
        OSError: the folder cannot be made or written to, the disk is full, or `path` is a folder.
    """
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()


def ensure_writable(path: str | Path) -> None:
    """Find out now, before long work, whether `path` can be written later. Leaves nothing behind.

    Permission bits do not tell (read-only mounts, network folders, the superuser), so a file is made and removed in
    the folder, or in the nearest one above it that exists.

    Raises:
        OSError: `path` could not be written.
    """
    target = Path(path).resolve()
    if target.is_dir():
        raise IsADirectoryError(f"{path} is a folder")
    if target.exists() and not target.is_file():
        return
    folder = next(parent for parent in target.parents if parent.exists())
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is not a folder")
    probe = folder / f".{secrets.token_hex(8)}"
    probe.touch(exist_ok=False)
    probe.unlink()
