"""Newton-Schulz coefficients by gradient descent on the largest errors: the robust fit of kexue.fm 10922.

It minimises the mean of the k largest errors on a grid and prefers coefficients that stay good under small changes,
such as rounding to bfloat16. `optimal_composition` is exact and instant; this fit is for other losses, shared
coefficients, and for reproducing the published sets.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from danlu import _validate
from danlu.approx.composition import Composition, _check_interval, _measured

__all__ = ["fit_composition"]

Array = NDArray[np.float64]

_SHARED_START = (1.5, -0.5, 0.0)
_STEP_START = (3.5, -6.04444444444, 2.84444444444)
_MIX = ((0.6, 0.0), (0.2, 0.5), (0.2, -0.5))  # weight of a gradient, and its offset as a multiple of the tolerance


def fit_composition(
    steps: int = 6,
    *,
    largest: int = 50,
    coefficients: Literal["per_step", "shared"] = "per_step",
    grid: int = 10_000,
    iterations: int = 20_000,
    learning_rate: float = 1e-3,
    tolerance: float = 0.1,
    lower: float = 1e-3,
) -> Composition:
    """Fit quintic steps that bring ``j / grid``, j = 1..grid, to 1; the loss is the mean of the ``largest`` errors.

    The optimizer is Adam without bias correction, betas 0.9 and 0.999; half way the learning rate falls to a tenth. The
    gradient is 0.6 times that at w plus 0.2 times those at w + tolerance / 2 and w - tolerance / 2, each clipped to
    norm 1. The defaults take some tens of seconds on one core and give a loss of 0.079.

    Args:
        steps: number of steps.
        largest: how many of the largest errors are averaged. More of them give less oscillation near 1 and a smaller
            slope at 0.
        coefficients: one triple per step, or one shared by all.
        grid: number of points.
        iterations: number of updates.
        learning_rate: for the first half of the iterations.
        tolerance: width of the neighbourhood over which the gradient is mixed.
        lower: left end of the interval for which the result's errors are stated.

    Returns:
        The composition of lowest loss among the iterates.

    Raises:
        ValueError: if an argument is out of its range.

    Source: kexue.fm 10922.

    >>> fit = fit_composition(3, iterations=20, grid=500)
    >>> fit.steps, fit.degrees
    (3, (5, 5, 5))
    """
    _validate.integer("steps", steps)
    _validate.integer("grid", grid)
    _validate.integer("largest", largest, high=grid)
    _validate.choice("coefficients", coefficients, ["per_step", "shared"])
    _validate.integer("iterations", iterations)
    _validate.positive("learning_rate", learning_rate)
    _validate.number("tolerance", tolerance, low=0)
    _check_interval(lower, 1.0)
    shared = coefficients == "shared"
    w = np.array([_SHARED_START] if shared else [_STEP_START] * steps)
    x = np.arange(1, grid + 1) / grid
    mean, square = np.zeros_like(w), np.zeros_like(w)
    best, best_loss = w, np.inf
    for iteration in range(iterations):
        gradient = np.zeros_like(w)
        for share, place in _MIX:
            loss, slope = _loss_and_gradient(w + place * tolerance, x, steps, largest)
            if place == 0 and loss < best_loss:
                best, best_loss = w, loss
            gradient += share * slope / max(float(np.linalg.norm(slope)), 1.0)
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        lr = learning_rate if iteration < iterations / 2 else learning_rate / 10
        w = w - lr * mean / np.sqrt(square + 1e-20)
    rows = tuple(tuple(best[0 if shared else t].tolist()) for t in range(steps))
    return _measured(rows, float(lower), 1.0, f"fitted {coefficients} x {steps}, {largest} largest")


def _loss_and_gradient(w: Array, x: Array, steps: int, largest: int) -> tuple[float, Array]:
    """Return the mean of the largest errors and its gradient, to which only the points with these errors contribute."""
    rows = np.broadcast_to(w, (steps, 3))
    y = x
    for a, b, c in rows:
        square = y * y
        y = y * (a + square * (b + square * c))
    errors = np.abs(y - 1)
    worst = np.argpartition(errors, errors.size - largest)[-largest:]
    path = [x[worst]]
    for a, b, c in rows:
        square = path[-1] ** 2
        path.append(path[-1] * (a + square * (b + square * c)))
    back = np.sign(path[-1] - 1) / largest
    gradient = np.zeros((steps, 3))
    for t in range(steps - 1, -1, -1):
        y, square = path[t], path[t] ** 2
        gradient[t] = [np.sum(back * y), np.sum(back * y * square), np.sum(back * y * square**2)]
        a, b, c = rows[t]
        back = back * (a + square * (3 * b + 5 * c * square))
    return float(np.mean(errors[worst])), gradient if w.shape[0] == steps else gradient.sum(axis=0, keepdims=True)
