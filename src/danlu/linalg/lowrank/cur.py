"""CUR decomposition: M ≈ C U R from M's own columns and rows."""

from dataclasses import dataclass

import torch
from torch import Tensor

from danlu._validate import choice
from danlu.linalg._matrix import in_own_dtype
from danlu.linalg.lowrank.columns import CHOOSERS, SPECTRAL, _dominant, choose_columns, from_singular_vectors
from danlu.linalg.lowrank.interpolative import columns_and_probes
from danlu.linalg.lowrank.matrix import (
    ImplicitMatrix,
    Matrix,
    MatrixLike,
    as_matrix,
    check_finite,
    check_indices,
    check_rank,
    columns_of,
    gaussian,
    rows_of,
    transposed_times,
)
from danlu.linalg.lowrank.pivoting import pivots
from danlu.linalg.lowrank.svd import PROBES, probe_error, svd


@dataclass(frozen=True, eq=False)
class CUR:
    """M ≈ C U R with C = M[…, :, columns] and R = M[…, rows, :].

    The product is kept as ``left @ core @ right``, whose factors are well conditioned where U itself is not (for a
    smooth kernel U has entries beyond 1e12, and C U R evaluated as written loses all accuracy).

    Attributes:
        columns: (…, c) indices of the columns.
        rows: (…, r) indices of the rows.
        C: (…, m, c).
        R: (…, r, n).
        left, core, right: factors whose product is C U R.
        error: (…) estimate of the Frobenius norm of M − C U R from 8 random probes (its square is unbiased).
    """

    columns: Tensor
    rows: Tensor
    C: Tensor
    R: Tensor
    left: Tensor
    core: Tensor
    right: Tensor
    error: Tensor

    @property
    def U(self) -> Tensor:
        """The middle factor (…, c, r), formed on demand; prefer :meth:`reconstruct` to products with it."""
        inner = torch.linalg.pinv(self.C) @ self.left
        outer = self.right @ torch.linalg.pinv(self.R)
        middle: Tensor = inner @ self.core @ outer
        return middle

    @in_own_dtype
    def reconstruct(self) -> Tensor:
        """C U R, (…, m, n), through the well-conditioned factors."""
        return self.left @ self.core @ self.right


@in_own_dtype
def cur(
    M: MatrixLike,
    rank: int | None = None,
    *,
    method: str = "sketch",
    core: str = "optimal",
    columns: Tensor | None = None,
    rows: Tensor | None = None,
    oversample: int | None = None,
    power: int = 0,
    dominant: int | None = None,
    generator: torch.Generator | None = None,
) -> CUR:
    """Approximate ``M`` by r of its columns and r of its rows.

    Args:
        M: (…, m, n) tensor in float32 or float64, or a 2-D array, memory map or :class:`ImplicitMatrix`.
        rank: r, from 1 to min(m, n); may be left out when both ``columns`` and ``rows`` are given.
        method, oversample, power, dominant, generator: the chooser of :func:`choose_columns`, used on M and on Mᵀ.
            ``"sketch"`` chooses the rows by pivoting on the orthonormal basis of the chosen columns, which needs no
            second sketch.
        core: ``"optimal"``: U = C⁺ M R⁺, the best in Frobenius norm, (QQᵀ)M(PPᵀ) by two QRs. ``"intersection"``:
            U = M[rows, columns]⁺ (skeleton, cross): reproduces the chosen rows and columns and never reads the rest of
            M, but its error grows with the condition number of the block.
        columns, rows: indices (…, c), (…, r) to use in place of the chooser; their numbers may differ.

    Raises:
        TypeError: a dtype other than float32 and float64.
        ValueError: rank above min(m, n), NaN or Inf, an unknown method, indices out of range or repeated.

    References:
        Mahoney and Drineas, PNAS 106 (2009); Sorensen and Embree, arXiv 1407.5516 (DEIM, and the bound
        ‖M − CU*R‖₂ ≤ (η_p + η_q) σ_{r+1}).

    >>> i = torch.arange(6.0, dtype=torch.float64)
    >>> M = i[:, None] * i + 1.0  # rank 2
    >>> f = cur(M, 2, method="cpqr")
    >>> torch.allclose(f.reconstruct(), M), f.columns.tolist()
    (True, [5, 0])
    """
    matrix = as_matrix("M", M)
    choice("method", method, CHOOSERS)
    choice("core", core, ["optimal", "intersection"])
    m, n = matrix.shape[-2:]
    columns = None if columns is None else check_indices("columns", columns, n, matrix)
    rows = None if rows is None else check_indices("rows", rows, m, matrix)
    if rank is None:
        if columns is None or rows is None:
            raise ValueError("rank must be given, or both columns and rows")
    else:
        check_rank(rank, matrix.shape)
        for name, given in (("columns", columns), ("rows", rows)):
            if given is not None and given.shape[-1] != rank:
                raise ValueError(f"rank must be left out or equal the {given.shape[-1]} {name} given, got {rank}")

    if method in SPECTRAL and rank is not None and columns is None and rows is None:
        basis = svd(matrix, _dominant(rank, dominant, method, matrix), generator=generator)
        columns = from_singular_vectors(basis.Vh.mT, rank, method, generator)
        rows = from_singular_vectors(basis.U, rank, method, generator)
    probe, seen = None, None
    if core == "optimal" or (columns is None and method == "sketch"):
        count = rank if columns is None else columns.shape[-1]
        assert count is not None
        columns, probe, seen = columns_and_probes(
            matrix, count, method, columns, oversample, power, dominant, generator
        )
    elif columns is None:
        assert rank is not None
        columns = choose_columns(
            matrix, rank, method=method, oversample=oversample, dominant=dominant, generator=generator
        )
    C = columns_of(matrix, columns)
    check_finite("M", C, matrix)
    Q = torch.linalg.qr(C)[0]
    if rows is None:
        assert rank is not None
        if method == "sketch":
            rows = pivots(Q, rank)[0]
        else:
            rows = choose_columns(
                matrix.mT, rank, method=method, oversample=oversample, dominant=dominant, generator=generator
            )
    R = rows_of(matrix, rows)
    check_finite("M", R, matrix)
    left, middle, right = _optimal(matrix, Q, R) if core == "optimal" else _intersection(C, Q, R, columns, rows)
    if probe is None or seen is None:
        probe = gaussian(matrix, m, PROBES, generator)
        seen = transposed_times(matrix, probe)
    return CUR(columns, rows, C, R, left, middle, right, probe_error(seen, probe, left, middle @ right))


def _optimal(M: Matrix, Q: Tensor, R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    P = torch.linalg.qr(R.mT)[0]
    projected = transposed_times(M, Q).mT if isinstance(M, ImplicitMatrix) else Q.mT @ M
    return Q, projected @ P, P.mT


def _intersection(C: Tensor, Q: Tensor, R: Tensor, columns: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """C W⁺ R for W = C[rows], by the side with the smaller number of indices.

    C = Q T gives W = Q[rows] T and C W⁺ = Q Q[rows]⁺: T, which holds all the ill-conditioning of C, cancels.
    """
    if rows.shape[-1] >= columns.shape[-1]:
        return Q, torch.linalg.pinv(rows_of(Q, rows)), R
    P = torch.linalg.qr(R.mT)[0]
    return C, torch.linalg.pinv(rows_of(P, columns)).mT, P.mT
