"""Many arrays of tokens as one stream, without joining them; blocks of a shard are checked as they are read."""

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

__all__ = ["BLOCK", "Joined", "Shard", "checksums"]

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
    """A file of tokens, mapped into memory when it is first read, whose blocks are checked whenever they are.

    Args:
        path: the tokens.
        sums: the CRC-32 of each of its blocks, as :func:`checksums` makes them.
        tokens: how many there are.
        dtype: of a token.
    """

    def __init__(self, path: Path, sums: Path, tokens: int, dtype: np.dtype[Any]) -> None:
        self.path, self.sums, self.dtype = path, sums, dtype
        self._tokens = tokens
        self._mapped: tuple[NDArray[Any], NDArray[np.uint32]] | None = None

    def __len__(self) -> int:
        return self._tokens

    def __getitem__(self, where: slice, /) -> NDArray[Any]:
        """Return the tokens of a slice with a start and a stop.

        Raises:
            ValueError: they are not what was written.
        """
        if self._mapped is None:
            # Views as plain arrays: a memmap's own slices cost more than the reading.
            sums = np.memmap(self.sums, dtype="<u4", mode="r").view(np.ndarray)
            self._mapped = np.memmap(self.path, dtype=np.uint8, mode="r").view(np.ndarray), sums
        data, sums = self._mapped
        first, last = (int(at) * self.dtype.itemsize for at in (where.start, where.stop))
        for block in range(first // BLOCK, -(-last // BLOCK)):
            if zlib.crc32(data[block * BLOCK : (block + 1) * BLOCK].data) != sums[block]:
                raise ValueError(
                    f"{self.path} is damaged from byte {block * BLOCK} on: "
                    f"danlu tokenize --check {self.path.parent} finds all that is"
                )
        return data[first:last].view(self.dtype)


def checksums(data: bytes) -> NDArray[np.uint32]:
    """Return the CRC-32 of each block of a file that begins with ``data``, the last block being shorter.

    >>> checksums(b"123456789" + bytes(BLOCK)).shape
    (2,)
    """
    view = memoryview(data)
    return np.array([zlib.crc32(view[at : at + BLOCK]) for at in range(0, len(data), BLOCK)], dtype="<u4")
