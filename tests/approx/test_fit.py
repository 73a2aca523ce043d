"""The robust fit: its gradient, its direction, and what it leaves alone."""

import numpy as np
import pytest
import torch

from danlu.approx import fit_composition, published
from danlu.approx.fit import _loss_and_gradient


def top_loss(f, largest=50):
    x = np.arange(1, 10001) / 10000
    return float(np.sort(np.abs(f(x) - 1))[-largest:].mean())


@pytest.mark.parametrize("rows", [1, 4])
def test_gradient_is_the_derivative_of_the_loss(rows):
    w = np.array([(3.5, -6.0, 2.8)] * rows) + 0.01 * np.random.default_rng(0).standard_normal((rows, 3))
    x = np.arange(1, 1009) / 1008
    _, gradient = _loss_and_gradient(w, x, 4, 37)
    for index in np.ndindex(w.shape):
        step = np.zeros_like(w)
        step[index] = 1e-7
        difference = (_loss_and_gradient(w + step, x, 4, 37)[0] - _loss_and_gradient(w - step, x, 4, 37)[0]) / 2e-7
        assert difference == pytest.approx(gradient[index], rel=1e-4, abs=1e-4)


def test_fit_lowers_the_mean_of_the_largest_errors():
    start, later = fit_composition(6, iterations=1, grid=2000), fit_composition(6, iterations=300, grid=2000)
    assert top_loss(later) < 0.5 * top_loss(start)


def test_shared_coefficients_are_one_row():
    fit = fit_composition(4, coefficients="shared", iterations=50, grid=1000)
    assert len(set(fit.coefficients)) == 1
    assert fit.steps == 4


def test_fit_is_deterministic():
    one, other = (fit_composition(3, iterations=30, grid=700) for _ in range(2))
    assert one.coefficients == other.coefficients


def test_published_fit_has_the_stated_loss():
    assert top_loss(published("su_x50")) == pytest.approx(0.0789, abs=5e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"largest": 101, "grid": 100}, "largest must be an integer from 1 to 100"),
        ({"coefficients": "both"}, "coefficients must be one of"),
        ({"iterations": 0}, "iterations must be"),
        ({"tolerance": -1.0}, "tolerance must be in"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        fit_composition(**arguments)


def fitted_by_definition(steps, *, largest, grid, iterations, rate, tolerance):
    """Return the fit as its source describes it, with derivatives by autograd."""
    w = torch.tensor([[3.5, -6.04444444444, 2.84444444444]] * steps, dtype=torch.float64)
    x = torch.arange(1, grid + 1, dtype=torch.float64) / grid

    def loss_and_gradient(w):
        w = w.clone().requires_grad_()
        y = x
        for a, b, c in w:
            y = a * y + b * y**3 + c * y**5
        loss = (y - 1).abs().topk(largest).values.mean()
        return loss.item(), torch.autograd.grad(loss, w)[0]

    def clipped(w):
        gradient = loss_and_gradient(w)[1]
        return gradient / gradient.norm().clamp_min(1)

    mean, square = torch.zeros_like(w), torch.zeros_like(w)
    path = []
    for iteration in range(iterations):
        path.append((loss_and_gradient(w)[0], w))
        half = tolerance / 2
        gradient = 0.6 * clipped(w) + 0.2 * clipped(w + half) + 0.2 * clipped(w - half)
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
        w = w - (rate if 2 * iteration < iterations else rate / 10) * mean / (square + 1e-20).sqrt()
    return min(path, key=lambda place: place[0])


@pytest.mark.parametrize("rate", [1e-3, 3e-2])
def test_the_fit_is_its_definition_mixture_falling_rate_and_best_iterate_included(rate):
    options = {"largest": 7, "grid": 211, "iterations": 40, "tolerance": 0.1}
    fit = fit_composition(3, learning_rate=rate, **options)
    loss, w = fitted_by_definition(3, rate=rate, **options)
    # Two points whose errors are nearly equal may change places among the largest.
    np.testing.assert_allclose(fit.coefficients, w.numpy(), rtol=1e-4)
    x = np.arange(1, 212) / 211
    assert np.sort(np.abs(fit(x) - 1))[-7:].mean() == pytest.approx(loss, rel=1e-4)
