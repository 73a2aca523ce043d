"""Steps of linear systems: SciPy's discretisations, orders of convergence, exact projections, products in O(d)."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from scipy import signal
from scipy.special import eval_legendre
from torch import Tensor

from danlu.nn.ssm import discretize, history_step, legs, legs_product, legs_solve

SCIPY = {"forward": "euler", "backward": "backward_diff", "bilinear": "bilinear", "exact": "zoh"}


@pytest.mark.parametrize("method", SCIPY)
def test_a_step_is_scipys(method: str) -> None:
    A, B = legs(7)
    C, D = np.eye(7), np.zeros((7, 1))
    a, b, _, _, _ = signal.cont2discrete((A.numpy(), B.numpy()[:, None], C, D), 0.1, method=SCIPY[method])
    found = discretize(A, B, 0.1, method=method)  # type: ignore[arg-type]
    np.testing.assert_allclose(found[0], a, rtol=0, atol=1e-13)
    # SciPy's bilinear rules shift half of the input's effect into the output matrix: its states differ, not the B here.
    if method in ("forward", "exact"):
        np.testing.assert_allclose(found[1], b[:, 0], rtol=0, atol=1e-13)
    else:
        h = 0.1 if method == "backward" else 0.05
        np.testing.assert_allclose(found[1], 0.1 * np.linalg.solve(np.eye(7) - h * A.numpy(), B.numpy()), atol=1e-13)


def test_the_exact_step_is_the_exponential_and_needs_no_inverse() -> None:
    A, B = legs(9)
    a, b = discretize(A, B, 0.37)
    expected = scipy.linalg.expm(0.37 * A.numpy())
    np.testing.assert_allclose(a, expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(b, np.linalg.solve(A.numpy(), (expected - np.eye(9)) @ B.numpy()), rtol=0, atol=1e-12)
    a, b = discretize(torch.zeros(2, 2), torch.ones(2), 0.5)  # an integrator: A is singular
    assert torch.equal(a, torch.eye(2))
    torch.testing.assert_close(b, torch.full((2,), 0.5))


@pytest.mark.parametrize(("method", "order"), [("forward", 1), ("backward", 1), ("bilinear", 2)])
def test_the_error_falls_with_the_methods_order(method: str, order: int) -> None:
    A, B = legs(8)
    exact = discretize(A, B, 1.0)[1]
    errors = []
    for steps in (400, 800):
        a, b = discretize(A, B, 1 / steps, method=method)  # type: ignore[arg-type]
        x = torch.zeros_like(b)
        for _ in range(steps):
            x = a @ x + b
        errors.append((x - exact).norm().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.1)


def test_held_inputs_are_stepped_without_error() -> None:
    A, B = legs(8)
    a, b = discretize(A, B, 1 / 200)
    x = torch.zeros(8, dtype=torch.float64)
    for _ in range(200):
        x = a @ x + b
    assert (x - discretize(A, B, 1.0)[1]).abs().max() < 1e-13


def run_history(u: Tensor, d: int, method: str) -> Tensor:
    A, B = legs(d)
    x = torch.zeros(d, dtype=torch.float64)
    x[0] = math.sqrt(2) * u[0]
    for k in range(1, len(u)):
        a, b = history_step(A, B, k, method=method)  # type: ignore[arg-type]
        x = a @ x + b * u[k]
    return x


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("exact", [3.535533905933, 1.530931089239, 0]),
        ("bilinear-post", [4.369845, 1.902567, -0.408252]),
        ("bilinear", [3.555011, 1.641618, 0.018922]),
    ],
)
def test_the_state_after_one_two_three_four(method: str, expected: list[float]) -> None:
    """Kexue.fm 10137 replaces ln((k+1)/k) by 1/k: 4.37 where the projection is 3.54."""
    u = torch.arange(1, 5, dtype=torch.float64)
    np.testing.assert_allclose(run_history(u, 3, method), expected, rtol=0, atol=1e-11 if method == "exact" else 6e-7)


@pytest.mark.parametrize("d", [1, 8, 64])
def test_the_exact_recursion_is_the_projection_of_the_step_signal(d: int) -> None:
    K = 1000 if d < 64 else 200
    u = torch.randn(K, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    edges = 2 * np.arange(K + 1) / K - 1
    n = np.arange(d)[:, None]
    # The integral of P_n is (P_{n+1} - P_{n-1}) / (2n+1).
    before = np.where(n > 0, eval_legendre(np.maximum(n - 1, 0), edges), 1.0)
    antiderivative = np.where(n > 0, (eval_legendre(n + 1, edges) - before) / (2 * n + 1), edges)
    expected = np.sqrt(n + 0.5)[:, 0] * (np.diff(antiderivative, axis=1) @ u.numpy())
    np.testing.assert_allclose(run_history(u, d, "exact"), expected, rtol=0, atol=1e-12)


def test_a_signal_played_at_another_speed_gives_the_same_state() -> None:
    u = torch.randn(30, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    slow = u.repeat_interleave(3)
    np.testing.assert_allclose(run_history(u, 6, "exact"), run_history(slow, 6, "exact"), rtol=0, atol=1e-12)


def test_forgetting_is_slow_and_bounded_by_the_order() -> None:
    A, B = legs(8)
    for ratio, value in [(10, 3.16), (100, 6.88), (1000, 7.88)]:
        spread = torch.linalg.matrix_norm(discretize(A, B, math.log(ratio))[0], 2).item() * ratio
        assert spread == pytest.approx(value, abs=0.005)


@pytest.mark.parametrize("d", [1, 2, 37, 256])
@pytest.mark.parametrize("step", [1e-3, 0.5, 3.0])
def test_product_and_solve_equal_the_dense_ones(d: int, step: float) -> None:
    A, _ = legs(d)
    v = torch.randn(3, d, generator=torch.Generator().manual_seed(d), dtype=torch.float64)
    dense = v @ A.T
    assert (legs_product(v) - dense).norm() / dense.norm() < 1e-12
    solved = torch.linalg.solve(torch.eye(d, dtype=torch.float64) - step * A, v.T).T
    assert (legs_solve(v, step) - solved).norm() / solved.norm() < 1e-12


def test_impossible_steps_are_rejected_by_name() -> None:
    A, B = legs(3)
    for call, message in [
        (lambda: discretize(A, B, 0.0), "step"),
        (lambda: discretize(A, B, 1.0, method="zoh"), "method"),  # type: ignore[arg-type]
        (lambda: discretize(A[:2], B, 1.0), "A must be"),
        (lambda: history_step(A, B, 0), "k must"),
        (lambda: legs_solve(B, -1.0), "step"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
