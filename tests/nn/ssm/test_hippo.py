"""HiPPO's matrices: printed values, rescalings with the sources' misprints, the differential equations they solve."""

import math

import numpy as np
import pytest
import scipy.integrate
import torch
from scipy.special import eval_legendre
from torch import Tensor

from danlu.nn.ssm import (
    fourier_history,
    fourier_window,
    legendre,
    legs,
    legs_eigenvector_sums,
    legt,
    rescale,
)


def close(a: Tensor, b: object, atol: float = 1e-12) -> None:
    np.testing.assert_allclose(a, b, rtol=0, atol=atol)


def test_the_printed_matrices_of_order_four() -> None:
    A, B = legs(4)
    rows = [[-1, 0, 0, 0], [-1.732051, -2, 0, 0], [-2.236068, -3.872983, -3, 0], [-2.645751, -4.582576, -5.916080, -4]]
    close(A, rows, 5e-7)
    close(B, [1.414214, 2.449490, 3.162278, 3.741657], 5e-7)
    A, B = legt(4)
    close(A[0], [-1, 1.732051, -2.236068, 2.645751], 5e-7)
    close(A[3], [-2.645751, -4.582576, -5.916080, -7], 5e-7)
    close(B, [1.414214, 2.449490, 3.162278, 3.741657], 5e-7)


@pytest.mark.parametrize("d", [1, 5, 32])
def test_every_rescaling_is_its_closed_form(d: int) -> None:
    n = np.arange(d)
    row, column, w = n[:, None], n[None, :], 1.7
    sign = np.where(column > row, 1.0, 1.0) * (-1.0) ** (row - column)
    root = np.sqrt((2 * row + 1) * (2 * column + 1))
    branch = np.where(column < row, 1.0, sign)
    close(legt(d, window=w)[0], -root / w * branch)
    close(legt(d, window=w, scaling="paper")[0], -root / w * branch)
    close(legt(d, window=w, scaling="paper")[1], np.sqrt(2 * n + 1) / w)
    close(legt(d, window=w, scaling="rational")[0], -(2 * row + 1) / w * branch)
    close(legt(d, window=w, scaling="rational")[1], (2 * n + 1) / w)
    lower, diagonal = np.tril(np.ones((d, d)), -1), np.diag(n + 1.0)
    close(legs(d, scaling="paper")[0], -root * lower - diagonal)
    close(legs(d, scaling="paper")[1], np.sqrt(2 * n + 1))
    close(legs(d, scaling="rational")[0], -(2 * row + 1) * lower - diagonal)
    close(legs(d, scaling="rational")[1], 2 * n + 1)


def test_the_printed_scale_of_the_memory_unit_is_off_by_a_root_of_two() -> None:
    """Kexue.fm 10114 prints lambda_n = 2 / sqrt(2n+1); B = (2n+1) / w needs sqrt(2 / (2n+1))."""
    n = torch.arange(7, dtype=torch.float64)
    A, B = legt(7)
    close(rescale(A, B, (2 / (2 * n + 1)).sqrt())[1], 2 * n + 1)
    close(rescale(A, B, 2 / (2 * n + 1).sqrt())[1], (2 * n + 1) / math.sqrt(2))


def test_the_memory_units_matrices_are_these_with_time_reversed() -> None:
    """LMU: A_nk = (2n+1) {-1 for n < k, (-1)^{n-k+1} otherwise}, B_n = (2n+1) (-1)^n (Voelker et al., 2019)."""
    d = 9
    n = torch.arange(d, dtype=torch.float64)
    lmu = (2 * n[:, None] + 1) * torch.where(n[:, None] < n, -1.0, -(1 - 2 * ((n[:, None] - n).abs() % 2)))
    flip = torch.diag(1 - 2 * (n % 2))
    A, B = legt(d, scaling="rational")
    close(flip @ A @ flip, lmu)
    close(flip @ B, (2 * n + 1) * (1 - 2 * (n % 2)))


def test_two_published_programs_differ_by_the_window_they_take() -> None:
    """state-spaces/s4 halves LegT's matrices of hippo-code: a window of 2 for one of 1."""
    for a, b in zip(legt(8, window=2.0), legt(8)):
        close(a, b / 2)


def test_the_corrected_fourier_window_is_the_real_one_of_s4() -> None:
    """Its `fourier2`: real pairs cos, sin of frequency n, coupling 2 for the constant, 4 between two cosines."""
    N = 4
    A, _ = fourier_window(N)
    real = torch.zeros(2 * N + 1, 2 * N + 1, dtype=torch.float64)
    cosine = torch.zeros(2 * N + 1, dtype=torch.float64)
    cosine[0], cosine[1::2] = 1, math.sqrt(2)
    for n in range(1, N + 1):
        real[2 * n - 1, 2 * n], real[2 * n, 2 * n - 1] = -2 * math.pi * n, 2 * math.pi * n
    real -= 2 * torch.outer(cosine, cosine)
    found, expected = (torch.linalg.eigvals(M + 0j) for M in (A, real))
    close(found.real.sort().values, sorted(expected.real.tolist()), 1e-9)
    close(found.imag.sort().values, sorted(expected.imag.tolist()), 1e-9)


def test_the_fourier_historys_eigenvalues_all_have_real_part_minus_one() -> None:
    A, B = fourier_history(16)
    close(torch.linalg.eigvals(A).real, -np.ones(33), 1e-9)
    close(B, np.ones(33))


def test_legendre_polynomials_are_scipys_and_orthonormal() -> None:
    s = torch.linspace(-1, 1, 41, dtype=torch.float64)
    for n in range(10):
        close(legendre(10, s)[:, n], math.sqrt(n + 0.5) * eval_legendre(n, s.numpy()), 1e-13)
    nodes, weights = np.polynomial.legendre.leggauss(12)
    g = legendre(10, torch.from_numpy(nodes))
    close(g.T @ (torch.from_numpy(weights)[:, None] * g), np.eye(10), 1e-13)


def u(t: np.ndarray) -> np.ndarray:
    return np.sin(2 * t) + 0.3 * np.cos(5 * t + 1)


def projection(d: int, begin: float, end: float) -> Tensor:
    """Coefficients of u on [begin, end], mapped to [-1, 1]; quadrature far beyond the polynomials' degree."""
    nodes, weights = np.polynomial.legendre.leggauss(200)
    values = torch.from_numpy(weights * u((nodes + 1) / 2 * (end - begin) + begin))
    return values @ legendre(d, torch.from_numpy(nodes))


def residual(d: int, *, whole: bool) -> float:
    """How far the coefficients' true rate of change is from the equation's, relative."""
    T, w, h = 2.3, 1.5, 1e-4
    ends = [T - h, T, T + h]
    before, now, after = (projection(d, 0.0 if whole else end - w, end) for end in ends)
    A, B = legs(d) if whole else legt(d, window=w)
    rate = (A @ now + B * float(u(np.array(T)))) / (T if whole else 1)
    return float(((after - before) / (2 * h) - rate).abs().max())


def test_the_growing_windows_equation_is_exact_at_every_order() -> None:
    for d in (1, 4, 12):
        assert residual(d, whole=True) < 1e-6 * d**2  # central differences: h^2 u''' / 6 through each polynomial


def test_the_moving_windows_error_falls_faster_than_any_power() -> None:
    errors = [residual(d, whole=False) for d in (4, 8, 12)]
    assert errors[0] > 10 * errors[1] > 100 * errors[2] > 0


@pytest.mark.parametrize("d", [3, 6, 12])
def test_eigenvectors_of_the_growing_window_are_exact_rationals(d: int) -> None:
    """Kexue.fm 10162 has S_{lambda-1} = 0; it is S_{lambda-2} that vanishes, and the closed form holds from there."""
    f = math.factorial
    for eigenvalue in range(1, d + 1):
        S = legs_eigenvector_sums(d, eigenvalue)
        for n in range(d):
            closed = 0
            if n >= eigenvalue - 1:
                top = (-1) ** (d - n - 1) * f(d - eigenvalue) * f(n + eigenvalue)
                closed = top / math.prod((f(d + eigenvalue - 1), f(n - eigenvalue + 1)))
            assert float(S[n]) == pytest.approx(closed, rel=1e-14, abs=0)
        assert S[eigenvalue - 1] != 0
        # (A v)_n = -lambda v_n in sums, exactly: (2n+1) S_{n-1} + (n+1) (S_n - S_{n-1}) = lambda (S_n - S_{n-1}).
        for n in range(d):
            below = S[n - 1] if n else 0
            assert (2 * n + 1) * below + (n + 1) * (S[n] - below) == eigenvalue * (S[n] - below)


def test_eigenvector_sums_shrink_as_the_corrected_asymptote() -> None:
    """Kexue.fm 10162 prints sqrt(d) 2^{-4d/3}; it is (4/3) sqrt(2 pi / 3) d^{3/2} 2^{-4d/3}."""
    for d, value in [(6, 0.114286), (12, 1.2432e-3), (24, 5.32375e-8), (48, 3.49226e-17)]:
        S = abs(float(legs_eigenvector_sums(d, d // 3)[d // 3]))
        assert pytest.approx(value, rel=1e-5) == S
        if d >= 24:
            assert S / (4 / 3 * math.sqrt(2 * math.pi / 3) * d**1.5 * 2 ** (-4 * d / 3)) == pytest.approx(1, abs=0.01)


def test_the_time_invariant_systems_impulse_response_is_a_legendre_polynomial_of_an_exponential() -> None:
    A, B = legs(8)
    for t in (0.0, 0.3, 2.0):
        n = np.arange(8)
        expected = np.sqrt(2 * (2 * n + 1)) * math.exp(-t) * eval_legendre(n, 2 * math.exp(-t) - 1)
        close(torch.linalg.matrix_exp(t * A) @ B, expected, 1e-13)


def test_the_state_of_a_window_is_the_integral_of_its_equation() -> None:
    A, B = (t.numpy() for t in legt(12))
    solved = scipy.integrate.solve_ivp(lambda t, x: A @ x + B * u(t), (0, 3), np.zeros(12), rtol=1e-10, atol=1e-12)
    close(torch.from_numpy(solved.y[:, -1]), projection(12, 2.0, 3.0), 1e-3)


def test_impossible_sizes_are_rejected_by_name() -> None:
    for call, message in [
        (lambda: legt(0), "d must"),
        (lambda: legt(3, window=0.0), "window"),
        (lambda: legs(3, scaling="papper"), "did you mean 'paper'"),  # type: ignore[arg-type]
        (lambda: fourier_window(0), "harmonics"),
        (lambda: legs_eigenvector_sums(3, 4), "eigenvalue"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
