"""Output to pipes: a training outlives the reader of its progress."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

__all__ = ["open_streams", "outlive_readers"]


def open_streams() -> None:
    """Give Python a stdout and stderr where the shell closed them (``>&-``): what is written there is dropped."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115


@contextmanager
def outlive_readers() -> Iterator[None]:
    """Drop what is written to stdout after the reader of a pipe has left (``danlu train | head -1``)."""
    before = sys.stdout
    sys.stdout = cast(TextIO, _Outliving(before))
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stdout = before


class _Outliving:
    """A text stream that goes on without its reader."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write, or drop."""
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._drop()
            return len(text)

    def flush(self) -> None:
        """Flush, or drop."""
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._drop()

    def _drop(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
