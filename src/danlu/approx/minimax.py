"""Best uniform approximation by polynomials: the Remez exchange, and an optimality certificate for any polynomial.

A polynomial from a space of dimension N is the best one exactly if its error alternates between +E and -E at N + 1
points, and any alternating error is a lower bound on the error of every other polynomial (de la Vallee-Poussin). Both
are evaluated on the polynomial that is returned, so a result carries the proof of how good it is.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
from numpy.polynomial import Chebyshev
from numpy.polynomial.chebyshev import chebvander
from numpy.typing import ArrayLike

from danlu import _validate
from danlu.approx._exchange import EPS, Problem, alternating, exchange, extrema, rounding
from danlu.approx._extended import ExtendedMinimax, extended_minimax
from danlu.approx._search import climb, grid
from danlu.approx._settle import settle
from danlu.approx._view import Array, Function, Parity, View, values_of, view_of

__all__ = [
    "Certificate",
    "ConvergenceWarning",
    "ExtendedMinimax",
    "Minimax",
    "certify",
    "max_norm_derivative",
    "minimax",
]

_TOLERANCE = 1e-9
_DOUBT = 1e-7  # of the error: a refinement that still raises a peak by more has not found its top


class ConvergenceWarning(UserWarning):
    """The error of the best polynomial found is not levelled: the message gives it and what no polynomial is below."""


@dataclass(frozen=True)
class Certificate:
    """What the alternation of an error proves about a polynomial.

    Attributes:
        error: ``max |w (f - p)|`` over the interval.
        lower_bound: no polynomial of the class has a smaller maximal error (de la Vallee-Poussin).
        points: where the error takes its alternating extrema, ascending.
        values: the weighted error ``w (f - p)`` there.
        needed: number of alternating points that the theorem requires, the dimension of the class plus one.
        rounding: how far float64 rounding may have moved ``error`` and ``lower_bound``.
        optimal: whether ``error`` exceeds ``lower_bound`` by no more than the tolerance (or than rounding).
    """

    error: float
    lower_bound: float
    points: Array
    values: Array
    needed: int
    rounding: float
    optimal: bool

    @property
    def gap(self) -> float:
        """Relative distance ``(error - lower_bound) / error`` to the lower bound; 0 for an exact fit."""
        return (self.error - self.lower_bound) / self.error if self.error > 0 else 0.0


@dataclass(frozen=True)
class Minimax(Certificate):
    """The best polynomial with its certificate; ``polynomial`` is a Chebyshev series on its own domain.

    ``polynomial.convert(kind=numpy.polynomial.Polynomial)`` gives power coefficients.
    """

    polynomial: Chebyshev

    def __call__(self, x: ArrayLike) -> Array | float:
        """Evaluate at ``x`` (any shape) in float64."""
        y = np.asarray(self.polynomial(np.asarray(x, dtype=np.float64)))
        return y if y.ndim else float(y)


@overload
def minimax(
    f: Function,
    degree: int,
    interval: tuple[float, float] = ...,
    parity: Parity = ...,
    weight: Function | None = ...,
    *,
    dps: None = ...,
) -> Minimax: ...


@overload
def minimax(
    f: Function,
    degree: int,
    interval: tuple[float, float] = ...,
    parity: Parity = ...,
    weight: Function | None = ...,
    *,
    dps: int,
) -> ExtendedMinimax: ...


def minimax(
    f: Function,
    degree: int,
    interval: tuple[float, float] = (-1.0, 1.0),
    parity: Parity = None,
    weight: Function | None = None,
    *,
    dps: int | None = None,
) -> Minimax | ExtendedMinimax:
    """Find the polynomial of at most ``degree`` with the smallest ``max |w(x) (f(x) - p(x))|`` on an interval.

    It works on any continuous f, smooth or not, with kinks and cusps; "the interval" is its float64 numbers. In float64
    an error below about 1e-15 of f cannot be levelled, which ``rounding`` of the result shows. Extended precision
    (``dps``) resolves smaller errors. Where the error is not levelled (f jumps, or has features narrower than the
    samples), the best polynomial found is returned with both bounds, ``optimal`` False, and a `ConvergenceWarning`.

    Args:
        f: the function, of an array of float64 (a function of one number works too, more slowly). With ``dps``, a
            function of one mpmath number.
        degree: highest degree, 0 or above.
        interval: ``(a, b)`` with a < b.
        parity: restrict p to odd or even powers. The interval must then be symmetric, ``(-b, b)``, with f of that
            parity, or lie in x >= 0.
        weight: positive function w; 1 if None.
        dps: decimal digits for extended precision by mpmath; the result is then an ``ExtendedMinimax``.

    Returns:
        The polynomial, its error, the alternation points and the de la Vallee-Poussin lower bound.

    Raises:
        ValueError: if an argument is out of range, or f or the weight gives a value that cannot be used (complex, NaN,
            infinite, a weight of zero or less); the message names the point.

    Source: Chebyshev's alternation theorem; E. Remez, Comptes rendus 198 (1934) 2063.

    >>> best = minimax(np.abs, 2)
    >>> print(f"{best.error:.6f} {best.lower_bound:.6f} {best.points.size}")
    0.125000 0.125000 4
    """
    _validate.integer("degree", degree, low=0)
    a, b = _interval(interval)
    _validate.choice("parity", parity, [None, "odd", "even"])
    if dps is not None:
        _validate.integer("dps", dps, low=1)
        if parity is not None:
            raise ValueError(f"parity must be None when dps is given, got {parity!r}")
        extended = extended_minimax(f, degree, (a, b), weight, dps)
        _warn_unless_optimal(extended, degree)
        return extended
    view = view_of(f, a, b, parity, weight)
    basis = _basis_size(degree, parity)
    if basis == 0:
        zero = Chebyshev([0.0], domain=[a, b])
        return Minimax(**vars(_searched(view, zero, 0, _TOLERANCE)), polynomial=zero)
    with np.errstate(all="ignore"):  # what overflows here is seen by the certificate, and settled below
        inner, points = exchange(Problem(view.sample, basis - 1, max(12, 192 // basis)))
    if np.isfinite(inner).all():
        polynomial = _in_x(inner * view.scale, view, parity)
        certificate = _certificate(view, polynomial, basis, points)
        if certificate is not None:
            return Minimax(**vars(certificate), polynomial=polynomial)
    settled = settle(view.at, view.to_t, view.interval, basis - 1)
    polynomial = _in_x(settled.coefficients * view.scale, view, parity)
    certificate = _searched(view, polynomial, basis, _TOLERANCE, settled.bound * view.scale)
    result = Minimax(**vars(certificate), polynomial=polynomial)
    _warn_unless_optimal(result, degree)
    return result


def _warn_unless_optimal(result: Minimax | ExtendedMinimax, degree: int) -> None:
    if result.optimal:
        return
    message = (
        f"the error at degree {degree} could not be levelled: {float(result.error):.6e} is reached, while no "
        f"polynomial is below {float(result.lower_bound):.6e}; f jumps, or changes faster than the samples resolve"
    )
    warnings.warn(message, ConvergenceWarning, stacklevel=3)


def certify(
    polynomial: Chebyshev | Function | Sequence[float],
    f: Function,
    interval: tuple[float, float] = (-1.0, 1.0),
    *,
    degree: int | None = None,
    parity: Parity = None,
    weight: Function | None = None,
    tolerance: float = 1e-6,
) -> Certificate:
    """Decide whether a given polynomial is the best one, from the alternation of its error.

    Args:
        polynomial: a ``numpy.polynomial`` object, power coefficients in ascending order, or a function.
        f: the function approximated, of an array.
        interval: ``(a, b)`` with a < b.
        degree: of the class in which it is to be the best; taken from the polynomial if it has one.
        parity: restrict the class to odd or even polynomials.
        weight: positive function; 1 if None.
        tolerance: largest relative gap between the error and the lower bound that counts as optimal.

    Returns:
        A certificate; ``.optimal`` is the verdict.

    Raises:
        ValueError: if an argument is out of range or the degree is not known.

    >>> certify([1 / 8, 0, 1], np.abs).optimal, certify([1 / 8, 0, 1.001], np.abs).optimal
    (True, False)
    """
    a, b = _interval(interval)
    _validate.choice("parity", parity, [None, "odd", "even"])
    _validate.positive("tolerance", tolerance)
    if not callable(polynomial):
        polynomial = np.polynomial.Polynomial(np.asarray(polynomial, dtype=np.float64))
    if degree is None:
        coefficients = getattr(polynomial, "coef", None)
        if coefficients is None:
            raise ValueError("degree must be given when polynomial is a function")
        degree = len(coefficients) - 1
    _validate.integer("degree", degree, low=0)
    view = view_of(f, a, b, parity, weight)
    return _searched(view, polynomial, _basis_size(degree, parity), tolerance)


def max_norm_derivative(f: ArrayLike, h: ArrayLike, *, tolerance: float = 0.0) -> float:
    r"""Return the derivative of ``max |f|`` in the direction ``h``: the largest ``sign(f) h`` where ``|f|`` is largest.

    It is one-sided, :math:`\lim_{\epsilon \to 0+} (\|f + \epsilon h\| - \|f\|) / \epsilon`, and linear in ``h`` only
    where the maximum is taken once. Kolmogorov's criterion: ``p`` is the best approximation of ``g`` in a linear space
    if and only if this is not negative for ``f = p - g`` and every ``h`` of the space.

    Args:
        f: values at finitely many points.
        h: values at the same points.
        tolerance: of the largest ``|f|``, relative: points that count as taking it.

    Raises:
        ValueError: no points, or shapes that differ.

    Source: kexue.fm 10972.

    >>> max_norm_derivative([3.0, -3.0, 1.0], [-1.0, 2.0, 9.0])
    -1.0
    """
    value, direction = np.asarray(f, dtype=np.float64), np.asarray(h, dtype=np.float64)
    if value.shape != direction.shape or not value.size:
        raise ValueError(f"h must have the shape of f, which has points, got {direction.shape} and {value.shape}")
    _validate.number("tolerance", tolerance, low=0, high=1)
    size = np.abs(value)
    largest = size.max()
    if not largest:
        return float(np.abs(direction).max())
    taken = size >= largest * (1 - tolerance)
    return float((np.sign(value) * direction)[taken].max())


def _in_x(inner: Array, view: View, parity: Parity) -> Chebyshev:
    """Write q(t) (times x if odd) as one Chebyshev series in x, with exact zeros at the powers of the other parity."""
    a, b = view.interval
    if parity is None:
        return Chebyshev(inner, domain=[a, b])
    # From [a^2, b^2] to [0, b^2], where T_k(2 x^2 / b^2 - 1) = T_2k(x / b).
    q = Chebyshev(inner, domain=[a * a, b * b])
    n = inner.size
    nodes = np.cos(np.pi * (np.arange(n) + 0.5) / n)
    wide = 2 / n * chebvander(nodes, n - 1).T @ q(b * b * (nodes + 1) / 2)
    wide[0] /= 2
    coefficients = np.zeros(2 * n)
    if parity == "even":
        coefficients[::2] = wide
        return Chebyshev(coefficients[:-1], domain=[-b, b])
    # x T_2k = (b / 2) (T_(2k+1) + T_|2k-1|).
    coefficients[1::2] = b / 2 * wide
    coefficients[1:-1:2] += b / 2 * wide[1:]
    coefficients[1] += b / 2 * wide[0]
    return Chebyshev(coefficients, domain=[-b, b])


def _certificate(view: View, polynomial: Function, basis: int, reference: Array) -> Certificate | None:
    """Return the certificate of what the exchange found; None where it is not optimal or its peaks are in doubt."""

    def residual(t: Array) -> Array:
        f, _, w = view.sample(t)
        return np.asarray(w * (f - values_of("polynomial", polynomial, view.to_x(t)) / view.scale))

    knots = np.unique(np.concatenate([[-1.0, 1.0], reference]))
    # Not a multiple of the exchange's density: the samples fall elsewhere.
    largest, points, values, doubts = extrema(residual, knots, max(24, 512 // basis) + 1, basis + 1, 2)
    f, _, w = view.sample(knots)
    found = _judged(view, basis, largest, view.to_x(points), values, f, w, _TOLERANCE)
    sure = found.optimal or found.error <= 16 * found.rounding
    return found if sure and doubts.max() <= max(_DOUBT * largest, found.rounding / view.scale) else None


def _searched(view: View, polynomial: Function, basis: int, tolerance: float, bound: float = 0.0) -> Certificate:
    """Return the certificate of any polynomial by a search for the top of every peak, ``bound`` being known."""

    def residual(x: Array) -> Array:
        f, _, w = view.at(x)
        return np.asarray(w * (f - values_of("polynomial", polynomial, x) / view.scale))

    x = grid(*view.interval, size=3001 + 48 * basis)
    values = residual(x)
    places, heights = climb(residual, x, values, basis + 1)
    kept = alternating(heights, basis + 1)
    f, _, w = view.at(x)
    largest = float(np.abs(heights).max())
    return _judged(view, basis, largest, places[kept], heights[kept], f, w, tolerance, bound)


def _judged(
    view: View,
    basis: int,
    largest: float,
    points: Array,
    values: Array,
    f: Array,
    w: Array,
    tolerance: float,
    bound: float = 0.0,
) -> Certificate:
    alternates = points.size == basis + 1
    lower = float(np.min(np.abs(values))) if alternates else 0.0
    noise = rounding(EPS, basis + 1) * float(np.max(w)) * (float(np.max(np.abs(f))) + largest)
    lower = max(lower, min(bound / view.scale, float(largest)))
    optimal = largest <= noise or largest - lower <= max(tolerance * largest, noise)
    scale = view.scale
    return Certificate(
        error=float(largest) * scale,
        lower_bound=lower * scale,
        points=points,
        values=values * scale,
        needed=basis + 1,
        rounding=noise * scale,
        optimal=bool(optimal),
    )


def _basis_size(degree: int, parity: Parity) -> int:
    """Count the powers of the class up to ``degree``."""
    if parity is None:
        return degree + 1
    return (degree + 1) // 2 if parity == "odd" else degree // 2 + 1


def _interval(interval: tuple[float, float]) -> tuple[float, float]:
    try:
        a, b = interval
    except (TypeError, ValueError) as e:
        raise ValueError(f"interval must be two numbers (a, b), got {interval!r}") from e
    _validate.number("interval[0]", a)
    _validate.number("interval[1]", b)
    if not a < b:
        raise ValueError(f"interval must have a < b, got {(a, b)}")
    return float(a), float(b)
