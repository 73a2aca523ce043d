r"""Codebooks that are never stored: K normal codewords for every step of a codec, the same on every machine.

The random bits come from a counter-based generator (Philox), the normal deviates from a table of 2^16 quantiles held as
integers, and the norm of a codeword from an exact sum of integer squares. So no bit depends on a mathematics library, a
number of threads or a version. Every codeword has the norm :math:`\sqrt d`: then the codeword with the largest inner
product is the nearest.
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

# Quantiles are rounded to multiples of this, which is far coarser than the differences between mathematics libraries.
_UNIT = 2.0**-12
_PORTION = 2**18
_TABLE_SHA256 = "1ea009ce409dac97d6bd609266910f809c5fb912f78e16bd89145b08174d6fc5"


@functools.cache
def _quantiles() -> NDArray[np.int16]:
    """Return the 2^16 quantiles of the normal distribution at ``(i + 1/2) / 2^16``, as multiples of 2^-12."""
    normal = statistics.NormalDist()
    half = [round(normal.inv_cdf((index + 0.5) / 65536) / _UNIT) for index in range(32768)]
    table = np.array([*half, *(-value for value in reversed(half))], dtype="<i2")
    if hashlib.sha256(table.tobytes()).hexdigest() != _TABLE_SHA256:
        raise ArithmeticError(
            "the normal quantiles computed on this machine differ from the expected ones: "
            "codes would not decode elsewhere"
        )
    return table


@dataclass(frozen=True)
class Codebook:
    """K codewords of ``dim`` numbers for every step.

    Args:
        codewords: K, at least 1.
        dim: numbers in a codeword: channels x height x width, at most 2^24.
        seed: for all codebooks, 0 to 2^64 - 1.
        shared: use one codebook for all steps, for comparison: it needs thousands of codewords to be as good
            (kexue.fm 10711).

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
            ValueError: an index outside 0 to K - 1.
        """
        stream = 1 if self.shared else step
        if indices is None:
            return self._draw(stream, 0, self.codewords)
        wanted = indices.tolist()
        if not all(0 <= index < self.codewords for index in wanted):
            raise ValueError(f"indices must be from 0 to {self.codewords - 1}, got {min(wanted)} to {max(wanted)}")
        # A codeword drawn alone costs as much as ten drawn together.
        if 10 * len(wanted) > self.codewords:
            return self._draw(stream, 0, self.codewords)[indices.cpu()]
        return torch.cat([self._draw(stream, index, 1) for index in wanted])

    def start(self) -> Tensor:
        """Return the codeword ``(dim,)`` that is the initial noise."""
        return self._draw(0, 0, 1)[0]

    def _draw(self, stream: int, first: int, count: int) -> Tensor:
        # The counters of successive streams start 2^64 blocks apart and never overlap. A block is 16 numbers.
        block, within = divmod(first * self.dim, 16)
        bits = np.random.Philox(key=self.seed, counter=[block, stream, 0, 0])
        words = np.empty((count, self.dim), np.float32)
        # Portions fit into the cache; four codewords always take a whole number of 64-bit words.
        rows = 4 * max(1, _PORTION // (4 * self.dim))
        for part in (words[start : start + rows] for start in range(0, count, rows)):
            raw = bits.random_raw(-(-(within + part.size) // 4)).astype("<u8", copy=False).view("<u2")
            normal = _quantiles().take(raw[within : within + part.size]).reshape(part.shape).astype(np.float64)
            # Integers below 2^53: exact in any order of summation. Square root, division and multiplication are
            # correctly rounded on every machine; a codeword of zeros stays zero.
            squares = np.einsum("kd,kd->k", normal, normal)
            np.multiply(normal, np.sqrt(self.dim / np.maximum(squares, 1))[:, None], out=part, casting="same_kind")
        return torch.from_numpy(words)
