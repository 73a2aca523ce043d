"""A problem of best approximation as the exchange sees it, and what f may give."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from danlu.approx._exchange import dyadic_scale

Array = NDArray[np.float64]
Function = Callable[[Any], Any]
Parity = Literal["odd", "even"] | None

_ONE = np.ones(1)


@dataclass(frozen=True)
class View:
    """The problem on t in [-1, 1]: ``x = to_x(t)`` and ``sample(t) = at(to_x(t)) = (f / scale, m, w)``."""

    sample: Callable[[Array], tuple[Array, Array, Array]]
    at: Callable[[Array], tuple[Array, Array, Array]]
    to_x: Callable[[Array], Array]
    to_t: Callable[[Array], Array]
    scale: float
    interval: tuple[float, float]


def view_of(f: Function, a: float, b: float, parity: Parity, weight: Function | None) -> View:
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

    def to_t(x: Array) -> Array:
        place = x if parity is None else x * x
        return np.asarray(np.clip((place - left) / (right - left) - (right - place) / (right - left), -1, 1))

    probe = to_x(-np.cos(np.pi * np.arange(65) / 64))
    scale = dyadic_scale(values_of("f", f, probe))

    def at(x: Array) -> tuple[Array, Array, Array]:
        # Kept away from 0, where every odd polynomial vanishes and no error can be levelled.
        y, m = values_of("f", f, x) / scale, np.maximum(x, 1e-100) if parity == "odd" else _ONE
        if weight is None:
            return y, m, _ONE
        w = values_of("weight", weight, x)
        if not (w > 0).all():
            raise ValueError(f"weight must be positive on the interval, got {w.min()} at {x[w.argmin()]}")
        return y, m, w

    return View(lambda t: at(to_x(t)), at, to_x, to_t, scale, (a, b))


def _fold(f: Function, a: float, b: float, parity: Parity) -> float:
    """Return the left end of the half interval that decides a problem of known parity."""
    if a >= 0:
        return a
    if a != -b:
        raise ValueError(f"interval must be symmetric or lie in x >= 0 when parity is {parity!r}, got {(a, b)}")
    x = b * np.linspace(0, 1, 33)
    there, back = values_of("f", f, x), values_of("f", f, -x)
    defect = there - back if parity == "even" else there + back
    if np.max(np.abs(defect)) > 1e-9 * np.max(np.abs(there)):
        raise ValueError(f"f must be {parity} on {(a, b)}, got {there[-1]} at {b} and {back[-1]} at {a}")
    return 0.0


def values_of(name: str, f: Function, x: Array) -> Array:
    try:
        found = np.asarray(f(x))
        y = found if found.dtype == np.float64 else _real(name, found, x)
    except TypeError:
        y = _real(name, np.array([f(float(v)) for v in x]), x)
    if y.shape != x.shape:
        y = np.broadcast_to(y, x.shape)
    if b"\0" in np.isfinite(y).tobytes():  # half the time of all()
        bad = int(np.flatnonzero(~np.isfinite(y))[0])
        raise ValueError(f"{name} must be finite on the interval, got {y[bad]} at {x[bad]}")
    return y


def _real(name: str, values: NDArray[Any], x: Array) -> Array:
    """Return the values in float64; a complex one that is not real is an error, not a real part."""
    if values.dtype == object:
        values = np.array([complex(v) for v in values.ravel()]).reshape(values.shape)
    if np.iscomplexobj(values):
        imaginary = np.broadcast_to(values.imag != 0, x.shape)
        if imaginary.any():
            bad = int(np.flatnonzero(imaginary)[0])
            raise ValueError(
                f"{name} must be real on the interval, got {np.broadcast_to(values, x.shape)[bad]} at {x[bad]}"
            )
        values = values.real
    return values.astype(np.float64)
