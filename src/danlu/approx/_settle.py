"""The exchange on a growing set of points: slower than the one on intervals, but it settles every continuous function.

The set begins with a dense grid and gains the exact peaks of every polynomial tried. On a finite set the levelled error
can only rise, and it never passes that of the best polynomial: it is a lower bound at every moment. The largest error
of a polynomial tried is an upper bound. The two meet where the function is continuous; where they do not meet in the
rounds allowed, both are handed back.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.polynomial.chebyshev import chebval, chebvander
from numpy.typing import NDArray

from danlu.approx._exchange import EPS, alternating, rounding
from danlu.approx._search import climb, grid

Array = NDArray[np.float64]

_ROUNDS = 80
_PATIENCE = 12  # rounds in which neither bound moves
_TOLERANCE = 1e-10
_APART = 1e-9  # angle between points of a reference: closer ones fix a slope by the rounding of f alone


@dataclass(frozen=True)
class Settled:
    """Chebyshev coefficients in t of the best q found, and the largest error that no q is below."""

    coefficients: Array
    bound: float


def settle(
    sample: Callable[[Array], tuple[Array, Array, Array]],
    to_t: Callable[[Array], Array],
    interval: tuple[float, float],
    n: int,
) -> Settled:
    """Minimise ``max |w (f - m q(t(x)))|`` over polynomials q of degree n; ``sample(x)`` gives ``(f, m, w)``."""
    x = grid(*interval)
    f, m, w = (np.broadcast_to(part, x.shape) for part in sample(x))
    ideal = np.pi * np.arange(n + 2) / (n + 1)
    reference = np.unique(np.searchsorted(_angle(to_t(x)), ideal[1:-1]))
    reference = np.concatenate([[0], reference, [x.size - 1]])
    best, best_error, bound, quiet = np.zeros(n + 1), math.inf, 0.0, 0
    for _ in range(_ROUNDS):
        level, q = _levelled(to_t(x[reference]), f[reference], m[reference], w[reference])
        if q is None:
            break

        def error(at: Array, q: NDArray[Any] = q) -> Array:
            y, factor, weight = sample(at)
            return np.asarray(weight * (y - factor * chebval(to_t(at), q)))

        values = w * (f - m * chebval(to_t(x), q))
        if not np.isfinite(values).all():
            break
        places, heights = climb(error, x, values, n + 2)
        largest = float(np.abs(heights).max())
        quiet = 0 if largest < best_error * (1 - 1e-12) or level > bound * (1 + 1e-12) else quiet + 1
        bound = max(bound, level)
        if largest < best_error:
            best, best_error = q, largest
        noise = rounding(EPS, n + 2) * float(w.max()) * (float(np.abs(f).max()) + largest)
        if best_error - bound <= max(_TOLERANCE * best_error, noise) or quiet > _PATIENCE:
            break
        x, first, back = np.unique(np.concatenate([x, places]), return_index=True, return_inverse=True)
        more = sample(places)
        f, m, w = (
            np.concatenate([part, np.broadcast_to(new, places.shape)])[first]
            for part, new in zip((f, m, w), more, strict=True)
        )
        values = np.concatenate([values, heights])[first]
        reference, new = back[reference], back[back.size - places.size :]
        known = np.union1d(reference, new)
        chosen = _spread(values[known], _angle(to_t(x[known])), ideal, level)
        top = int(new[np.abs(heights).argmax()])
        reference = _swapped(reference, top, values) if chosen is None else known[chosen]
    return Settled(best, bound)


def _swapped(reference: NDArray[np.intp], top: int, values: Array) -> NDArray[np.intp]:
    """Put one point into a reference in the place of a neighbour of its sign, which raises the level."""
    positive = (np.arange(reference.size) % 2 == 0) == (values[reference[0]] >= 0)
    rising = values[top] >= 0
    i = int(np.searchsorted(reference, top))
    if 0 < i < reference.size:
        i = i if positive[i] == rising else i - 1
    elif i == 0 and positive[0] != rising:
        return np.concatenate([[top], reference[:-1]])
    elif i == reference.size and positive[-1] != rising:
        return np.concatenate([reference[1:], [top]])
    swapped = reference.copy()
    swapped[min(i, reference.size - 1)] = top
    return swapped


def _levelled(t: Array, f: Array, m: Array, w: Array) -> tuple[float, NDArray[Any] | None]:
    """Return the level of the error on a reference and the q that has it (None where the points do not fix one)."""
    signs = (-1.0) ** np.arange(t.size)
    distance = 2 * (t[:, None] - t)
    np.fill_diagonal(distance, 1)
    with np.errstate(all="ignore"):
        weights = 1 / np.prod(distance, axis=1)
        level = abs((weights @ (f / m)) / (weights @ (signs / (w * m))))
    try:
        q = np.linalg.solve(np.column_stack([m[:, None] * chebvander(t, t.size - 2), signs / w]), f)[:-1]
    except np.linalg.LinAlgError:
        return 0.0, None
    return (float(level), q) if math.isfinite(level) and np.isfinite(q).all() else (0.0, None)


def _spread(values: Array, angle: Array, ideal: Array, level: float) -> NDArray[np.intp] | None:
    """Choose alternating points well above the level, the largest among them, as near the ideal angles as they can be.

    Where many peaks are equally high (Chebyshev polynomials), a choice that crowds in one place would determine the
    polynomial badly everywhere else.
    """
    size, count = np.abs(values), ideal.size
    keep = _apart(size, angle)
    values, size, angle = values[keep], size[keep], angle[keep]
    high = _reachable(values, count)
    if high == 0:
        return None
    floor = (level + high) / 2
    kept = np.flatnonzero(size >= floor * (1 - 1e-15))
    largest = int(np.argmax(size[kept]))
    positive = values[kept] >= 0
    cost = np.full((count, kept.size), math.inf)
    came = np.zeros((count, kept.size), dtype=np.intp)
    for j in range(count):
        own = (angle[kept] - ideal[j]) ** 2
        own[largest] -= 1e3
        if j == 0:
            cost[0] = own
            continue
        for sign in (True, False):
            before = np.where(positive == sign, cost[j - 1], math.inf)
            least = np.minimum.accumulate(before)
            where = np.maximum.accumulate(np.where(before == least, np.arange(kept.size), 0))
            here = np.flatnonzero(positive != sign)
            here = here[here > 0]
            cost[j, here], came[j, here] = least[here - 1] + own[here], where[here - 1]
    last = int(np.argmin(cost[-1]))
    if not math.isfinite(cost[-1, last]):
        return None
    path = [last]
    for j in range(count - 1, 0, -1):
        path.append(int(came[j, path[-1]]))
    return np.asarray(keep[kept[path[::-1]]])


def _apart(size: Array, angle: Array) -> NDArray[np.intp]:
    """Drop points that are next to a larger one."""
    keep: list[int] = []
    for i in range(size.size):
        if keep and abs(angle[i] - angle[keep[-1]]) < _APART:
            if size[i] > size[keep[-1]]:
                keep[-1] = i
        else:
            keep.append(i)
    return np.array(keep, dtype=np.intp)


def _reachable(values: Array, count: int) -> float:
    """Return the largest level that ``count`` alternating values all reach, 0 if so many do not alternate."""
    chosen = alternating(values, count)
    return float(np.abs(values[chosen]).min()) if chosen.size == count else 0.0


def _angle(t: Array) -> Array:
    """Return the angle from the left end: ``t = -cos(angle)``, to the last digit there."""
    return np.asarray(2 * np.arcsin(np.sqrt(np.clip((1 + t) / 2, 0, 1))))
