"""Best uniform approximation by polynomials: the Remez exchange, and an optimality certificate for any polynomial.

A polynomial from a space of dimension N is the best one exactly if its error alternates between +E and -E at N + 1
points, and any alternating error is a lower bound on the error of every other polynomial (de la Vallee-Poussin). Both
are evaluated on the polynomial that is returned, so a result carries the proof of how good it is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import numpy as np
from numpy.polynomial import Chebyshev
from numpy.polynomial.chebyshev import chebvander
from numpy.typing import ArrayLike, NDArray

from danlu import _validate
from danlu.approx._exchange import EPS, ConvergenceError, Problem, dyadic_scale, exchange, extrema, rounding
from danlu.approx._extended import ExtendedMinimax, extended_minimax

__all__ = ["Certificate", "ConvergenceError", "ExtendedMinimax", "Minimax", "certify", "minimax"]

Array = NDArray[np.float64]
Function = Callable[[Any], Any]
Parity = Literal["odd", "even"] | None

_ONE = np.ones(1)


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

    The exchange works on any continuous f, smooth or not. In float64 an error below about 1e-15 of f cannot be
    levelled, which ``rounding`` of the result shows. Extended precision (``dps``) resolves smaller errors.

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
        ConvergenceError: if the error could not be levelled; the message gives the error reached and the lower bound.
        ValueError: if an argument is out of range, or f or the weight gives a value that cannot be used.

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
        return extended_minimax(f, degree, (a, b), weight, dps)
    view = _view(f, a, b, parity, weight)
    basis = _basis_size(degree, parity)
    if basis == 0:
        zero = Chebyshev([0.0], domain=[a, b])
        return Minimax(**vars(_certificate(view, zero, 0, 1e-9)), polynomial=zero)
    points = None
    for finer in (1, 2, 4, 8):
        problem = Problem(view.sample, basis - 1, finer * max(12, 192 // basis))
        inner, points = exchange(problem, points)
        polynomial = _in_x(inner * view.scale, view, parity)
        certificate = _certificate(view, polynomial, basis, 1e-9, points, finer)
        if certificate.optimal or certificate.error <= 16 * certificate.rounding:
            return Minimax(**vars(certificate), polynomial=polynomial)
    raise ConvergenceError(
        f"the error at degree {degree} has features too narrow to be levelled: reached {certificate.error:.6e}, "
        f"while no polynomial is below {certificate.lower_bound:.6e}"
    )


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
    view = _view(f, a, b, parity, weight)
    return _certificate(view, polynomial, _basis_size(degree, parity), tolerance)


@dataclass(frozen=True)
class _View:
    """The problem on t in [-1, 1]: ``x = to_x(t)`` and ``sample(t) = (f / scale, m, w)``."""

    sample: Callable[[Array], tuple[Array, Array, Array]]
    to_x: Callable[[Array], Array]
    scale: float
    interval: tuple[float, float]


def _view(f: Function, a: float, b: float, parity: Parity, weight: Function | None) -> _View:
    if parity is not None:
        a = _fold(f, a, b, parity)
    left, right = (a, b) if parity is None else (a * a, b * b)

    def to_x(t: Array) -> Array:
        if parity is None:
            # Exact on [-1, 1], where a steep f would show any rounding of x.
            return np.asarray(np.maximum(np.minimum(left / 2 + right / 2 + (right / 2 - left / 2) * t, right), left))
        # Exact at both ends, and to the last digit of x next to a left end near 0.
        square = left * ((1 - t) / 2) + right * ((1 + t) / 2)
        return np.asarray(np.maximum(np.minimum(np.sqrt(square), b), a))

    probe = to_x(-np.cos(np.pi * np.arange(65) / 64))
    scale = dyadic_scale(_values("f", f, probe))

    def sample(t: Array) -> tuple[Array, Array, Array]:
        x = to_x(t)
        # Kept away from 0, where every odd polynomial vanishes and no error can be levelled.
        y, m = _values("f", f, x) / scale, np.maximum(x, 1e-100) if parity == "odd" else _ONE
        if weight is None:
            return y, m, _ONE
        w = _values("weight", weight, x)
        if not (w > 0).all():
            raise ValueError(f"weight must be positive on the interval, got {w.min()} at {x[w.argmin()]}")
        return y, m, w

    return _View(sample, to_x, scale, (a, b))


def _fold(f: Function, a: float, b: float, parity: Parity) -> float:
    """Return the left end of the half interval that decides a problem of known parity."""
    if a >= 0:
        return a
    if a != -b:
        raise ValueError(f"interval must be symmetric or lie in x >= 0 when parity is {parity!r}, got {(a, b)}")
    x = b * np.linspace(0, 1, 33)
    there, back = _values("f", f, x), _values("f", f, -x)
    defect = there - back if parity == "even" else there + back
    if np.max(np.abs(defect)) > 1e-9 * np.max(np.abs(there)):
        raise ValueError(f"f must be {parity} on {(a, b)}, got {there[-1]} at {b} and {back[-1]} at {a}")
    return 0.0


def _values(name: str, f: Function, x: Array) -> Array:
    try:
        y = np.asarray(f(x), dtype=np.float64)
    except TypeError:
        y = np.array([f(float(v)) for v in x], dtype=np.float64)
    if y.shape != x.shape:
        y = np.broadcast_to(y, x.shape)
    if not np.isfinite(y).all():
        bad = int(np.flatnonzero(~np.isfinite(y))[0])
        raise ValueError(f"{name} must be finite on the interval, got {y[bad]} at {x[bad]}")
    return y


def _in_x(inner: Array, view: _View, parity: Parity) -> Chebyshev:
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


def _certificate(
    view: _View, polynomial: Function, basis: int, tolerance: float, reference: Array | None = None, finer: int = 1
) -> Certificate:
    def residual(t: Array) -> Array:
        f, _, w = view.sample(t)
        return np.asarray(w * (f - _values("polynomial", polynomial, view.to_x(t)) / view.scale))

    if reference is None:
        knots, density = -np.cos(np.pi * np.arange(2 * basis + 49) / (2 * basis + 48)), 11
    else:
        # Not a multiple of the exchange's density: the samples fall elsewhere.
        knots, density = np.unique(np.concatenate([[-1.0, 1.0], reference])), finer * max(24, 512 // basis) + 1
    largest, points, values = extrema(residual, knots, density, basis + 1, 3 if reference is None else 2)
    alternates = points.size == basis + 1
    bound = float(np.min(np.abs(values))) if alternates else 0.0
    f, _, w = view.sample(knots)
    noise = rounding(EPS, basis + 1) * float(np.max(w)) * (float(np.max(np.abs(f))) + largest)
    optimal = largest <= noise or (alternates and largest - bound <= max(tolerance * largest, noise))
    scale = view.scale
    return Certificate(
        error=float(largest) * scale,
        lower_bound=bound * scale,
        points=view.to_x(points),
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
