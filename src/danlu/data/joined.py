"""Many arrays of tokens as one stream, without joining them; blocks of a shard are checked as they are read."""

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

__all__ = ["BLOCK", "Joined", "Shard", "checksums", "sums_of"]

BLOCK = 4096
"""Bytes under one checksum: what the system reads at once anyway."""


class Tokens(Protocol):
    """What a stream is joined of: an array, or a :class:`Shard`."""

    def __len__(self) -> int:
        """Return the number of tokens."""

    def __getitem__(self, where: slice, /) -> NDArray[Any]:
        """Return the tokens of a slice with a start and a stop."""


class Joined:
    """Arrays one after another as a ring of tokens.

    Args:
        parts: arrays or shards of one dtype, none of them empty.

    >>> ring = Joined([np.array([1, 2, 3]), np.array([4, 5])])
    >>> len(ring), ring.rows(np.array([1, 4]), 3).tolist()
    (5, [[2, 3, 4], [5, 1, 2]])
    """

    def __init__(self, parts: Sequence[Tokens]) -> None:
        self.parts = list(parts)
        self._ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
        self._array = parts[0] if len(parts) == 1 and isinstance(parts[0], np.ndarray) else None

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def rows(self, starts: NDArray[np.int64], width: int) -> NDArray[Any]:
        """Return ``width`` tokens from each of ``starts`` (in ``range(len)``) on, ``(len(starts), width)``."""
        if self._array is not None and starts.max() + width <= len(self._array):
            return sliding_window_view(self._array, width)[starts]
        return np.stack([self._row(int(start), width) for start in starts])

    def _row(self, start: int, width: int) -> NDArray[Any]:
        pieces = []
        while width > 0:
            number = int(np.searchsorted(self._ends, start, side="right"))
            first = int(self._ends[number - 1]) if number else 0
            stop = min(start + width, int(self._ends[number]))
            pieces.append(self.parts[number][start - first : stop - first])
            width -= stop - start
            start = stop % len(self)
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


class Shard:
    """A file of tokens whose blocks are checked whenever they are read.

    It is read, not mapped: a run reads a little of every shard in no order, for which a page fault costs more than a
    call, and mappings would add up.

    Args:
        path: the tokens; the CRC-32 of each of its blocks, as :func:`checksums` makes them, are beside it in ``.crc``.
        tokens: how many there are.
        dtype: of a token.
    """

    def __init__(self, path: str, tokens: int, dtype: np.dtype[Any]) -> None:
        self.path, self.dtype = path, dtype
        self._tokens = tokens

    def __len__(self) -> int:
        return self._tokens

    def __getitem__(self, where: slice, /) -> NDArray[Any]:
        """Return the tokens of a slice with a start and a stop.

        Raises:
            ValueError: they are not what was written.
        """
        first, last = (int(at) * self.dtype.itemsize for at in (where.start, where.stop))
        begin, end = first // BLOCK, -(-last // BLOCK)
        data = _read(self.path, begin * BLOCK, end * BLOCK)
        sums = np.frombuffer(_read(sums_of(self.path), 4 * begin, 4 * end), dtype="<u4")
        found = checksums(data)
        if len(found) != len(sums) or (found != sums).any():
            raise ValueError(
                f"{self.path} is damaged between bytes {begin * BLOCK} and {end * BLOCK}: "
                f"danlu tokenize --check {Path(self.path).parent} finds all that is"
            )
        return np.frombuffer(data[first - begin * BLOCK : last - begin * BLOCK], dtype=self.dtype)


def sums_of(path: str) -> str:
    """Return the file with the checksums of a shard.

    >>> sums_of("train-00000.bin")
    'train-00000.crc'
    """
    return path.removesuffix(".bin") + ".crc"


def _read(path: str, start: int, stop: int) -> bytes:
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        return file.read(stop - start) or b""


def checksums(data: bytes) -> NDArray[np.uint32]:
    """Return the CRC-32 of each block of a file that begins with ``data``, the last block being shorter.

    >>> checksums(b"123456789" + bytes(BLOCK)).shape
    (2,)
    """
    view = memoryview(data)
    return np.array([zlib.crc32(view[at : at + BLOCK]) for at in range(0, len(data), BLOCK)], dtype="<u4")
