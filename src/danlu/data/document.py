"""A text with its name, and how bytes become text."""

from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

__all__ = ["Document", "NotText", "decode", "examine", "lines"]

_HEAD = 2**16


class Document(NamedTuple):
    """One text and the name it is reported by (a path, or ``path:line`` in a file of many texts)."""

    name: str
    text: str


class NotText(ValueError):  # noqa: N818
    """A file holds no text: in a folder it is left out, named outright it is an error.

    Args:
        reason: one word or two, by which what is left out is counted.
        sentence: the same about one file, after its path.
    """

    def __init__(self, reason: str, sentence: str) -> None:
        super().__init__(sentence)
        self.reason = reason


def examine(data: bytes, *, whole: bool = True) -> None:
    """Raise :class:`NotText` unless ``data``, the ``whole`` content of a file or its beginning, is text.

    >>> examine(b"a, b")
    """
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise NotText("UTF-16", "is UTF-16; only UTF-8 is read")
    if (zero := data.find(b"\0")) >= 0:
        raise NotText("binary", f"is a binary file, not text (a zero byte at position {zero}); only UTF-8 is read")
    if whole and not data.strip():
        raise NotText("empty", "is empty")


def decode(data: bytes, where: str, errors: str) -> str:
    """Decode UTF-8 as it stands (line ends are kept), less a byte order mark.

    Args:
        data: the bytes.
        where: what the error calls them.
        errors: ``"strict"`` or ``"replace"``, which puts U+FFFD in the place of bytes that are not UTF-8.

    Raises:
        ValueError: the bytes are not UTF-8, and ``errors`` is ``"strict"``.
    """
    try:
        return data.decode("utf-8", errors).removeprefix("\ufeff")
    except UnicodeDecodeError as problem:
        raise ValueError(
            f"{where} is not UTF-8 at byte {problem.start} (0x{data[problem.start]:02x}); "
            "convert it, or set errors to 'replace'"
        ) from None


def lines(file: BinaryIO) -> Iterator[bytes]:
    """Yield the lines of a text without their ends, one at a time in memory.

    Raises:
        NotText: as :func:`examine`, by the first 64 KiB, or later at a zero byte.
    """
    first, size = list[bytes](), 0
    while size < _HEAD and (line := file.readline()):
        first.append(line)
        size += len(line)
    examine(b"".join(first), whole=size < _HEAD)
    for line in first:
        yield line.removesuffix(b"\n")
    for line in file:
        if b"\0" in line:
            examine(line)
        yield line.removesuffix(b"\n")
