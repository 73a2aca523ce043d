"""The matrix sign ``msign(M) = U V^T`` of ``M = U S V^T``: every non-zero singular value becomes 1.

`msign` validates its arguments and is differentiable. Code that orthogonalises stacks of equal shapes in a loop, such
as an optimizer step, calls the iteration itself: ``orthogonalize(stack_bmn, composition, *, short=None,
gram_steps=None, chunk_bytes=None)``, with compositions from `default_compositions` or :mod:`danlu.approx`.
"""

import functools
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from danlu._autograd import Fused, compiling_plainly
from danlu._validate import choice, integer, number
from danlu.approx import TABLES, Composition, optimal_composition, published
from danlu.linalg._matrix import check_matrix, in_own_dtype
from danlu.linalg._newton_schulz import at_least_float32, iterate, orthogonalize, power_of_two_scale

__all__ = ["METHODS", "default_compositions", "msign", "orthogonalize", "polar", "rank_tolerance"]

# Names accepted by `msign`: "auto", "svd", "designed" and the published coefficient sets of danlu.approx.
METHODS = ("auto", "svd", "designed", *sorted(TABLES))


Side = Literal["right", "left"]
Scale = Literal["schatten8", "frobenius"]


@functools.lru_cache
def default_compositions(dtype: torch.dtype) -> tuple[Composition, Composition | None]:
    """Return the composition that `msign` iterates in ``dtype``, and a shorter one for flat spectra or None.

    In 16-bit dtypes there are five designed steps (for values down to 2e-3 of the Schatten-8 norm) and four for flat
    spectra, with a cushion and a safety factor because rounded values leave [0, 1]. In float32 there are seven steps
    for values down to 1e-3, in float64 ten for values down to 1e-5, both accurate to the last digits.
    """
    if dtype.itemsize < 4:
        robust = functools.partial(optimal_composition, cushion=0.04, safety=1.01)
        return robust(2e-3, 5), robust(6e-3, 4)
    if dtype == torch.float32:
        return optimal_composition(1e-3, 7, cushion=0.024), None
    return optimal_composition(1e-5, 10), None


def rank_tolerance(M: Tensor) -> float:
    """Return ``eps * max(m, n)``: singular values below this fraction of the largest one count as zero."""
    return torch.finfo(M.dtype).eps * max(M.shape[-2:])


def msign(
    M: Tensor,
    *,
    method: str | Composition = "auto",
    steps: int | Literal["auto"] = "auto",
    lower: float | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return ``U V^T`` where ``M = U S V^T``: the nearest matrix with orthonormal rows or columns.

    It is the unitary factor of the polar decomposition, ``(M M^T)^{-1/2} M``, and the direction of steepest descent
    under the spectral norm. It does not change when ``M`` is multiplied by a positive number. Singular values that are
    zero stay zero, so the rank is kept.

    Args:
        M: ``(…, m, n)``, float64, float32, bfloat16 or float16, without NaN or infinity. It is left unchanged.
        method: ``"svd"`` is exact, with singular values below ``eps * max(m, n) * sigma_1`` counted as zero.
            ``"designed"`` is the composition of minimax polynomials for the interval [lower, 1] of singular values
            relative to the Schatten-8 norm; ``"auto"`` is ``"designed"`` in float32 and 16-bit dtypes and ``"svd"`` in
            float64. A `Composition` is applied unchanged. Another name in `METHODS` is a published set of coefficients,
            applied as published: to the matrix divided by its Frobenius norm.
        steps: number of steps; by default that of the published set, or for designed coefficients 7 in float32
            (reaching 1e-3) and 4 or 5 in 16-bit dtypes, by the flatness of the spectrum; with ``lower`` given, as many
            as it needs.
        lower: smallest relative singular value that designed coefficients bring to 1.
        dtype: dtype of the products; by default that of ``M``. float16 is iterated in float32, because the square of a
            Gram matrix overflows it.

    Returns:
        ``(…, m, n)`` in the dtype of ``M``. Frobenius error over sqrt(rank), for relative singular values in [1e-3, 1]:
        at most 1e-3 in float32; 0.03 to 0.17 in bfloat16, where five steps do not bring values below 2e-3 to 1.

    Gradients are computed from the polar factor's Sylvester equation, whatever the method. They are undefined where the
    rank changes; directions with a zero singular value on both sides get none.

    Raises:
        TypeError: ``M`` is not a real floating tensor.
        ValueError: ``M`` has fewer than two dimensions, NaN or infinity; ``steps`` with a fixed composition.

    Sources: Amsel et al., arXiv 2505.16932 (designed coefficients); Jordan et al. 2024 (Newton-Schulz in Muon); Higham,
    Functions of Matrices (2008), ch. 8 (polar factor).

    >>> import torch
    >>> M = torch.tensor([[3.0, 0.0, 0.0], [0.0, -0.2, 0.0]], dtype=torch.float64)
    >>> msign(M)
    tensor([[ 1.,  0.,  0.],
            [ 0., -1.,  0.]], dtype=torch.float64)
    """
    check_matrix("M", M)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be a real floating torch.dtype or None, got {dtype!r}")
    working = dtype or M.dtype
    if working == torch.float16:
        working = torch.float32
    composition, short = _resolve(method, steps, lower, working)
    return _MSign.of(M, composition, short, "frobenius" if method in TABLES else "schatten8", working)


@in_own_dtype
def polar(
    M: Tensor,
    *,
    side: Side = "right",
    method: str | Composition = "svd",
) -> tuple[Tensor, Tensor]:
    """Return the polar decomposition ``M = U P`` (``side="right"``) or ``M = P U`` (``"left"``), ``P`` symmetric PSD.

    Args:
        M: ``(…, m, n)``, real floating.
        side: on which side of ``U`` the factor ``P`` stands, as in ``scipy.linalg.polar``.
        method: as in `msign`.

    Returns:
        ``U``, ``(…, m, n)``, which is ``msign(M)``, and ``P``, ``(…, n, n)`` or ``(…, m, m)``.

    >>> import torch
    >>> M = torch.tensor([[0.0, 2.0], [-3.0, 0.0]], dtype=torch.float64)
    >>> U, P = polar(M)
    >>> P
    tensor([[3., 0.],
            [0., 2.]], dtype=torch.float64)
    >>> torch.allclose(U @ P, M)
    True
    """
    choice("side", side, get_args(Side))
    U = msign(M, method=method)
    P = U.mT @ M if side == "right" else M @ U.mT
    return U, (P + P.mT) / 2


# A compiler takes the answer for a constant instead of tracing the design.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _resolve(
    method: str | Composition, steps: int | str, lower: float | None, dtype: torch.dtype
) -> tuple[Composition | None, Composition | None]:
    """Return the composition (None for an SVD) and the short one for flat spectra."""
    if steps != "auto":
        integer("steps", steps)
    if lower is not None:
        number("lower", lower, low=0, high=1, low_open=True, high_open=True)
    if isinstance(method, Composition):
        if steps != "auto" or lower is not None:
            raise ValueError("steps and lower must be left out when method is a Composition, which fixes both")
        return method, None
    choice("method", method, METHODS)
    if method == "auto":
        method = "svd" if dtype == torch.float64 and steps == "auto" and lower is None else "designed"
    if method == "svd":
        if steps != "auto" or lower is not None:
            raise ValueError("steps and lower must be left out when method is 'svd', which does not iterate")
        return None, None
    if method == "designed":
        return _designed(steps if isinstance(steps, int) else None, lower, dtype)
    if lower is not None:
        raise ValueError(f"lower must be left out when method is {method!r}, whose coefficients are fixed")
    return published(method, steps if isinstance(steps, int) else None), None


@functools.lru_cache
def _designed(steps: int | None, lower: float | None, dtype: torch.dtype) -> tuple[Composition, Composition | None]:
    if steps is None and lower is None:
        return default_compositions(dtype)
    half = dtype.itemsize < 4
    cushion, safety = (0.04, 1.01) if half else (0.024, 1.0)
    design = functools.partial(optimal_composition, lower or (2e-3 if half else 1e-3), cushion=cushion, safety=safety)
    if steps is not None:
        return design(steps), None
    # More steps cannot reduce the error below the unit roundoff; a 16-bit dtype cannot show an error below 1 %.
    target = 1e-2 if half else 4 * torch.finfo(dtype).eps
    for count in range(1, 60):
        composition = design(count)
        if composition.errors[-1] <= target:
            break
    return composition, None


class _MSign(Fused):
    """The sign by SVD or by iteration, with the derivative of the exact sign in both cases."""

    @staticmethod
    def plain(
        M: Tensor,
        composition: Composition | None,
        short: Composition | None,
        scale: Scale,
        dtype: torch.dtype,
    ) -> Tensor:
        if M.numel() == 0:
            return M.clone()
        if M.shape[-2] > M.shape[-1]:
            return _MSign.plain(M.mT, composition, short, scale, dtype).mT
        A = (M * power_of_two_scale(M.detach())).to(at_least_float32(M.dtype))
        if composition is None:
            X = _svd_msign(A.detach())
        else:
            # Not the shorter one for flat spectra: a trace cannot look at the spectrum.
            X = iterate(A.detach().to(dtype), composition.coefficients, None, scale, None).to(A.dtype)
        polar = _polished(A, X)
        return (X + (polar - polar.detach())).to(M.dtype)

    @staticmethod
    def fast(
        _: Any,
        M: Tensor,
        composition: Composition | None,
        short: Composition | None,
        scale: Scale,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        if composition is None:
            X = _svd_msign((M * power_of_two_scale(M)).to(at_least_float32(dtype))).to(M.dtype)
        else:
            # The scale comes before the cast, which could overflow or underflow.
            scaled = M if dtype == M.dtype else (M * power_of_two_scale(M)).to(dtype)
            stack = scaled.reshape(-1, *M.shape[-2:])
            X = orthogonalize(stack, composition, short=short, scale=scale).reshape(M.shape).to(M.dtype)
        return X, X

    @staticmethod
    def derivative(_: Any, grad: Tensor, inputs: Sequence[Any], kept: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        return _msign_backward(inputs[0], kept[0], grad), None, None, None, None


def _svd_msign(M: Tensor) -> Tensor:
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    threshold = rank_tolerance(M) * S[..., :1]
    X: Tensor = (U * (threshold < S).unsqueeze(-2)) @ Vh
    return X


_ORDERS = 4


def _polished(M: Tensor, X: Tensor) -> Tensor:
    """Return ``X = msign(M)`` of a wide ``M`` as a function of ``M`` that can be differentiated four times.

    It is Newton's method from the answer, with the inverse of the first step: each step makes one more derivative
    right, and none differentiates a decomposition, which repeated singular values do not bear. One step makes the rows
    of X orthonormal, then rotates them by ``Ω`` until ``M X^T`` is symmetric and turns them into the row space of M.
    """
    H = (M @ X.mT).detach()
    S, U = torch.linalg.eigh((H + H.mT) / 2)
    S = S.clamp_min(0)
    tolerance = rank_tolerance(M) * S[..., -1:]
    sums = S.unsqueeze(-1) + S.unsqueeze(-2)
    rotation = torch.where(sums > 2 * tolerance.unsqueeze(-1), 1 / sums, 0)
    inverse = (U * torch.where(tolerance < S, 1 / S, 0).unsqueeze(-2)) @ U.mT
    for _ in range(1 if compiling_plainly() else _ORDERS):
        X = 1.5 * X - X @ X.mT @ X / 2
        N = M @ X.mT
        turn = U @ (rotation * (U.mT @ (N - N.mT) @ U)) @ U.mT
        X = X + turn @ X + inverse @ (M - N @ X)
    return X


def _msign_backward(M: Tensor, X: Tensor, G: Tensor) -> Tensor:
    """Return the gradient with respect to ``M`` from ``G``, the one with respect to ``X = msign(M)``.

    With ``M = H X`` and ``H = U S U^T``, a change ``dM`` gives ``dX = Ω X + H^+ dM (I - X^T X)``; the antisymmetric
    ``Ω`` solves ``H Ω + Ω H = dM X^T - X dM^T``. The adjoint map solves the same equation, diagonal in the basis ``U``.
    """
    if M.shape[-2] > M.shape[-1]:
        return _msign_backward(M.mT, X.mT, G.mT).mT
    work = at_least_float32(M.dtype)
    scale = power_of_two_scale(M)
    A, X, G = (M * scale).to(work), X.to(work), G.to(work)
    if M.dtype.itemsize < 4:  # the gradient of a small singular value would multiply what the iteration rounded
        X = _svd_msign(A)
    H = A @ X.mT
    S, U = torch.linalg.eigh((H + H.mT) / 2)
    S = S.clamp_min(0)
    tolerance = rank_tolerance(A) * S[..., -1:]
    VT, UG = U.mT @ X, U.mT @ G
    K = UG @ VT.mT
    sums = S.unsqueeze(-1) + S.unsqueeze(-2)
    # Two directions of zero singular value have no defined rotation between them.
    Y = torch.where(sums > 2 * tolerance.unsqueeze(-1), (K - K.mT) / sums, 0)
    inverse = torch.where(tolerance < S, 1 / S, 0).unsqueeze(-1)
    normal = UG - K @ VT  # the part of G outside the row space of M
    gradient: Tensor = (U @ (Y @ VT + inverse * normal)).to(M.dtype if M.dtype != torch.float16 else work) * scale
    return gradient.to(M.dtype)
