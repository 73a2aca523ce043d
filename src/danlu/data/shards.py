"""Tokens on disk: memory-mapped arrays in a cache that is filled atomically.

A cache entry is a folder named by the hash of everything it was made from. It is built under another name and renamed
when complete, so that a reader never sees half of one, whatever happens to the writer.
"""

import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]


def cached(folder: Path, build: Callable[[Path], None], complete: Callable[[Path], bool]) -> Path:
    """Return ``folder``, built first if it is not there or not complete.

    ``build`` fills an empty folder, which is then renamed. Processes that want the same entry at once wait for the
    first where the system has file locks; elsewhere each builds and the last rename is dropped.

    Raises:
        OSError: the cache cannot be written (no permission, disk full); nothing half-made is left behind.
    """
    if complete(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.with_name(folder.name + ".lock")):
            if complete(folder):
                return folder
            prefix = f".{folder.name}-"
            if fcntl is not None:
                # With the lock held, what others left under this name was left by ones that were killed.
                for left in folder.parent.glob(prefix + "*"):
                    shutil.rmtree(left, ignore_errors=True)
            scratch = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
            try:
                build(scratch)
                if not complete(folder):
                    shutil.rmtree(folder, ignore_errors=True)
                try:
                    scratch.rename(folder)
                except OSError:
                    if not complete(folder):
                        raise
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    except OSError as problem:
        problem.add_note(f"The cache is {folder.parent}; set DANLU_CACHE to keep it elsewhere.")
        raise
    return folder


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file within the block, where the system has file locks; others wait."""
    with path.open("w") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file that is complete or absent, whatever happens to the process or the machine."""
    data = content.encode() if isinstance(content, str) else content
    scratch = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}")
    try:
        with scratch.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the smallest dtype that tokens are stored in.

    >>> token_dtype(65536), token_dtype(65537)
    (dtype('uint16'), dtype('uint32'))
    """
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


def write_tokens(path: Path, chunks: Iterable[NDArray[Any]], dtype: np.dtype[Any]) -> int:
    """Write arrays of tokens one after another; return how many tokens that made."""
    count = 0
    with path.open("wb") as file:
        for chunk in chunks:
            file.write(chunk.astype(dtype, copy=False).tobytes())
            count += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return count


def read_tokens(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Map a file of tokens into memory, read-only: pages are read when touched and shared between processes."""
    return np.memmap(path, dtype=dtype, mode="r")
