"""One file, or a range of its lines, as documents: decompressed on the way, and never whole in memory.

Only a file of plain text is one document and must fit.
"""

import contextlib
import gzip
import io
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from danlu.data.document import Document, NotText
from danlu.data.readers import BY_LINE, reader

__all__ = ["Part", "by_line", "read_part"]


class Part(NamedTuple):
    """What is read in one go.

    Attributes:
        path: the file.
        named: whether it was named outright: then it is an error that it holds no text.
        start, stop: of a file read by lines, those that begin in this range of bytes; None is its end.
    """

    path: Path
    named: bool = True
    start: int = 0
    stop: int | None = None


def by_line(path: Path) -> bool:
    """Whether a file can be read from any line on.

    >>> by_line(Path("a.jsonl")), by_line(Path("a.jsonl.gz")), by_line(Path("a.txt"))
    (True, False, False)
    """
    return path.suffix.lower() in BY_LINE


def read_part(part: Part, *, field: str, errors: str, skipped: Counter[str]) -> Iterator[Document]:
    """Yield the documents of a part.

    Args:
        part: what to read.
        field, errors, skipped: as for :class:`danlu.data.readers.Read`.

    Raises:
        ValueError: it is no text though named outright, or not what its suffix says.
        ImportError: a package that reads such files is not installed; the extra that has it is named.
    """
    begun = False
    try:
        with opened(part.path) as (name, file):
            if part.start or part.stop is not None:
                file = _lines_between(file, part)
            for document in reader(name)(part.path, file, field=field, errors=errors, skipped=skipped):
                begun = True
                yield document
    except NotText as problem:
        if part.start and problem.reason == "empty":
            return  # a line longer than a part left nothing for this one
        if begun or part.start or part.named:
            raise ValueError(f"{part.path} {problem}") from None
        skipped[problem.reason] += 1
    except ValueError as problem:
        if part.start:
            problem.add_note(f"lines are counted from byte {part.start:,} of the file")
        raise


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """Open a file, decompressed; give its name without the suffix of the compression, too."""
    suffix = path.suffix.lower()
    with path.open("rb") as raw:
        if suffix == ".gz":
            with _damage_named(path, EOFError, gzip.BadGzipFile, zlib.error), gzip.open(raw) as file:
                yield path.with_suffix(""), cast(BinaryIO, file)
        elif suffix == ".zst":
            try:
                import zstandard
            except ImportError:
                raise ImportError(f"{path} is read by the package zstandard: pip install 'danlu[files]'") from None
            with _damage_named(path, EOFError, zstandard.ZstdError):
                yield path.with_suffix(""), cast(BinaryIO, io.BufferedReader(_Zst(raw, zstandard), 2**17))
        else:
            yield path, raw


@contextlib.contextmanager
def _damage_named(path: Path, *errors: type[Exception]) -> Iterator[None]:
    try:
        yield
    except errors as problem:
        raise ValueError(f"{path} cannot be decompressed: {problem}") from None


def _lines_between(file: BinaryIO, part: Part) -> BinaryIO:
    """The lines of ``file`` that begin in the range of ``part``."""

    def line_at(byte: int) -> int:
        if byte == 0:
            return 0
        file.seek(byte - 1)
        file.readline()
        return file.tell()

    end = None if part.stop is None else line_at(part.stop)
    start = line_at(part.start)
    file.seek(start)
    return file if end is None else cast(BinaryIO, io.BufferedReader(_Until(file, end - start), 2**17))


class _Zst(io.RawIOBase):
    """The content of a .zst file, frame after frame; zstandard's own stream takes one that was cut for whole."""

    def __init__(self, file: BinaryIO, zstandard: Any) -> None:
        self._file, self._new = file, zstandard.ZstdDecompressor().decompressobj
        self._frame: Any = None
        self._packed = self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._ready:
            packed = self._packed or self._file.read(2**17)
            if not packed:
                if self._frame is not None:
                    raise EOFError("it ends in the middle")
                return 0
            self._frame = self._frame or self._new()
            self._ready, self._packed = self._frame.decompress(packed), b""
            if self._frame.eof:
                self._packed, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count


class _Until(io.RawIOBase):
    """The next ``left`` bytes of a file as a file."""

    def __init__(self, file: BinaryIO, left: int) -> None:
        self._file, self._left = file, left

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = self._file.read(min(len(buffer), max(self._left, 0)))
        buffer[: len(data)] = data
        self._left -= len(data)
        return len(data)
