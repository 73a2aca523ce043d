"""Compositions of odd polynomials that drive every x in [lower, upper] to 1: the scalar side of the matrix sign.

A Newton-Schulz iteration acts on each singular value alone, by one odd polynomial per step. Among all compositions of
given degrees the greedy choice has the smallest worst-case error: each step is the minimax odd approximation of 1 on
the range of the step before (Amsel, Persson, Musco and Gower, "The Polar Express", arXiv 2505.16932, theorem 3.1).
"""

import functools
import itertools
import math
from dataclasses import dataclass

import numpy as np
from numpy.polynomial import Chebyshev, Polynomial
from numpy.polynomial.chebyshev import chebvander
from numpy.typing import ArrayLike, NDArray

from danlu import _validate
from danlu.approx.coefficients import TABLES

__all__ = ["Composition", "optimal_composition", "published"]

Coefficients = tuple[tuple[float, ...], ...]
Interval = tuple[float, float]


@dataclass(frozen=True)
class Composition:
    """A composition ``f_T(... f_1(x))`` of odd polynomials and its worst error on ``[lower, upper]``.

    Attributes:
        coefficients: one tuple per step, odd powers ascending: ``(a, b, c)`` is ``a x + b x^3 + c x^5``.
        lower: left end of the interval on which the error holds, above 0.
        upper: right end of that interval.
        errors: ``max |f_t(... f_1(x)) - 1|`` over the interval after each step, from the exact range of each step
            (an extremum of a polynomial is a root of its derivative), up to float64 rounding.
        name: the name of the set in reports.

    >>> step = optimal_composition(0.5, 1, degree=3)
    >>> step(1.0), 1 - step.errors[0]
    (0.914..., 0.914...)
    """

    coefficients: Coefficients
    lower: float
    upper: float
    errors: tuple[float, ...]
    name: str

    def __call__(self, x: ArrayLike) -> NDArray[np.float64] | float:
        """Evaluate at ``x`` (any shape) in float64; a scalar gives a float."""
        y = np.asarray(x, dtype=np.float64)
        for row in self.coefficients:
            y = _evaluate(row, y)
        return y if y.ndim else float(y)

    @property
    def steps(self) -> int:
        """Number of polynomials."""
        return len(self.coefficients)

    @property
    def degrees(self) -> tuple[int, ...]:
        """Degree of each polynomial."""
        return tuple(2 * len(row) - 1 for row in self.coefficients)

    @property
    def error(self) -> float:
        """Worst error after the last step."""
        return self.errors[-1]

    @property
    def slope(self) -> float:
        """Derivative at 0: the factor on values far below ``lower``."""
        return math.prod(row[0] for row in self.coefficients)

    def intervals(self) -> tuple[Interval, ...]:
        """Return the range before the first step, then the exact range after each step."""
        return _ranges(self.coefficients, self.lower, self.upper)

    def on(self, lower: float, upper: float = 1.0) -> "Composition":
        """Return the same polynomials with their errors on another interval."""
        _check_interval(lower, upper)
        return _measured(self.coefficients, lower, upper, self.name)

    def with_safety(self, safety: float, *, last: bool = False) -> "Composition":
        """Divide the argument of every step but the last (of every step if ``last``) by ``safety``.

        This applies the safety factor outside the recursion: the steps were designed without it, so the later ones
        are made for a slightly different range than they get. ``optimal_composition(safety=...)`` applies it inside.
        """
        _validate.number("safety", safety, low=1)
        kept = self.steps if last else self.steps - 1
        rows = tuple(_shrink(row, safety) if t < kept else row for t, row in enumerate(self.coefficients))
        return _measured(rows, self.lower, self.upper, f"{self.name}, safety {safety:g} outside")


def optimal_composition(
    lower: float = 1e-3,
    steps: int = 5,
    *,
    degree: int = 5,
    upper: float = 1.0,
    cushion: float = 0.0,
    safety: float = 1.0,
    recentre: bool = True,
) -> Composition:
    """Design the composition of odd polynomials with the smallest ``max |f(x) - 1|`` on ``[lower, upper]``.

    With ``cushion=0, safety=1`` the result is the true optimum over all compositions of ``steps`` odd polynomials of
    ``degree``, and every prefix of it is optimal too. The other settings give up a little of that for robustness to
    rounding; for bfloat16 use ``cushion=0.02, safety=1.01`` (the default of the authors' code). Designs are cached.

    Args:
        lower: smallest value to be brought to 1, above 0.
        steps: number of polynomials.
        degree: odd degree of each, 3 to 15.
        upper: largest value.
        cushion: each step is fitted on ``[max(l, cushion * u), u]`` instead of ``[l, u]``, which keeps its minimum away
            from 0. It is the ratio of the interval's ends before the step; the paper's text states the ratio after it
            (0.1 there is 0.0240733 here).
        safety: every step but the last is evaluated at ``x / safety``, and the following steps are designed for the
            resulting range. Values up to about ``safety * upper`` then do no harm.
        recentre: scale a cushioned step so that its true range is centred on 1.

    Returns:
        The composition with its error after each step.

    Raises:
        ValueError: if the interval is empty or reaches 0, or an argument is out of its range.
        TypeError: if an argument is not a number.

    Source: arXiv 2505.16932, theorem 3.1, sections 3.2 to 3.4.

    >>> f = optimal_composition(1e-3, 5)
    >>> [round(c, 5) for c in f.coefficients[0]]
    [8.47033, -25.10807, 18.62928]
    >>> round(f.error, 6)
    0.113448
    """
    _check_interval(lower, upper)
    _validate.integer("steps", steps)
    _check_degree("degree", degree)
    _validate.number("cushion", cushion, low=0, high=1, high_open=True)
    _validate.number("safety", safety, low=1)
    degrees = (degree,) * steps
    name = f"minimax degree {degree} x {steps}"
    return _designed(float(lower), float(upper), degrees, float(cushion), float(safety), bool(recentre), name)


def published(name: str, steps: int | None = None, *, lower: float = 1e-3, upper: float = 1.0) -> Composition:
    """Return a published coefficient set, with its exact error on ``[lower, upper]``.

    Args:
        name: ``classical``, ``jordan``, ``su_shared`` (one row, iterated); ``polar_express`` (the published list with
            its safety factor 1.01), ``polar_express_unscaled`` (before it); ``you``, ``su_x50``, ``su_x200``,
            ``su_x5``, ``modded_nanogpt``, ``gram_newton_schulz`` (fitted jointly). ``TABLES[name].source`` gives the
            source of each.
        steps: how many steps; the set's own length if None. Sets fitted jointly exist at their own length only.
        lower: left end of the interval to measure the error on.
        upper: right end of that interval.

    Raises:
        ValueError: if the name is unknown, or the set does not exist at that many steps.

    >>> published("jordan").coefficients[0]
    (3.4445, -4.775, 2.0315)
    >>> round(published("polar_express_unscaled", 6).error, 7)
    0.0011849
    """
    _validate.choice("name", name, sorted(TABLES))
    _check_interval(lower, upper)
    table = TABLES[name]
    count = table.default_steps if steps is None else steps
    _validate.integer("steps", count)
    length = len(table.rows)
    if (count > length and not table.repeat) or (count < length and not table.prefix):
        raise ValueError(f"steps must be {length} for {name!r}, whose steps were fitted jointly, got {count}")
    rows = tuple(table.rows[min(t, length - 1)] for t in range(count))
    return _measured(rows, float(lower), float(upper), name)


def large_gap_step(largest: float) -> tuple[float, float]:
    r"""Return the cubic ``a x + b x^3`` that takes ``z`` and ``sqrt(1 - z^2)`` to 1: a first step for a large gap.

    Of a matrix of Frobenius norm 1 whose largest singular value is ``z``, the others are at most
    :math:`k = \sqrt{1 - z^2}`. Where :math:`z^2 > 1/2` nothing lies between, and one step brings the largest to 1 and
    the next to at most 1, at a slope :math:`a = (z^2 + z k + k^2) / (z k (z + k))` of 1.5 and more.

    Args:
        largest: z, estimated from below, for instance by power iteration; taken between ``sqrt(1/2)`` and 0.97, where
            the slope is 3.8.

    Source: NoahAmsel/PolarExpress (arXiv 2505.16932), the variant for a large spectral gap.

    >>> a, b = large_gap_step(0.8)
    >>> round(0.8 * a + 0.8**3 * b, 12), round(0.6 * a + 0.6**3 * b, 12)
    (1.0, 1.0)
    """
    _validate.number("largest", largest, low=0, high=1)
    z = min(max(largest, math.sqrt(0.5)), 0.97)
    k = math.sqrt(1 - z * z)
    common = z * k * (z + k)
    return (z * z + z * k + k * k) / common, -1 / common


@functools.lru_cache(maxsize=1024)
def _designed(
    lower: float, upper: float, degrees: tuple[int, ...], cushion: float, safety: float, recentre: bool, name: str
) -> Composition:
    rows: list[tuple[float, ...]] = []
    left, right = lower, upper
    for t, degree in enumerate(degrees):
        row, left = _next_step(left, right, degree, cushion, safety if t < len(degrees) - 1 else 1.0, recentre)
        right = 2 - left
        rows.append(row)
    return _measured(tuple(rows), lower, upper, name)


def _next_step(
    left: float, right: float, degree: int, cushion: float, safety: float, recentre: bool
) -> tuple[tuple[float, ...], float]:
    """Design one step f for ``[left, right]``; return it and ``v = f(left)``: the next step is for ``[v, 2 - v]``."""
    fitted = max(left, cushion * right)
    row, lowest = _minimax_step(fitted, right, degree)
    if fitted > left:
        reached = _at(row, left)
        if recentre:
            # The largest value is 2 - lowest at every degree; at degree 5 and 9 it is also f(right), as in the paper.
            row = tuple(c * (2 / (reached + 2 - lowest)) for c in row)
        lowest = _at(row, left)
    if safety != 1:
        row = _shrink(row, safety)
        lowest = _at(row, left)
    return row, lowest


def _minimax_step(left: float, right: float, degree: int) -> tuple[tuple[float, ...], float]:
    """Return the odd polynomial of ``degree`` closest to 1 on ``[left, right]`` and its smallest value ``1 - E``."""
    n = (degree - 1) // 2
    ratio = left / right
    if degree == 3:
        row, lowest = _cubic(ratio)
    elif 2 * (1 - ratio) / (1 + ratio) < 10 ** (-15 / (n + 1)):
        # The optimum and its Taylor limit agree to rounding here; solving for it would only amplify the rounding.
        row, lowest = _shrink(_taylor(n), (1 + ratio) / 2), 1.0
    else:
        row, lowest = _alternate(ratio, n)
    return _shrink(row, right), lowest


def _cubic(ratio: float) -> tuple[tuple[float, ...], float]:
    """Solve degree 3 on [ratio, 1] in closed form: the inner extremum is at the quadratic mean of the interval."""
    q = math.sqrt((ratio * ratio + ratio + 1) / 3)
    ends = ratio * (ratio + 1)
    k = 6 / (2 * q**3 + ends)
    return (k * q * q, -k / 3), 2 * ends / (2 * q**3 + ends)


def _taylor(n: int) -> tuple[float, ...]:
    """Expand ``x (1 - (1 - x^2))^(-1/2)`` to order n in ``1 - x^2``: the limit of the step on a narrow interval."""
    series = np.zeros(n + 1)
    for k in range(n + 1):
        series[: k + 1] += math.comb(2 * k, k) / 4**k * (Polynomial([1, -1]) ** k).coef
    return tuple(series.tolist())


def _alternate(ratio: float, n: int) -> tuple[tuple[float, ...], float]:
    """Solve the step on [ratio, 1] by exchange: level the error on n + 2 nodes, move the inner ones to the extrema.

    The polynomial is written ``x q(t)``, q a Chebyshev series in t, the image of x^2 in [-1, 1]: conditioned alike on
    narrow and on wide intervals. The unknown is ``(1 - E) / ratio``, not E: it keeps its digits when E is close to 1.
    """
    middle, half = (1 + ratio * ratio) / 2, (1 - ratio * ratio) / 2
    nodes = (1 + ratio) / 2 - (1 - ratio) / 2 * np.cos(np.pi * np.arange(n + 2) / (n + 1))
    nodes[0], nodes[-1] = ratio, 1.0
    minima = (-1.0) ** np.arange(n + 2)
    # d/dx [x q(t)] = q + 2 x^2 q'(t) / half, and x^2 = middle + half t.
    chain = Chebyshev([2 * middle / half, 2.0])
    best, lowest, best_spread = Chebyshev([0.0]), 0.0, math.inf
    for _ in range(60):
        t = (nodes * nodes - middle) / half
        system = np.column_stack([nodes[:, None] * chebvander(t, n), -ratio * minima])
        system[0] /= ratio
        solution = np.linalg.solve(system, 1 - minima)
        q, level = Chebyshev(solution[:-1]), ratio * float(solution[-1])
        inner = np.sort(np.clip((q + chain * q.deriv()).roots().real, -1, 1))
        nodes[1:-1] = np.sqrt(middle + half * inner)
        values = nodes * q((nodes * nodes - middle) / half)
        spread = float(np.max(np.abs(values - (1 - minima + minima * level))))
        if spread >= best_spread:
            break
        best, lowest, best_spread = q, level, spread
        if spread < 1e-14:
            break
    if not best_spread < 1e-9:
        raise ArithmeticError(f"no alternation found at degree {2 * n + 1} on [{ratio}, 1]: spread {best_spread:.1e}")
    in_square = best.convert(kind=Polynomial)(Polynomial([-middle / half, 1 / half]))
    return tuple(in_square.coef.tolist()), lowest


def _evaluate(row: tuple[float, ...], x: NDArray[np.float64]) -> NDArray[np.float64]:
    square = x * x
    value = np.full_like(x, row[-1])
    for c in row[-2::-1]:
        value = value * square + c
    return np.asarray(x * value)


def _shrink(row: tuple[float, ...], factor: float) -> tuple[float, ...]:
    return tuple(c / factor ** (2 * k + 1) for k, c in enumerate(row))


def _at(row: tuple[float, ...], x: float) -> float:
    return float(_evaluate(row, np.array(x)))


def _image(row: tuple[float, ...], left: float, right: float) -> Interval:
    """Return the exact range of one step: its values at the ends and at the roots of its derivative."""
    squares = Polynomial([(2 * k + 1) * c for k, c in enumerate(row)]).roots().real
    turning = np.sqrt(squares[squares > 0])
    turning = np.concatenate([turning, -turning])
    values = _evaluate(row, np.concatenate([[left, right], turning[(turning > left) & (turning < right)]]))
    return float(np.min(values)), float(np.max(values))


def _ranges(rows: Coefficients, lower: float, upper: float) -> tuple[Interval, ...]:
    return tuple(itertools.accumulate(rows, lambda interval, row: _image(row, *interval), initial=(lower, upper)))


def _measured(rows: Coefficients, lower: float, upper: float, name: str) -> Composition:
    errors = tuple(max(1 - low, high - 1) for low, high in _ranges(rows, lower, upper)[1:])
    return Composition(rows, lower, upper, errors, name)


def _check_interval(lower: float, upper: float) -> None:
    _validate.positive("lower", lower)
    _validate.positive("upper", upper)
    if not lower < upper:
        raise ValueError(f"lower must be below upper ({upper}), got {lower}")


def _check_degree(name: str, degree: int) -> None:
    _validate.integer(name, degree, low=3, high=15)
    if degree % 2 == 0:
        raise ValueError(f"{name} must be odd, got {degree}")
