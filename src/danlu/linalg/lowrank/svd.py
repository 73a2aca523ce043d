"""Truncated singular value decomposition: the best approximation of a given rank, exact or by random projection."""

from dataclasses import dataclass

import torch
from torch import Tensor

from danlu._validate import choice, integer
from danlu.linalg._matrix import in_own_dtype
from danlu.linalg.lowrank.matrix import (
    ImplicitMatrix,
    MatrixLike,
    as_matrix,
    check_finite,
    check_rank,
    gaussian,
    times,
    transposed_times,
)

PROBES = 8
_SMALL = 512


@dataclass(frozen=True, eq=False)
class TruncatedSVD:
    """M ≈ U diag(S) Vh.

    Attributes:
        U: (…, m, r) with orthonormal columns.
        S: (…, r) singular values, descending.
        Vh: (…, r, n) with orthonormal rows.
        error: (…) Frobenius norm of M − U diag(S) Vh: the exact tail for ``method="exact"``, else an unbiased estimate
            (of its square) from 8 random probes.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    error: Tensor

    @in_own_dtype
    def reconstruct(self) -> Tensor:
        """U diag(S) Vh, (…, m, n)."""
        return (self.U * self.S.unsqueeze(-2)) @ self.Vh


@in_own_dtype
def svd(
    M: MatrixLike,
    rank: int,
    *,
    method: str = "auto",
    oversample: int = 10,
    power: int = 2,
    generator: torch.Generator | None = None,
) -> TruncatedSVD:
    """Return the best approximation of ``M`` of the given rank in every unitarily invariant norm (Eckart–Young–Mirsky).

    Args:
        M: (…, m, n) tensor in float32 or float64, or a 2-D array, memory map or :class:`ImplicitMatrix`.
        rank: r, from 1 to min(m, n).
        method: ``"exact"`` (LAPACK, tensors only), ``"randomized"`` (Halko, Martinsson and Tropp, arXiv 0909.4061,
            algorithm 4.4 and 5.1), or ``"auto"``: exact up to a smaller side of 512 or where the rank is a large part
            of it.
        oversample: columns of the random sketch beyond the rank.
        power: subspace iterations; each multiplies the decay of the spectrum that the sketch sees by two powers.
        generator: source of the random numbers.

    Raises:
        TypeError: a dtype other than float32 and float64.
        ValueError: rank above min(m, n), NaN or Inf, an unknown method, or ``"exact"`` for an implicit matrix.

    >>> M = torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))
    >>> f = svd(M, 1)
    >>> f.S.tolist(), round(f.error.item(), 6)  # sqrt(2^2 + 1^2)
    ([3.0], 2.236068)
    """
    matrix = as_matrix("M", M)
    check_rank(rank, matrix.shape)
    choice("method", method, ["auto", "exact", "randomized"])
    integer("oversample", oversample, low=0)
    integer("power", power, low=0)
    small = min(matrix.shape[-2:])
    if isinstance(matrix, ImplicitMatrix):
        if method == "exact":
            raise ValueError("method must be 'randomized' or 'auto' for an array or implicit matrix, got 'exact'")
    elif method == "exact" or (method == "auto" and (small <= _SMALL or 4 * (rank + oversample) > small)):
        check_finite("M", matrix.abs().amax((-2, -1)), matrix)
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
        tail = torch.linalg.vector_norm(S[..., rank:], dim=-1)
        return TruncatedSVD(U[..., :rank], S[..., :rank], Vh[..., :rank, :], tail)

    m, n = matrix.shape[-2:]
    Y = times(matrix, gaussian(matrix, n, min(rank + oversample, small), generator))
    check_finite("M", Y, matrix)
    Q = torch.linalg.qr(Y)[0]
    for _ in range(power):
        Q = torch.linalg.qr(transposed_times(matrix, Q))[0]
        Q = torch.linalg.qr(times(matrix, Q))[0]
    probe = gaussian(matrix, m, PROBES, generator)
    B, seen = transposed_times(matrix, torch.cat([Q, probe], -1)).split([Q.shape[-1], PROBES], -1)
    V, R = torch.linalg.qr(B)
    left, S, right = torch.linalg.svd(R.mT)
    U = Q @ left[..., :rank]
    S = S[..., :rank]
    Vh = right[..., :rank, :] @ V.mT
    return TruncatedSVD(U, S, Vh, probe_error(seen, probe, (U * S.unsqueeze(-2)), Vh))


def probe_error(seen: Tensor, probe: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Estimate the Frobenius norm of M − left right from ``seen`` = Mᵀ probe, for N(0, 1) probes (…, m, p).

    E‖(M − LR)ᵀ ω‖² = ‖M − LR‖²_F for each probe ω that is independent of the approximation.
    """
    residual = seen - (right.mT @ (left.mT @ probe))
    error: Tensor = torch.linalg.vector_norm(residual, dim=(-2, -1)) / probe.shape[-1] ** 0.5
    return error
