"""The folder of a run: claimed by one process, and locked for as long as it trains."""

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

__all__ = ["LOCK", "claimed", "new_folder", "write_whole"]

_LOG = logging.getLogger(__name__)

LOCK = ".lock"
"""Name of the file whose lock a training process holds; the system releases it whatever ends the process."""


@contextlib.contextmanager
def claimed(folder: Path, *, new: bool) -> Iterator[None]:
    """Hold the lock of a run's folder within the block.

    Args:
        folder: the run folder, made if it is not there and ``new``.
        new: the folder must hold nothing.

    Raises:
        FileExistsError: another process trains in it, or it holds something although it is to be new; it is left as it
            is.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as parent, claimed(Path(parent) / "run", new=True):
    ...     try:
    ...         with claimed(Path(parent) / "run", new=False):
    ...             pass
    ...     except FileExistsError as error:
    ...         print(str(error).rpartition("run ")[2])
    is being trained by another process; wait for it, or stop it
    """
    taken = f"{folder} exists and is left as it is; choose another folder, or: danlu resume {folder}"
    if new and folder.exists() and (not folder.is_dir() or _contents(folder)):
        raise FileExistsError(taken)
    if new:
        folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise FileExistsError(f"{folder} is being trained by another process; wait for it, or stop it") from None
    except NotImplementedError:
        _LOG.warning("%s is on a file system without locks: start no second run in it", folder)
    try:
        if new and _contents(folder):
            raise FileExistsError(taken)
        yield
    finally:
        lock.release()


def new_folder(parent: Path, name: str) -> Path:
    """Make ``parent/name-1``, or the first of ``-2``, ``-3``, ... that nobody has; two processes never get the same."""
    parent.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        folder = parent / f"{name}-{number}"
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
        else:
            return folder


def write_whole(path: Path, text: str) -> None:
    """Write a file of text so that it is there whole, or as it was before."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _contents(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name != LOCK]
