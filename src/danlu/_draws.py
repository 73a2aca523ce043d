"""Random numbers without a generator: what is drawn for an example is a function of the example's number.

A generator's state depends on everything that was drawn before, and so on how a batch is divided among processes and
micro-batches. Here every row has a key of 64 bits, and its numbers are a hash of key, name of the draw and place in the
row: the same rows draw the same, whoever draws them and beside whatever else. The trainer numbers the examples of a run
(``batch["position"]``); an objective used alone takes keys from torch's generator by :func:`fresh`.

The 32 random bits of a place are those of :func:`mixed32`, as in :mod:`danlu.optim.rounding`. Bits, integers and
uniform numbers are the same on every device; normal numbers are as far as its logarithm, sine and cosine are.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["bernoulli", "derived", "fresh", "integers", "mixed32", "mixed64", "normal", "start", "uniform"]

_IN_CACHE = 1 << 15
"""Numbers that are made together on a CPU: half a dozen passes over them stay in a core's cache."""

#: The multipliers of a mixing function of 32 bits whose output bits flip with probability 1/2 +- 1e-3 when any bit of
#: the input does (Wellons, "Prospecting for hash functions", 2018), the second as a signed number.
_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B - 2**32


def mixed32(x: Tensor, between: Any = 0) -> Tensor:
    """Scatter 32 bits, int32: one to one for every ``between``, a second key."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * _FIRST
    x = x ^ between
    x = (x ^ ((x >> 15) & 0x1FFFF)) * _SECOND
    return x ^ ((x >> 16) & 0xFFFF)


def mixed64(x: Tensor) -> Tensor:
    """Scatter 64 bits: the finaliser of SplitMix64 (Steele, Lea and Flood 2014), in int64, which wraps around."""
    x = (x ^ shifted(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ shifted(x, 27)) * -0x6B2FB644ECCEEE15
    return x ^ shifted(x, 31)


def shifted(x: Tensor, by: int) -> Tensor:
    """Shift int64 words as if they had no sign."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def start(name: str, seed: int) -> int:
    """Return the number of the first example of the stream ``name`` of a run with ``seed``, below 2^62.

    Examples are numbered from there on, one by one. The streams of two seeds begin at places that have nothing to do
    with each other; that two of a billion examples each overlap has a probability of 4e-10.

    >>> start("train", 0) == start("train", 0), start("train", 0) == start("train", 1)
    (True, False)
    """
    x = _word(f"{name} {seed}")
    for multiplier in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB):
        x = (x ^ x >> 30) * multiplier % 2**64
    return (x ^ x >> 31) >> 2


def fresh(rows: int, *, device: torch.device | None = None, generator: torch.Generator | None = None) -> Tensor:
    """Return keys for ``rows`` rows that follow one another, int64 ``(rows,)``, by one number of torch's generator.

    >>> generator = torch.Generator().manual_seed(7)
    >>> fresh(3, generator=generator).diff().tolist()
    [1, 1]
    """
    first = torch.randint(1 << 62, (1,), device=device, generator=generator)
    return first + torch.arange(rows, device=device)


def derived(keys: Tensor, name: str) -> Tensor:
    """Return other keys for the same rows, int64 like ``keys``: for a second draw by a function that takes keys.

    >>> keys = torch.arange(3)
    >>> bool((derived(keys, "one") == derived(keys, "other")).any())
    False
    """
    word = _word(name)
    return mixed64(mixed64(keys) + (word - 2**64 if word >= 2**63 else word))


def uniform(keys: Tensor, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Draw from the uniform distribution on [0, 1), ``(rows, *shape)``.

    Args:
        keys: one for each row, int64 ``(rows,)``.
        name: of the draw: draws of different names are independent.
        shape: of a row.
        dtype: float64 has all of its 53 bits; other dtypes are drawn with float32's 24 and rounded.

    >>> uniform(torch.tensor([5, 6]), "doctest", 2)
    tensor([[0.0288, 0.9524],
            [0.4753, 0.0394]])
    """
    wide = dtype == torch.float64
    found = _rows(keys, name, math.prod(shape), 1, torch.float64 if wide else torch.float32, _unit64 if wide else _unit)
    return found.view(-1, *shape).to(dtype)


def normal(keys: Tensor, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Draw from the standard normal distribution, ``(rows, *shape)``; arguments as :func:`uniform`.

    By Box and Muller's method: a row's first half are the cosines and its second half the sines. The distribution is
    exact to 6.6 standard deviations, the largest number; in float64 to 8.5.

    >>> normal(torch.tensor([5, 6]), "doctest", 2)
    tensor([[ 2.2835, -0.7045],
            [ 0.3086,  0.0781]])
    """
    wide = dtype == torch.float64
    size = math.prod(shape)
    found = _rows(keys, name, -(-size // 2), 2, torch.float64 if wide else torch.float32, _pair64 if wide else _pair)
    return found.flatten(1)[:, :size].reshape(-1, *shape).to(dtype)


def integers(keys: Tensor, name: str, high: int, *shape: int) -> Tensor:
    """Draw integers from 0 to ``high - 1``, int64 ``(rows, *shape)``; ``high`` at most 2^31, others as :func:`uniform`.

    The probabilities differ from ``1 / high`` by less than 2^-32.

    >>> integers(torch.tensor([5, 6]), "doctest", 10, 4).shape
    torch.Size([2, 4])
    """
    words = _rows(keys, name, math.prod(shape), 1, torch.int32, lambda place, key: (_bits(place, key),))
    return (((words.long() & 0xFFFFFFFF) * high) >> 32).view(-1, *shape)


def bernoulli(keys: Tensor, name: str, share: float, *shape: int) -> Tensor:
    """Draw booleans ``(rows, *shape)`` that are True with probability ``share``; arguments as :func:`uniform`.

    >>> bernoulli(torch.tensor([5, 6]), "doctest", 1.0).tolist()
    [True, True]
    """
    return uniform(keys, name, *shape) < share


def _word(name: str) -> int:
    """Return 64 bits that depend on every letter (FNV-1a), by arithmetic that a compiler can follow."""
    word = 0xCBF29CE484222325
    for letter in name:
        word = (word ^ ord(letter)) * 0x100000001B3 % 2**64
    return word


def _rows(keys: Tensor, name: str, count: int, parts: int, dtype: torch.dtype, made: Any) -> Tensor:
    """Return what ``made`` makes of ``count`` places of each row, ``(rows, parts, count)``; on a CPU block by block."""
    key = derived(keys, name)
    # The truncation to 32 bits keeps the lower half.
    halves = key.to(torch.int32)[:, None], shifted(key, 32).to(torch.int32)[:, None]
    places = torch.arange(count, dtype=torch.int32, device=keys.device)
    if torch.compiler.is_compiling() or keys.device.type != "cpu" or len(keys) * count <= _IN_CACHE:
        return torch.stack(made(places, halves), 1)
    found = torch.empty(len(keys), parts, count, dtype=dtype, device=keys.device)
    for rows, columns in _blocks(len(keys), count):
        for part, values in enumerate(made(places[columns], (halves[0][rows], halves[1][rows]))):
            found[rows, part, columns] = values
    return found


def _blocks(rows: int, count: int) -> Iterator[tuple[slice, slice]]:
    """Cut ``(rows, count)`` into blocks that stay in the cache: whole rows, or parts of one."""
    tall, wide = max(1, _IN_CACHE // count), min(count, _IN_CACHE)
    for row in range(0, rows, tall):
        for column in range(0, count, wide):
            yield slice(row, row + tall), slice(column, column + wide)


def _bits(places: Tensor, key: tuple[Tensor, Tensor]) -> Tensor:
    """Return the 32 random bits of places, int32 ``(rows, places)``: ``mixed32`` in place, two passes' memory."""
    x = places ^ key[0]
    between = (x >> 16).bitwise_and_(0xFFFF)
    x.bitwise_xor_(between).mul_(_FIRST).bitwise_xor_(key[1])
    torch.bitwise_right_shift(x, 15, out=between).bitwise_and_(0x1FFFF)
    x.bitwise_xor_(between).mul_(_SECOND)
    torch.bitwise_right_shift(x, 16, out=between).bitwise_and_(0xFFFF)
    return x.bitwise_xor_(between)


def _unit(places: Tensor, key: tuple[Tensor, Tensor]) -> tuple[Tensor]:
    return ((_bits(places, key) >> 8).bitwise_and_(0xFFFFFF).float().mul_(2.0**-24),)


def _unit64(places: Tensor, key: tuple[Tensor, Tensor]) -> tuple[Tensor]:
    high, low = _bits(2 * places, key), _bits(2 * places + 1, key)
    high, low = (high >> 5).bitwise_and_(0x7FFFFFF).double(), (low >> 6).bitwise_and_(0x3FFFFFF).double()
    return (high.mul_(2.0**26).add_(low).mul_(2.0**-53),)


def _pair(places: Tensor, key: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    # 31 bits for the length, never zero: small numbers keep their digits in float32, and with them the tails.
    length = (_bits(2 * places, key) & 0x7FFFFFFF).float().add_(0.5).mul_(2.0**-31).log_().mul_(-2).sqrt_()
    angle = _bits(2 * places + 1, key).float().mul_(math.pi * 2.0**-31)
    return angle.cos().mul_(length), angle.sin_().mul_(length)


def _pair64(places: Tensor, key: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    (above,), (turn,) = _unit64(2 * places, key), _unit64(2 * places + 1, key)
    length = above.add_(2.0**-54).log_().mul_(-2).sqrt_()
    angle = turn.mul_(2 * math.pi)
    return angle.cos().mul_(length), angle.sin_().mul_(length)
