"""Pseudo-inverse: by SVD, applied without being formed, and by an iteration of matrix products."""

import torch
from torch import Tensor

from danlu._validate import choice, integer, number
from danlu.linalg._matrix import holds, in_own_dtype
from danlu.linalg.lowrank.matrix import as_tensor, check_finite, solve_triangular

ITERATIONS = ("chebyshev", "nystromformer")


@in_own_dtype
def pinv(A: Tensor, *, rtol: float | None = None) -> Tensor:
    """Moore–Penrose inverse A⁺ (…, n, m), the minimiser of ‖AB − I‖_F with the smallest norm; differentiable.

    It is computed from the SVD as V Σ⁺ Uᵀ; using AᵀA would square the condition number.

    Args:
        A: (…, m, n), float32 or float64.
        rtol: singular values at or below ``rtol`` times the largest count as zero; default max(m, n) eps.

    Raises:
        TypeError: a dtype other than float32 and float64.
        ValueError: fewer than two dimensions, an empty matrix, NaN or Inf, or ``rtol`` outside [0, 1).

    >>> A = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 2.0]])
    >>> pinv(A)
    tensor([[1.0000, 0.0000, 0.0000],
            [0.0000, 0.0000, 0.5000]])
    """
    as_tensor("A", A)
    check_finite("A", A.detach().abs().amax((-2, -1)), A)
    if rtol is not None:
        number("rtol", rtol, low=0, high=1, high_open=True)
    inverse: Tensor = torch.linalg.pinv(A, rtol=rtol)
    return inverse


@in_own_dtype
def least_squares(A: Tensor, M: Tensor) -> Tensor:
    """A⁺ M (…, n, k), the minimiser of ‖AB − M‖_F, by QR and never through A⁺ itself.

    On smooth kernels the columns are dependent to 12 digits; products with an explicit A⁺ then lose all accuracy while
    this keeps the residual at the optimum. Rank-deficient systems get the minimum-norm solution.

    Args:
        A: (…, m, n), float32 or float64.
        M: (…, m, k) of the same dtype.

    Raises:
        TypeError: dtypes that differ or are not float32 or float64.
        ValueError: row counts that differ, empty matrices, NaN or Inf.

    >>> A = torch.tensor([[1.0], [1.0]])
    >>> round(least_squares(A, torch.tensor([[1.0], [3.0]])).item(), 5)
    2.0
    """
    as_tensor("A", A)
    as_tensor("M", M)
    if M.dtype != A.dtype:
        raise TypeError(f"M must have A's dtype {A.dtype}, got {M.dtype}")
    if M.shape[-2] != A.shape[-2]:
        raise ValueError(f"M must have as many rows as A ({A.shape[-2]}), got shape {tuple(M.shape)}")
    check_finite("A", A.detach().abs().amax((-2, -1)), A)
    check_finite("M", M.detach().abs().amax((-2, -1)), M)
    size = max(A.shape[-2:])
    if A.shape[-2] < A.shape[-1]:
        # Minimum norm: A = RᵀQᵀ, so A⁺ = Q R⁻ᵀ for full row rank.
        Q, R = torch.linalg.qr(A.mT)
        diagonal = R.diagonal(dim1=-2, dim2=-1).abs()
        rtol = size * torch.finfo(A.dtype).eps
        if holds(diagonal.amin(-1) > rtol * diagonal.amax(-1), unknown=False):
            inner: Tensor = torch.linalg.solve_triangular(R.mT, M, upper=False)
        else:
            inner = torch.linalg.pinv(R.mT, rtol=rtol) @ M
        solution: Tensor = Q @ inner
        return solution
    Q, R = torch.linalg.qr(A)
    return solve_triangular(R, Q.mT @ M, size)


@in_own_dtype
def iterative_pinv(A: Tensor, *, method: str = "chebyshev", condition: float = 1e3, steps: int | None = None) -> Tensor:
    """Pseudo-inverse (…, n, m) by matrix products, four of the small side per step: for accelerators and autograd.

    Every step maps the eigenvalues x of A V by a quartic with x = 0 fixed:

    * ``"nystromformer"``: x(13 − 15x + 7x² − x³)/4 (Xiong et al., arXiv 2102.03902, equation 11). It multiplies a small
      eigenvalue by 3.25, and the eigenvalues are *squared* singular values: the usual six steps suffice up to a
      condition number of about 30 only.
    * ``"chebyshev"``: the quartic that is closest to 1 on the interval that still contains eigenvalues,
      1 − T₄(t)/T₄(t₀), rescaled after each step. It multiplies a small eigenvalue by nearly 16: at condition number 539
      the relative error is 6e-4 after six steps and 1e-11 after seven, where six Nyströmformer steps leave 0.98.

    Args:
        A: (…, m, n), float32 or float64.
        method: as above.
        condition: the ratio σ_max/σ_min for which ``"chebyshev"`` is designed; smaller singular values are inverted
            only in part, as with regularisation. Ignored by ``"nystromformer"``.
        steps: number of steps; None means as many as ``condition`` needs (``"chebyshev"``), six (``"nystromformer"``).

    Raises:
        TypeError: a dtype other than float32 and float64.
        ValueError: an empty matrix, NaN or Inf, ``condition`` below 1 or beyond 1/sqrt(eps) for the dtype.

    >>> A = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    >>> V = iterative_pinv(A, condition=10.0)
    >>> torch.allclose(A @ V, torch.eye(2, dtype=torch.float64), atol=1e-13)
    True
    """
    as_tensor("A", A)
    choice("method", method, ITERATIONS)
    check_finite("A", A.detach().abs().amax((-2, -1)), A)
    eps = torch.finfo(A.dtype).eps
    number("condition", condition, low=1, high=eps**-0.5)
    if steps is not None:
        integer("steps", steps)
    if A.shape[-2] > A.shape[-1]:
        return iterative_pinv(A.mT, method=method, condition=condition, steps=steps).mT
    # ‖A‖₂² ≤ ‖A‖₁ ‖A‖_∞, so the eigenvalues of A V start in [0, 1].
    bound = A.abs().sum(-2).amax(-1) * A.abs().sum(-1).amax(-1)
    bound = torch.where(bound > 0, bound, torch.ones_like(bound))[..., None, None]
    if method == "nystromformer":
        V = A.mT / bound
        for _ in range(steps or 6):
            V = _quartic(A @ V, V, (13 / 4, -15 / 4, 7 / 4, -1 / 4))
        return V
    # This bound can be loose by the ratio of the norms; an estimate from a few power steps is tight.
    V = A.mT / _spectral_bound(A, bound)
    for coefficients in _chebyshev_steps(condition**-2 / A.shape[-2] ** 0.125, steps, eps):
        V = _quartic(A @ V, V, coefficients)
    return V


def _quartic(X: Tensor, V: Tensor, c: tuple[float, float, float, float]) -> Tensor:
    """V (c₀ + c₁X + c₂X² + c₃X³)."""
    eye = torch.eye(X.shape[-1], dtype=X.dtype, device=X.device)
    inner = c[2] * eye + c[3] * X
    inner = c[1] * eye + X @ inner
    return V @ (c[0] * eye + X @ inner)


def _spectral_bound(A: Tensor, bound: Tensor) -> Tensor:
    """An upper bound of ‖A‖₂²: the trace of (AAᵀ)⁸ to the power 1/8, at most m^(1/8) times the true value."""
    G = A @ A.mT / bound
    for _ in range(2):
        G = G @ G
    largest: Tensor = torch.linalg.vector_norm(G, dim=(-2, -1), keepdim=True) ** 0.25 * bound
    return torch.where(largest > 0, largest, torch.ones_like(largest))


def _chebyshev_steps(lower: float, steps: int | None, eps: float) -> list[tuple[float, float, float, float]]:
    """Coefficients of each step, for eigenvalues in [lower, 1] at the start."""
    low, high = lower, 1.0
    designed: list[tuple[float, float, float, float]] = []
    while steps is None or len(designed) < steps:
        # 1 - p(x) = T4(t)/T4(t0), t = (high + low - 2x)/(high - low): levelled on [low, high], 1 at x = 0.
        middle, half = (high + low) / 2, (high - low) / 2
        t0 = middle / half if half > 0 else float("inf")
        level = 1 / (8 * t0**4 - 8 * t0**2 + 1)
        # Taylor coefficients of T4(t0 - x/half) at x = 0, by the derivatives of T4 = 8t⁴ − 8t² + 1.
        d1, d2, d3, d4 = 32 * t0**3 - 16 * t0, 96 * t0**2 - 16, 192 * t0, 192.0
        c = (d1 * level / half, -d2 / 2 * level / half**2, d3 / 6 * level / half**3, -d4 / 24 * level / half**4)
        designed.append(c)
        low, high = 1 - level, 1 + level
        if level < eps:
            if steps is None:
                break
            low, high = 1 - eps, 1 + eps
    return designed
