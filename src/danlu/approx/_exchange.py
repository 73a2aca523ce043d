"""The Remez exchange on t in [-1, 1] for ``w (f - m q(t))`` with q a polynomial of degree n.

The factor m is 1 for plain and even polynomials and x for odd ones; for even and odd ones t is the image of x^2. The
arithmetic is that of the arrays: float64, or Python objects such as mpmath numbers.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.polynomial.chebyshev import chebvander
from numpy.typing import NDArray

Array = NDArray[np.float64]
Residual = Callable[[Array], Array]
EPS = float(np.finfo(np.float64).eps)

_TOLERANCE = 1e-10
_ITERATIONS = 100
_OFFSETS = np.array([[-2], [-1], [1], [2]])
_UNDERFLOW = 1e-200  # stands for a distance of 0: its reciprocal outweighs every other term of the barycentric formula


def solve(matrix: Array, right: Array) -> Array:
    """Solve a linear system in float64; NaN where it is singular."""
    try:
        return np.asarray(np.linalg.solve(matrix, right))
    except np.linalg.LinAlgError:
        return np.full(right.shape, math.nan)


@dataclass(frozen=True)
class Problem:
    """Minimise ``max |w (f - m q(t))|`` over polynomials q of degree n; ``sample(t)`` gives ``(f, m, w)``.

    m and w may have length 1. ``eps``, ``lift`` (from float64) and ``solve`` (of a linear system) fit the arithmetic;
    ``density`` is the number of samples between two points.
    """

    sample: Callable[[Array], tuple[Array, Array, Array]]
    n: int
    density: int
    eps: float = EPS
    lift: Callable[[Array], Array] = np.asarray
    solve: Callable[[Array, Array], Array] = solve


@dataclass(frozen=True)
class _Levelled:
    """The polynomial whose error is ``+level, -level, ...`` at the points t, by its values there."""

    t: Array
    values: Array
    weights: Array
    level: float
    noise: float

    def __call__(self, t: Array) -> Array:
        distance = t[:, None] - self.t
        terms = self.weights / np.where(distance == 0, _UNDERFLOW, distance)
        return np.asarray((terms @ self.values) / terms.sum(axis=1))


def exchange(problem: Problem, points: Array | None = None) -> tuple[Array, Array]:
    """Return the Chebyshev coefficients of the best q found and the points on which its error is levelled.

    Whether that is the best there is, the caller has to measure.
    """
    n = problem.n
    starts = [points] if points is not None else [problem.lift(start) for start in _starts(n)]
    for start in starts:
        q = _level(problem, start)
        largest, points = _scan(problem, q, 0)
        if largest <= q.noise:
            return _coefficients(problem, start), start
        # An even function at even degree has level 0 on a symmetric start, whatever its best polynomial: try another.
        if q.level > 4 * q.noise:
            break
    first, near_rounding = largest, largest <= 16 * q.noise
    best, best_error, bound, rounds = q, math.inf, q.level, 0
    for _ in range(8 if near_rounding else _ITERATIONS):
        if points is None or points.size < n + 2 or not (points[1:] > points[:-1]).all():
            break
        q = _level(problem, points)
        if 0 * q.level != 0:  # points so close that their weights overflow
            break
        largest, points = _scan(problem, q, rounds)
        if rounds == 0 and largest < 1.2 * q.level:
            # Close to convergence the positions of the peaks matter, and samples alone do not locate them well enough.
            rounds = 2 if problem.eps == EPS else 3
            largest, points = _scan(problem, q, rounds)
        bound = max(bound, q.level)
        if rounds and largest < best_error:
            best, best_error = q, largest
        if rounds and best_error - bound <= max(_TOLERANCE * best_error, q.noise):
            return _coefficients(problem, best.t), best.t
    reference = best.t if best_error < first else start
    return _coefficients(problem, reference), reference


def extrema(
    residual: Residual, knots: Array, density: int, count: int, rounds: int
) -> tuple[float, Array, Array, Array]:
    """Return the largest ``|residual|``, places and values of up to ``count`` extrema of alternating sign, and doubts.

    Each gap of ``knots`` is sampled ``density`` times; peaks that can matter are refined ``rounds`` times. The doubts
    are how far the last refinement still raised each peak: hardly at smooth ones and kinks, much at a cusp.
    """
    steps = np.arange(density) / density
    grid = np.concatenate([(knots[:-1, None] + (knots[1:] - knots[:-1])[:, None] * steps).ravel(), knots[-1:]])
    values = residual(grid)
    size, positive = np.abs(values), values >= 0
    edges = (np.flatnonzero(positive[1:] != positive[:-1]) + 1).tolist()
    peaks = np.array([a + int(size[a:b].argmax()) for a, b in zip([0, *edges], [*edges, grid.size], strict=True)])
    if peaks.size > count:
        chosen = size[peaks] >= 0.9 * size.max()
        chosen[alternating(values[peaks], count)] = True
        peaks = peaks[chosen]
    places, heights, doubts = grid[peaks], values[peaks], values[:0]
    if rounds:
        spacing = grid[1:] - grid[:-1]
        width = np.minimum(spacing[np.maximum(peaks - 1, 0)], spacing[np.minimum(peaks, spacing.size - 1)])
        places, heights, doubts = _refine(residual, places, heights, width, rounds)
    kept = alternating(heights, count)
    return np.abs(heights).max(), places[kept], heights[kept], doubts


def rounding(eps: float, terms: int) -> float:
    """Return the relative rounding error expected of a residual whose polynomial is a sum of ``terms``."""
    return eps * (8 + 2 * terms)


def dyadic_scale(values: Array) -> float:
    """Return the power of two just below the largest magnitude, 1 for all zeros: dividing by it is exact."""
    largest = float(np.max(np.abs(values)))
    return 2.0 ** (math.frexp(largest)[1] - 1) if largest > 0 else 1.0


def _starts(n: int) -> list[Array]:
    longer = -np.cos(np.pi * np.arange(n + 3) / (n + 2))
    shifted = -np.cos(np.pi * (np.arange(n + 2) + 0.29) / (n + 1.83))
    skewed = -np.cos(np.pi * ((np.arange(n + 2) + 0.5) / (n + 2)) ** 1.3)
    return [-np.cos(np.pi * np.arange(n + 2) / (n + 1)), longer[:-1], longer[1:], shifted, skewed]


def _level(problem: Problem, t: Array) -> _Levelled:
    """Find q and the level with ``m q(t_i) + (-1)^i level / w_i = f_i`` on n + 2 points."""
    f, m, w = problem.sample(t)
    # Twice the distance: the capacity of [-1, 1] is 1/2, so the products neither over- nor underflow.
    distance = 2 * (t[:, None] - t)
    np.fill_diagonal(distance, 1)
    weights = 1 / np.prod(distance, axis=1)
    target, alternating = f / m, _signs(t.size) / (w * m)
    level = (weights @ target) / (weights @ alternating)
    values = target - level * alternating
    noise = rounding(problem.eps, t.size) * w.max() * (np.abs(f).max() + np.abs(m * values).max())
    return _Levelled(t, values, weights, abs(level), noise)


def _coefficients(problem: Problem, t: Array) -> Array:
    """Return the Chebyshev coefficients of the q levelled on t.

    A linear system leaves a residual of a few units in the last place at any degree; the barycentric weights, products
    of as many factors, do not.
    """
    f, m, w = problem.sample(t)
    system = np.column_stack([chebvander(t, problem.n), _signs(t.size) / (w * m)])
    return problem.solve(system, f / m)[:-1]


def _scan(problem: Problem, q: _Levelled, rounds: int) -> tuple[float, Array]:
    def residual(t: Array) -> Array:
        f, m, w = problem.sample(t)
        return np.asarray(w * (f - m * q(t)))

    ends = problem.lift(np.array([-1.0, 1.0]))
    knots = np.concatenate([ends[:1][q.t[:1] > ends[0]], q.t, ends[1:][q.t[-1:] < ends[1]]])
    largest, points, _, _ = extrema(residual, knots, problem.density, problem.n + 2, rounds)
    return largest, points


def alternating(values: Array, count: int) -> NDArray[np.intp]:
    """Choose at most ``count`` entries of alternating sign whose smallest size is as large as it can be."""
    positive, size = values >= 0, np.abs(values)
    if size.size <= count + 1 and (positive[1:] != positive[:-1]).all():
        smaller_end = slice(1, None) if size[0] < size[-1] else slice(None, -1)
        return np.arange(size.size)[smaller_end if size.size > count else slice(None)]
    levels = np.sort(size)
    low, high = 0, levels.size - 1
    while low < high:
        middle = (low + high + 1) // 2
        kept = positive[size >= levels[middle]]
        if 1 + np.count_nonzero(kept[1:] != kept[:-1]) >= count:
            low = middle
        else:
            high = middle - 1
    chosen: list[int] = []
    for i in np.flatnonzero(size >= levels[low]).tolist():
        if not chosen or positive[i] != positive[chosen[-1]]:
            chosen.append(i)
        elif size[i] > size[chosen[-1]]:
            chosen[-1] = i
    while len(chosen) > count:
        del chosen[0 if size[chosen[0]] < size[chosen[-1]] else -1]
    return np.array(chosen, dtype=np.intp)


def _refine(residual: Residual, x: Array, value: Array, width: Array, rounds: int) -> tuple[Array, Array, Array]:
    """Move each peak to the vertex of its parabola, or, at a kink, to where the chords of its two sides meet.

    The third value is how far the last round raised each.
    """
    sign = np.where(value >= 0, 1, -1)
    value = np.abs(value)
    columns, before = np.arange(x.size), value
    for _ in range(rounds):
        near = np.maximum(np.minimum(x + width * _OFFSETS, 1), -1)
        sides = sign * residual(near.ravel()).reshape(near.shape)
        a, b, c, d = sides
        bend, rise, fall = 2 * value - b - c, (b - a) / width, (d - c) / width
        vertex = x + width * (c - b) / _nonzero(2 * bend)
        kink = (c - b + rise * near[1] - fall * near[2]) / _nonzero(rise - fall)
        # fmin and fmax let no NaN through, which f could not take.
        guess = np.fmax(np.fmin(np.array([vertex, kink]), near[3]), near[0])
        places = np.concatenate([x[None], near, guess])
        heights = np.concatenate([value[None], sides, sign * residual(guess.ravel()).reshape(guess.shape)])
        best = heights.argmax(axis=0)
        before = value
        x, value = places[best, columns], heights[best, columns]
        width = width / 16
    return x, sign * value, value - before


@functools.lru_cache(maxsize=256)
def _signs(count: int) -> Array:
    return np.asarray((-1.0) ** np.arange(count))


def _nonzero(values: Array) -> Array:
    return np.where(values == 0, 1, values)
