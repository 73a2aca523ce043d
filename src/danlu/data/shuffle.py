"""Choices made by hashes alone, without a random generator: the side of a split, and the order of a pass.

The order is a permutation computed one index at a time, so that a shuffled pass can be entered anywhere.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 6


def keys(*what: int | str) -> NDArray[np.uint64]:
    """Return 8 unsigned 64-bit words that depend on every argument, the same on every machine and release.

    >>> keys(0, 1)[:1] == keys(0, 1)[:1], keys(0, 1)[:1] == keys(1, 0)[:1]
    (array([ True]), array([False]))
    """
    digest = hashlib.blake2b("/".join(map(str, what)).encode(), digest_size=64).digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def fraction(digest: bytes) -> float:
    """Read a hash as a number in [0, 1).

    >>> fraction(bytes([128, 0, 0, 0, 0, 0, 0, 0, 7]))
    0.5
    """
    return int.from_bytes(digest[:8], "big") / 2**64


def permute(index: NDArray[np.int64], size: int, key: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Apply the permutation of ``range(size)`` that ``key`` selects to every element of ``index``.

    A balanced Feistel network (Luby and Rackoff 1988) permutes the smallest ``4**k >= size``; elements that land
    outside ``range(size)`` are sent through it again until they do not ("cycle walking", Black and Rogaway 2002,
    section 3), which keeps it one to one and takes fewer than 4 passes on average. No table is built: a billion
    windows cost as much as ten.

    Args:
        index: integers in ``range(size)``, any shape.
        size: number of elements permuted.
        key: from :func:`keys`.

    >>> sorted(permute(np.arange(5), 5, keys(0)).tolist())
    [0, 1, 2, 3, 4]
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    out = index.astype(np.uint64)
    todo = np.ones(out.shape, dtype=bool)
    while todo.any():
        value = out[todo]
        left, right = value >> half, value & mask
        for round_key in key[:_ROUNDS]:
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        out[todo] = (left << half) | right
        todo = out >= np.uint64(size)
    return out.astype(np.int64)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scatter 64 bits: the finaliser of SplitMix64 (Steele, Lea and Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
