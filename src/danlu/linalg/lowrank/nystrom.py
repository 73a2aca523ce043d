"""Nyström approximation of a positive semi-definite (kernel) matrix from r of its columns."""

from dataclasses import dataclass

import torch
from torch import Tensor

from danlu._autograd import ordinary
from danlu._validate import choice
from danlu.linalg._matrix import holds, in_own_dtype
from danlu.linalg.lowrank.matrix import (
    ImplicitMatrix,
    Matrix,
    MatrixLike,
    as_matrix,
    check_finite,
    check_indices,
    check_rank,
    rows_of,
)

_DIAGONAL_BLOCK = 64


@dataclass(frozen=True, eq=False)
class Nystrom:
    """K ≈ C W⁺ Cᵀ with C = K[:, landmarks] and W = K[landmarks, landmarks], held as factor @ factorᵀ.

    Attributes:
        landmarks: (…, r) indices, in the order of elimination.
        factor: (…, n, r) F with F Fᵀ = C W⁺ Cᵀ; a landmark that depends on earlier ones has a zero column.
        error: (…) trace of K − F Fᵀ, which is its nuclear norm and at least its Frobenius norm: exact, not an estimate.
    """

    landmarks: Tensor
    factor: Tensor
    error: Tensor

    @in_own_dtype
    def reconstruct(self) -> Tensor:
        """F Fᵀ, (…, n, n)."""
        return self.factor @ self.factor.mT

    @in_own_dtype
    def matmul(self, X: Tensor) -> Tensor:
        """F (Fᵀ X) for X (…, n, k), without the n x n matrix."""
        return self.factor @ (self.factor.mT @ X)


@in_own_dtype
def nystrom(
    K: MatrixLike,
    rank: int | None = None,
    *,
    method: str = "random_cholesky",
    landmarks: Tensor | None = None,
    diagonal: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Nystrom:
    """Approximate a positive semi-definite K by the intersection CUR on the same rows and columns.

    Computed as a partial Cholesky factorisation, one row of K for each landmark, so that neither the possibly singular
    block W nor an inverse of it is ever formed; for an :class:`ImplicitMatrix` only r rows and the diagonal are
    evaluated.

    Args:
        K: (…, n, n) symmetric positive semi-definite, float32 or float64; or an array, memory map, implicit matrix.
        rank: r, from 1 to n; may be left out with ``landmarks``.
        method: ``"random_cholesky"`` draws each landmark in proportion to the residual diagonal (Chen, Epperly, Tropp
            and Webber, arXiv 2207.06503); ``"cholesky"`` takes its largest entry; ``"uniform"`` draws all at random.
        landmarks: (…, r) indices to use in place of a method.
        diagonal: (…, n), the diagonal of an implicit K where it is known (all ones for many kernels).
        generator: source of the random numbers.

    Raises:
        TypeError: a dtype other than float32 and float64.
        ValueError: not square, not symmetric or not positive semi-definite (as far as the entries read show), rank
            above n, NaN or Inf.

    >>> x = torch.linspace(-1, 1, 20, dtype=torch.float64)
    >>> K = torch.exp(-((x[:, None] - x) ** 2))
    >>> f = nystrom(K, 8, method="cholesky")
    >>> f.error.item() < 1e-5, torch.linalg.matrix_norm(K - f.reconstruct()).item() <= f.error.item()
    (True, True)
    """
    matrix = as_matrix("K", K)
    n = matrix.shape[-1]
    if matrix.shape[-2] != n:
        raise ValueError(f"K must be square, got shape {tuple(matrix.shape)}")
    choice("method", method, ["random_cholesky", "cholesky", "uniform"])
    batch = () if isinstance(matrix, ImplicitMatrix) else matrix.shape[:-2]
    if landmarks is not None:
        landmarks = check_indices("landmarks", landmarks, n, matrix)
        if rank is not None and rank != landmarks.shape[-1]:
            raise ValueError(f"rank must be left out or equal the {landmarks.shape[-1]} landmarks given, got {rank}")
        rank = landmarks.shape[-1]
    if rank is None:
        raise ValueError("rank must be given, or landmarks")
    check_rank(rank, matrix.shape)
    d = _diagonal(matrix) if diagonal is None else diagonal.clone()
    if d.shape != (*batch, n):
        raise ValueError(f"diagonal must have shape {(*batch, n)}, got {tuple(d.shape)}")
    check_finite("K", d, matrix)
    if not holds(~(d < 0), unknown=True):
        raise ValueError(f"K must be positive semi-definite, but its diagonal holds {d.min().item():.3g}")
    if landmarks is None and method == "uniform":
        landmarks = torch.rand(*batch, n, device=d.device, generator=generator).topk(rank, dim=-1).indices
    return _partial_cholesky(matrix, d, rank, landmarks, method == "random_cholesky", generator)


def _partial_cholesky(
    K: Matrix, d: Tensor, rank: int, landmarks: Tensor | None, random: bool, generator: torch.Generator | None
) -> Nystrom:
    n = d.shape[-1]
    tolerance = n * torch.finfo(d.dtype).eps * d.amax(-1, keepdim=True)
    allowed = torch.ones(d.shape, dtype=torch.bool, device=d.device)
    if landmarks is not None:
        allowed = torch.zeros_like(allowed).scatter(-1, landmarks, True)
    # Written in place, unless somebody keeps the columns for a derivative.
    recorded = not ordinary(d) or (torch.is_grad_enabled() and d.requires_grad)
    F = d.new_zeros(*d.shape, 0 if recorded else rank)
    order: list[Tensor] = []
    for j in range(rank):
        score = d.clamp(min=0).masked_fill(~allowed, -1.0)
        if random and landmarks is None:
            # The largest of d/E, E exponential, is a draw in proportion to d; used candidates keep their -1.
            draw = torch.rand(d.shape, dtype=torch.float64, device=d.device, generator=generator)
            score = torch.where(score > 0, score / -draw.log().clamp(max=-1e-300), score.double())
        p = score.argmax(-1, keepdim=True)
        order.append(p)
        allowed = allowed.scatter(-1, p, False)
        pivot = d.gather(-1, p)
        row = rows_of(K, p)[..., 0, :]
        check_finite("K", row, K)
        column = row
        if j:
            past = rows_of(F[..., :j], p)
            column = row - (F[..., :j] @ past.mT)[..., 0]
        usable = pivot > tolerance
        column = torch.where(usable, column / pivot.clamp(min=torch.finfo(d.dtype).tiny).sqrt(), torch.zeros_like(row))
        if recorded:
            F = torch.cat((F, column.unsqueeze(-1)), -1)
        else:
            F[..., j] = column
        d = (d - column.square()).scatter(-1, p, torch.where(usable, torch.zeros_like(pivot), pivot))
        most = d.abs().amax(-1, keepdim=True)
        if not holds(~(d < -100 * (tolerance * most).sqrt() - 100 * tolerance), unknown=True):
            raise ValueError(
                f"K must be symmetric positive semi-definite, but a Schur complement of it has {d.min().item():.3g} "
                "on its diagonal"
            )
    return Nystrom(torch.cat(order, -1), F, d.clamp(min=0).sum(-1))


def _diagonal(K: Matrix) -> Tensor:
    if isinstance(K, Tensor):
        scale = K.abs().amax((-2, -1))
        check_finite("K", scale, K)
        asymmetry = (K - K.mT).abs().amax((-2, -1))
        if not holds(~(asymmetry > torch.finfo(K.dtype).eps ** 0.5 * scale), unknown=True):
            raise ValueError(f"K must be symmetric, but K - Kᵀ reaches {asymmetry.max().item():.3g}")
        return K.diagonal(dim1=-2, dim2=-1).clone()
    index = torch.arange(K.shape[0], device=K.device)
    return torch.cat([K.rows(part)[:, part].diagonal() for part in index.split(_DIAGONAL_BLOCK)])
