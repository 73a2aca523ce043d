r"""Codebooks that are never stored: K normal codewords for every step of a codec, the same on every machine.

The bits come from a counter (Philox), the deviates from a table of 2^16 normal quantiles held as integers, and a
codeword's length from an exact sum of integer squares; so no bit depends on a mathematics library, a number of threads
or a version. Every codeword has the norm :math:`\sqrt d`: then the one with the largest inner product is the nearest.
"""

import functools
import hashlib
import statistics
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from danlu._validate import integer

__all__ = ["Codebook"]

# Quantiles are rounded to multiples of this, far coarser than what libraries of logarithms disagree about.
_UNIT = 2.0**-12
_PORTION = 2**18
_TABLE_SHA256 = "1ea009ce409dac97d6bd609266910f809c5fb912f78e16bd89145b08174d6fc5"


@functools.cache
def _quantiles() -> NDArray[np.int16]:
    """The 2^16 quantiles of the normal distribution at ``(i + 1/2) / 2^16``, in units of 2^-12."""
    normal = statistics.NormalDist()
    half = [round(normal.inv_cdf((index + 0.5) / 65536) / _UNIT) for index in range(32768)]
    table = np.array([*half, *(-value for value in reversed(half))], dtype="<i2")
    if hashlib.sha256(table.tobytes()).hexdigest() != _TABLE_SHA256:
        raise ArithmeticError(
            "this machine's logarithms give other codewords than every other's: codes are no use here"
        )
    return table


@dataclass(frozen=True)
class Codebook:
    """K codewords of ``dim`` numbers for every step.

    Args:
        codewords: K, at least 1.
        dim: numbers in a codeword: channels x height x width, at most 2^24.
        seed: of the whole family of codebooks, 0 to 2^64 - 1.
        shared: one and the same codebook for all steps, which needs thousands of codewords to be as good (kexue.fm
            10711); to compare with.

    >>> words = Codebook(4, 6)(3)
    >>> words.shape, words.norm(dim=1).round(decimals=4)
    (torch.Size([4, 6]), tensor([2.4495, 2.4495, 2.4495, 2.4495]))
    """

    codewords: int
    dim: int
    seed: int = 0
    shared: bool = False

    def __post_init__(self) -> None:
        integer("codewords", self.codewords)
        integer("dim", self.dim, high=2**24)
        integer("seed", self.seed, low=0, high=2**64 - 1)

    def __call__(self, step: int, indices: Tensor | None = None) -> Tensor:
        """Return the codewords of a step, float32 ``(K, dim)`` on the CPU, or those of ``indices``, ``(n, dim)``.

        Raises:
            ValueError: an index is not from 0 to K - 1.
        """
        stream = 1 if self.shared else step
        if indices is None:
            return self._draw(stream, 0, self.codewords)
        wanted = indices.tolist()
        if not all(0 <= index < self.codewords for index in wanted):
            raise ValueError(f"indices must be from 0 to {self.codewords - 1}, got {min(wanted)} to {max(wanted)}")
        # A codeword drawn alone costs as much as ten among others.
        if 10 * len(wanted) > self.codewords:
            return self._draw(stream, 0, self.codewords)[indices.cpu()]
        return torch.cat([self._draw(stream, index, 1) for index in wanted])

    def start(self) -> Tensor:
        """Return the one codeword, ``(dim,)``, that everything begins with."""
        return self._draw(0, 0, 1)[0]

    def _draw(self, stream: int, first: int, count: int) -> Tensor:
        # The counter of a stream starts 2^64 blocks behind that of the one before it: they never meet. A block is 16
        # numbers.
        block, within = divmod(first * self.dim, 16)
        bits = np.random.Philox(key=self.seed, counter=[block, stream, 0, 0])
        words = np.empty((count, self.dim), np.float32)
        # Portions stay in the cache; fours of codewords take whole numbers of 64 bits.
        rows = 4 * max(1, _PORTION // (4 * self.dim))
        for part in (words[start : start + rows] for start in range(0, count, rows)):
            raw = bits.random_raw(-(-(within + part.size) // 4)).astype("<u8", copy=False).view("<u2")
            whole = _quantiles().take(raw[within : within + part.size]).reshape(part.shape).astype(np.float64)
            # Integers below 2^53, and so exact in any order of summation. A root, a quotient and a product are rounded
            # correctly everywhere; a word of zeros stays one.
            squares = np.einsum("kd,kd->k", whole, whole)
            np.multiply(whole, np.sqrt(self.dim / np.maximum(squares, 1))[:, None], out=part, casting="same_kind")
        return torch.from_numpy(words)
