r"""HiPPO: the state as the best polynomial or trigonometric memory of the input (Gu et al., arXiv 2008.07669).

The state holds the coefficients ``c_n`` of the past input in an orthonormal basis of a window that moves (LegT, the
Fourier window) or grows (LegS, the Fourier history). Differentiating them gives a linear system,

* window of length ``w``:  ``x' = A x + B u``;
* whole history up to ``t``:  ``x' = (A x + B u) / t``.

All matrices are float64; the minus sign of HiPPO-LegS is inside ``A``. Derivations: kexue.fm 10114, 10137.
"""

import math
from fractions import Fraction
from typing import Literal, get_args

import torch
from torch import Tensor

from danlu._validate import choice, integer, positive

Scaling = Literal["orthonormal", "paper", "rational"]


def _scale(d: int, scaling: str) -> Tensor:
    """``lambda`` of ``c = lambda c~``: the coefficients' own size in each scaling."""
    choice("scaling", scaling, get_args(Scaling))
    n = torch.arange(d, dtype=torch.float64)
    if scaling == "orthonormal":
        return torch.ones_like(n)
    return torch.full_like(n, math.sqrt(2)) if scaling == "paper" else (2 / (2 * n + 1)).sqrt()


def rescale(A: Tensor, B: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The same system for ``c~ = c / scale``: ``A -> diag(1/scale) A diag(scale)``, ``B -> B / scale``.

    Args:
        A: ``(d, d)``.
        B: ``(d,)``.
        scale: ``(d,)``, no zeros.
    """
    return A * scale / scale[:, None], B / scale


def legt(d: int, *, window: float = 1.0, scaling: Scaling = "orthonormal") -> tuple[Tensor, Tensor]:
    r"""LegT, Legendre polynomials on the last ``window``: ``x' = A x + B u``.

    ``A_nk = -(1/w) sqrt((2n+1)(2k+1)) {1 for k < n, (-1)^{n-k} for k >= n}``, ``B_n = sqrt(2 (2n+1)) / w``.

    Args:
        d: number of coefficients.
        window: its length ``w``. (state-spaces/s4 takes 2, hippo-code 1: hence its factor of a half.)
        scaling: of the coefficients: ``orthonormal``; ``paper`` for ``B = sqrt(2n+1) / w``; ``rational`` for a system
            without roots, ``B = (2n+1) / w``, which reversed in time is the LMU's (scale ``sqrt(2/(2n+1))``; kexue.fm
            10114 prints ``2/sqrt(2n+1)``, which gives ``B = (2n+1) / (sqrt(2) w)``).

    Returns:
        ``A`` ``(d, d)`` and ``B`` ``(d,)``, float64.

    >>> A, B = legt(2, scaling="rational")
    >>> A.round(decimals=9).tolist(), B.round(decimals=9).tolist()
    ([[-1.0, 1.0], [-3.0, -3.0]], [1.0, 3.0])
    """
    integer("d", d)
    positive("window", window)
    n = torch.arange(d, dtype=torch.float64)
    root = (2 * n + 1).sqrt()
    sign = 1 - 2 * ((n[:, None] - n) % 2)
    A = -root[:, None] * root * torch.where(n < n[:, None], 1.0, sign) / window
    B = math.sqrt(2) * root / window
    return rescale(A, B, _scale(d, scaling))


def legs(d: int, *, scaling: Scaling = "orthonormal") -> tuple[Tensor, Tensor]:
    r"""LegS, Legendre polynomials on the whole history: ``x' = (A x + B u) / t``.

    ``A_nk = -{sqrt((2n+1)(2k+1)) for k < n, n + 1 for k = n, 0 for k > n}``, ``B_n = sqrt(2 (2n+1))``; the eigenvalues
    are ``-1 ... -d``. Without the ``1/t`` it is the system that S4 starts from.

    Args:
        d: number of coefficients.
        scaling: ``orthonormal``; ``paper`` for ``B = sqrt(2n+1)``; ``rational`` for ``B = 2n+1``.

    Returns:
        ``A`` ``(d, d)`` and ``B`` ``(d,)``, float64.

    >>> legs(2)[1].square().round(decimals=9).tolist(), legs(2)[0][1].round(decimals=3).tolist()
    ([2.0, 6.0], [-1.732, -2.0])
    """
    integer("d", d)
    n = torch.arange(d, dtype=torch.float64)
    root = (2 * n + 1).sqrt()
    A = -(root[:, None] * root).tril(-1) - torch.diag(n + 1)
    return rescale(A, math.sqrt(2) * root, _scale(d, scaling))


def fourier_window(harmonics: int, *, window: float = 1.0, midpoint: bool = False) -> tuple[Tensor, Tensor]:
    r"""Fourier coefficients ``n = -N ... N`` of the last ``window``: ``x' = A x + B u``.

    ``A_nk = (2 pi i n delta_nk - 2) / w``, ``B = 2 / w``. The value that leaves the window is read off the series at
    its jump, where the series gives the mean of both ends: ``u(T - w) = 2 sum_k c_k - u(T)``.

    Args:
        harmonics: N.
        window: its length ``w``.
        midpoint: take the series itself for ``u(T - w)``, as kexue.fm 10114 does: 1 in the place of both 2. Its error
            does not fall with N; here for comparison.

    Returns:
        ``A`` ``(2N+1, 2N+1)`` and ``B`` ``(2N+1,)``, complex128.
    """
    integer("harmonics", harmonics)
    positive("window", window)
    n = torch.arange(-harmonics, harmonics + 1, dtype=torch.float64)
    coupling = 1.0 if midpoint else 2.0
    A = (torch.diag(2j * math.pi * n) - coupling) / window
    return A, torch.full_like(A[0], coupling / window)


def fourier_history(harmonics: int) -> tuple[Tensor, Tensor]:
    r"""Fourier coefficients ``n = -N ... N`` of the whole history: ``x' = (A x + B u) / t``.

    ``A_nk = -n / (n - k)`` off the diagonal, ``i pi n - 1`` on it, ``B = 1`` (kexue.fm 10137). Every eigenvalue has the
    real part -1; the equation's residual falls as ``1/N``.

    Args:
        harmonics: N.

    Returns:
        ``A`` ``(2N+1, 2N+1)`` and ``B`` ``(2N+1,)``, complex128.
    """
    integer("harmonics", harmonics)
    n = torch.arange(-harmonics, harmonics + 1, dtype=torch.float64)
    gap = n[:, None] - n
    off = torch.where(gap == 0, 0.0, -n[:, None] / gap.where(gap != 0, 1.0))
    A = off + torch.diag(1j * math.pi * n - 1)
    return A, torch.ones_like(A[0])


def legendre(d: int, s: Tensor) -> Tensor:
    """Orthonormal Legendre polynomials ``sqrt((2n+1)/2) P_n`` for ``n < d`` at ``s`` in [-1, 1]: ``s.shape + (d,)``.

    >>> legendre(3, torch.tensor([1.0], dtype=torch.float64)).square().round(decimals=9).tolist()
    [[0.5, 1.5, 2.5]]
    """
    integer("d", d)
    values = [torch.ones_like(s), s]
    for n in range(1, d - 1):
        values.append(((2 * n + 1) * s * values[n] - n * values[n - 1]) / (n + 1))
    size = (torch.arange(d, dtype=s.dtype, device=s.device) + 0.5).sqrt()
    return torch.stack(values[:d], dim=-1) * size


def legs_eigenvector_sums(d: int, eigenvalue: int) -> list[Fraction]:
    r"""Exact partial sums ``S_n = sum_{k <= n} sqrt(2k+1) v_k`` of an eigenvector of ``-A`` of `legs`, ``S_{d-1} = 1``.

    ``S_{n-1} = (lambda - n - 1) / (lambda + n) S_n``; in closed form, for ``n >= lambda - 1``,
    ``S_n = (-1)^{d-n-1} (d-lambda)! (n+lambda)! / ((d+lambda-1)! (n-lambda+1)!)``, and 0 below. (kexue.fm 10162 has
    ``S_{lambda-1} = 0`` and the closed form above it only; ``S_{lambda-1}`` is not zero.) They reach ``4^{2d/3}`` times
    their smallest, which is why no floating-point number diagonalises LegS:
    ``|S_{d/3}| ~ (4/3) sqrt(2 pi / 3) d^{3/2} 2^{-4d/3}`` at ``lambda = d / 3``.

    Args:
        d: size of the matrix.
        eigenvalue: lambda, from 1 to d.

    Returns:
        ``S_0 ... S_{d-1}``; the eigenvector is ``v_n = (S_n - S_{n-1}) / sqrt(2n+1)``.

    >>> [str(s) for s in legs_eigenvector_sums(3, 2)]
    ['0', '-1/4', '1']
    """
    integer("d", d)
    integer("eigenvalue", eigenvalue, high=d)
    sums = [Fraction(1)]
    for n in range(d - 1, 0, -1):
        sums.append(Fraction(eigenvalue - n - 1, eigenvalue + n) * sums[-1])
    return sums[::-1]
