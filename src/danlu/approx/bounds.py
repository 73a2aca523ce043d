"""The Poisson tail against the geometric tail: an inequality from the analysis of hashing, used as a capacity bound.

For p in [0, 1) and L = log(1 / (1 - p)), ``sum_{i<=j} p^i <= sum_{i<=j} L^i / i!``. Times ``1 - p = e^-L`` it says
that a Poisson variable of rate L exceeds j with probability at most ``p^(j+1) = (1 - e^-L)^(j+1)``: the probability
that a bin overflows is bounded by a power of the probability that it is occupied. The bound is sharp up to a few items
per bin and loose beyond.
"""

import math
from fractions import Fraction

import numpy as np
from numpy.typing import ArrayLike, NDArray

from danlu import _validate

__all__ = ["capacity", "geometric_gap", "poisson_tail", "poisson_tail_bound", "series_coefficients"]

Array = NDArray[np.float64]


def poisson_tail(j: int, rate: ArrayLike) -> Array:
    """Return ``P(X > j)`` for X Poisson of ``rate``: the regularised incomplete gamma function ``P(j + 1, rate)``.

    Accurate to about 1e-13 relative in the small tail, where one minus the distribution function has no digits left.

    Args:
        j: the count to be exceeded, 0 or above.
        rate: mean of X, 0 or above, any shape.

    Raises:
        ValueError: if j or a rate is negative or not finite.

    >>> bool(np.isclose(poisson_tail(20, 0.5), 5.79e-27, rtol=1e-3, atol=0))
    True
    """
    _validate.integer("j", j, low=0)
    x = _array("rate", rate, math.inf)
    small = x < j + 1
    tail = np.empty_like(x)
    tail[small] = _upper_series(j, x[small])
    tail[~small] = 1 - _lower_sum(j, x[~small])
    return tail


def poisson_tail_bound(j: int, rate: ArrayLike) -> Array:
    """Return ``(1 - e^-rate)^(j+1)``, which is never below ``poisson_tail(j, rate)`` and equal to it at j = 0.

    Raises:
        ValueError: if j or a rate is negative or not finite.

    >>> bool(poisson_tail(3, 0.7) < poisson_tail_bound(3, 0.7))
    True
    """
    _validate.integer("j", j, low=0)
    return np.asarray((-np.expm1(-_array("rate", rate, math.inf))) ** (j + 1))


def geometric_gap(p: ArrayLike, j: int) -> Array:
    """Return ``sum_{i<=j} L^i / i! - sum_{i<=j} p^i`` with ``L = log(1 / (1 - p))``, without cancellation.

    Args:
        p: in [0, 1), any shape.
        j: last index of both sums, 0 or above.

    Raises:
        ValueError: if p is outside [0, 1) or j is negative.

    >>> round(float(geometric_gap(0.5, 1)), 6)
    0.193147
    """
    _validate.integer("j", j, low=0)
    p = _array("p", p, 1.0)
    if j == 0:
        return np.zeros_like(p)
    rate = -np.log1p(-p)
    ceiling = p ** (j + 1)
    tail = poisson_tail(j, rate)
    # Near p = 1 both tails tend to 1, and the sums, which grow apart, are the accurate form.
    i = np.arange(j + 1)
    factorials = np.array([math.lgamma(k + 1) for k in range(j + 1)])
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.where(i == 0, 0.0, i * np.log(rate)[..., None]) - factorials
        sums = np.sum(np.exp(logs) - p[..., None] ** i, axis=-1)
    return np.where(tail < 0.9 * ceiling, (ceiling - tail) / (1 - p), np.where(p > 0, sums, 0.0))


def series_coefficients(j: int, count: int) -> tuple[Fraction, ...]:
    """Return the first ``count`` Taylor coefficients in p of ``sum_{i<=j} L^i / i!``, exactly.

    The k-th is the probability that a random permutation of k items has at most j cycles: 1 up to k = j, below 1 after.

    Raises:
        ValueError: if j is negative or count is not positive.

    >>> [str(c) for c in series_coefficients(2, 7)]
    ['1', '1', '1', '5/6', '17/24', '37/60', '197/360']
    """
    _validate.integer("j", j, low=0)
    _validate.integer("count", count)
    cycles = [1]  # unsigned Stirling numbers of the first kind: permutations of k items by their number of cycles
    found = []
    for k in range(count):
        found.append(Fraction(sum(cycles[: j + 1]), math.factorial(k)))
        cycles = [k * stay + new for stay, new in zip([*cycles, 0], [0, *cycles], strict=True)]
    return tuple(found)


def capacity(rate: float, overflow: float) -> int:
    """Return the smallest capacity that, by the bound, overflows with probability at most ``overflow``.

    It is the number of items that a bin can hold if it receives a Poisson number of items of mean ``rate``, such as
    tokens per expert or keys per bucket.

    Raises:
        ValueError: if rate is not positive or overflow is outside (0, 1).

    >>> capacity(1.0, 0.01), bool(poisson_tail(capacity(1.0, 0.01), 1.0) <= 0.01)
    (10, True)
    """
    _validate.positive("rate", rate)
    _validate.number("overflow", overflow, low=0, high=1, low_open=True, high_open=True)
    occupied = math.log(-math.expm1(-rate))
    if occupied == 0:
        raise ValueError(f"rate must leave a bin empty with a probability that float64 resolves, got {rate}")
    return max(math.ceil(math.log(overflow) / occupied) - 1, 0)


def _upper_series(j: int, x: Array) -> Array:
    """Sum ``e^-x x^(j+1) / (j+1)! (1 + x / (j+2) + ...)`` for x < j + 1, where its terms decrease."""
    term = np.ones_like(x)
    total = term.copy()
    k = j + 2
    while np.any(term > 1e-17 * total):
        term = term * x / k
        total = total + term
        k += 1
    with np.errstate(divide="ignore"):
        return np.asarray(np.exp((j + 1) * np.log(x) - x - math.lgamma(j + 2)) * total)


def _lower_sum(j: int, x: Array) -> Array:
    """Sum ``e^-x x^i / i!`` for i from j down to 0, for x >= j + 1, where its terms decrease that way."""
    term = np.ones_like(x)
    total = term.copy()
    for i in range(j, 0, -1):
        term = term * i / x
        total = total + term
        if np.all(term < 1e-17 * total):
            break
    return np.asarray(np.exp(j * np.log(x) - x - math.lgamma(j + 1)) * total)


def _array(name: str, value: ArrayLike, end: float) -> Array:
    x = np.asarray(value, dtype=np.float64)
    if not np.all((x >= 0) & (x < end)):
        bad = x[~((x >= 0) & (x < end))].flat[0]
        raise ValueError(f"{name} must be in [0, {end:g}), got {bad}")
    return x
