"""The largest errors on an interval, to the last float64 number: for kinks, cusps and steep flanks.

Where the exchange's own samples and parabolas do not locate a peak, a dense grid does, and each peak is then narrowed
down between its neighbours until nothing is left between them. That finds the tip of ``|x - c|^0.1``, whose height is
not resolved before the last digit of x.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from danlu.approx._exchange import alternating

Array = NDArray[np.float64]
Error = Callable[[Array], Array]

_GRID = 4096
_INSIDE = np.arange(1, 8) / 8
_ROUNDS = 40  # each divides a bracket by 8: all digits of float64, and more next to 0
_SETTLED = 1e-13
_MOST = 512


def grid(a: float, b: float, size: int = _GRID) -> Array:
    """Return points of [a, b], ascending: equidistant ones, and ones that are dense at the ends as Chebyshev's are.

    >>> grid(0.0, 1.0, 2).round(3).tolist()
    [0.0, 0.146, 0.5, 0.854, 1.0]
    """
    steps = np.arange(size + 1) / size
    bowed = (b - a) * np.sin(np.pi / 4 * steps) ** 2
    points = np.sort(np.concatenate([a + (b - a) * steps, a + bowed, b - bowed]))
    # Points a rounding apart would make a peak of every rounding.
    kept = np.diff(points, prepend=-np.inf) > 1e-9 * (b - a) / size
    return np.asarray(np.clip(np.append(points[kept & (points < b)], b), a, b))


def climb(error: Error, x: Array, values: Array, count: int) -> tuple[Array, Array]:
    """Return the places and values of all local extrema of an error, ascending, from its values on an ascending grid.

    Each is moved to its top (or bottom) between the neighbours it has on the grid. Each round takes seven points on
    either side and keeps the two next to the best. Where there are very many extrema (an oscillation without end,
    noise), only the largest are moved, and those that an alternation of ``count`` needs.

    >>> climb(lambda x: np.abs(x - 0.3), grid(0.0, 1.0, 4), np.abs(grid(0.0, 1.0, 4) - 0.3), 3)[0].round(9).tolist()
    [0.0, 0.3, 1.0]
    """
    chosen, sign = _extrema(values, count)
    top, height = x[chosen], sign * values[chosen]
    left, right = x[np.maximum(chosen - 1, 0)], x[np.minimum(chosen + 1, x.size - 1)]
    settled = _SETTLED * float(np.abs(values).max())
    active = np.arange(chosen.size)
    for _ in range(_ROUNDS):
        if not active.size:
            break
        low, middle, high = left[active], top[active], right[active]
        below = low[:, None] + (middle - low)[:, None] * _INSIDE
        above = middle[:, None] + (high - middle)[:, None] * _INSIDE
        near = np.concatenate([low[:, None], below, middle[:, None], above, high[:, None]], axis=1)
        heights = sign[active, None] * error(near.ravel()).reshape(near.shape)
        rows, best = np.arange(active.size), heights.argmax(axis=1)
        # Ties go to the point that is there already, so that a plateau of rounding does not wander.
        best = np.where(heights[rows, best] > height[active], best, 8)
        before, after = np.maximum(best - 1, 0), np.minimum(best + 1, near.shape[1] - 1)
        top[active], height[active] = near[rows, best], np.maximum(heights[rows, best], height[active])
        left[active], right[active] = near[rows, before], near[rows, after]
        flat = height[active] - np.minimum(heights[rows, before], heights[rows, after]) <= settled
        tight = np.nextafter(left[active], np.inf) >= top[active]
        tight &= np.nextafter(top[active], np.inf) >= right[active]
        active = active[~(flat | tight)]
    order = np.argsort(top, kind="stable")
    return top[order], (sign * height)[order]


def _extrema(values: Array, count: int) -> tuple[NDArray[np.intp], Array]:
    """Return where a sequence has local extrema, and 1 for maxima and -1 for minima, also for minima above 0.

    The tip of a cusp may lie so far below what the grid shows that its sign is another.
    """
    rising, falling = values[1:] > values[:-1], values[1:] < values[:-1]
    edge = [True]
    maxima = np.flatnonzero(np.concatenate([edge, rising]) & np.concatenate([~rising, edge]))
    minima = np.flatnonzero(np.concatenate([edge, falling]) & np.concatenate([~falling, edge]))
    found = np.concatenate([maxima, minima])
    sign = np.concatenate([np.ones(maxima.size), -np.ones(minima.size)])
    if found.size > _MOST:
        order = np.argsort(found, kind="stable")
        found, sign = found[order], sign[order]
        heights = np.abs(values[found])
        important = heights >= np.partition(heights, -_MOST)[-_MOST]
        important[alternating(values[found], count)] = True
        found, sign = found[important], sign[important]
    return found, sign
