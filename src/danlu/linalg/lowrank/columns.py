"""Column selection: rules that choose the r columns by which all columns of a matrix are represented."""

import torch
from torch import Tensor

from danlu._validate import choice, integer
from danlu.linalg._matrix import check_readable, in_own_dtype
from danlu.linalg.lowrank.matrix import (
    ImplicitMatrix,
    Matrix,
    MatrixLike,
    as_matrix,
    check_finite,
    check_rank,
    columns_of,
    gaussian,
    times,
    transposed_times,
)
from danlu.linalg.lowrank.pivoting import deim, pivots, residual_greedy
from danlu.linalg.lowrank.svd import svd

CHOOSERS = (
    "sketch",
    "cpqr",
    "sample",
    "greedy",
    "deim",
    "leverage",
    "leverage_random",
    "norm",
    "norm_random",
    "uniform",
    "kmeans",
)
SPECTRAL = ("deim", "leverage", "leverage_random")
_LLOYD_STEPS = 10
_LLOYD_SAMPLE = 4096


@in_own_dtype
def choose_columns(
    M: MatrixLike,
    rank: int,
    *,
    method: str = "sketch",
    oversample: int | None = None,
    power: int = 0,
    dominant: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return indices (…, r) of the r distinct columns of ``M`` that a rule chooses, in the order of the choice.

    Args:
        M: (…, m, n) tensor in float32 or float64, or a 2-D array, memory map or :class:`ImplicitMatrix`.
        rank: r, from 1 to min(m, n).
        method: ``"sketch"`` column-pivoted QR of Ω M with Gaussian Ω (the default: its error within a few per cent);
            ``"cpqr"`` column-pivoted QR; ``"sample"`` the same on a uniform sample of columns; ``"greedy"`` the column
            that lowers the total residual most; ``"deim"``; ``"leverage"`` the largest leverage scores (it picks
            near-duplicates: it can be the worst of all) and ``"leverage_random"`` a draw by them; ``"norm"``,
            ``"norm_random"`` by column norm; ``"uniform"``; ``"kmeans"`` the column nearest to each cluster centre.
            Arrays and implicit matrices take ``"sketch"``, ``"sample"``, ``"uniform"`` and those that start from
            singular vectors.
        oversample: rows of the sketch (default 2 r + 10) or columns of the sample (default 3 r), at least r.
        power: ``"sketch"`` only: subspace iterations on Ω, each two more passes over the matrix.
        dominant: g, the number of singular vectors behind leverage scores and DEIM; default r. With g as large as the
            numerical rank of a square matrix every leverage score is 1 and says nothing.
        generator: source of the random numbers.

    Raises:
        TypeError: a dtype other than float32 and float64.
        ValueError: rank above min(m, n), NaN or Inf, an unknown method or one that needs the full matrix.

    >>> M = torch.tensor([[1.0, 0.0, 5.0], [0.0, 2.0, 0.0]])
    >>> choose_columns(M, 2, method="cpqr")
    tensor([2, 1])
    """
    matrix = as_matrix("M", M)
    check_rank(rank, matrix.shape)
    choice("method", method, CHOOSERS)
    n = matrix.shape[-1]
    if method in SPECTRAL:
        return from_singular_vectors(
            svd(matrix, _dominant(rank, dominant, method, matrix), generator=generator).Vh.mT, rank, method, generator
        )
    if method == "uniform":
        return _draw(torch.ones(*_batch(matrix), n, device=matrix.device), rank, generator)
    if method == "sample":
        size = 3 * rank if oversample is None else oversample
        integer("oversample", size, low=rank)
        sample = _draw(torch.ones(*_batch(matrix), n, device=matrix.device), min(n, size), generator)
        T = columns_of(matrix, sample).mT.contiguous()
        check_finite("M", T, matrix)
        return sample.gather(-1, pivots(T, rank)[0])
    if method == "sketch":
        return pivots(sketch(matrix, rank, oversample, power, 0, generator)[0], rank)[0]
    if isinstance(matrix, ImplicitMatrix):
        accepted = ["sketch", "sample", "uniform", *SPECTRAL]
        raise ValueError(f"method must be one of {', '.join(accepted)} for an array or implicit matrix, got {method!r}")
    norms = torch.linalg.vector_norm(matrix, dim=-2)
    check_finite("M", norms, matrix)
    if method == "cpqr":
        return pivots(matrix.mT.contiguous(), rank)[0]
    if method == "greedy":
        return residual_greedy(matrix, rank)
    if method == "norm":
        indices: Tensor = norms.topk(rank, dim=-1).indices
        return indices
    if method == "norm_random":
        return _draw(norms, rank, generator)
    return _kmeans(matrix.mT, rank, generator)


def sketch(
    M: Matrix, rank: int, rows: int | None, power: int, probes: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (Ω M)ᵀ (…, n, d), and Gaussian probes P (…, m, p) with Mᵀ P (…, n, p), from the same pass over M.

    A sketch with as many rows as M would only lose accuracy: then M itself is the sketch.
    """
    m = M.shape[-2]
    size = 2 * rank + 10 if rows is None else rows
    integer("oversample", size, low=rank)
    integer("power", power, low=0)
    if size >= m and not isinstance(M, ImplicitMatrix):
        P = gaussian(M, m, probes, generator)
        T = M.mT.contiguous()
        check_finite("M", T, M)
        return T, P, M.mT @ P
    size = min(size, m)
    omega = gaussian(M, m, size, generator)
    for _ in range(power):
        start = torch.linalg.qr(transposed_times(M, omega))[0]
        omega = torch.linalg.qr(times(M, start))[0]
    P = gaussian(M, m, probes, generator)
    Y = transposed_times(M, torch.cat([omega, P], -1))
    check_finite("M", Y, M)
    return Y[..., : omega.shape[-1]].contiguous(), P, Y[..., omega.shape[-1] :]


def from_singular_vectors(V: Tensor, rank: int, method: str, generator: torch.Generator | None) -> Tensor:
    """Choose by the rows of V (…, n, g), orthonormal columns: DEIM, or the leverage scores ‖V[i]‖² (their sum is g)."""
    if method == "deim":
        return deim(V)
    scores = V.square().sum(-1)
    return scores.topk(rank, dim=-1).indices if method == "leverage" else _draw(scores, rank, generator)


def _dominant(rank: int, dominant: int | None, method: str, M: Matrix) -> int:
    if dominant is None:
        return rank
    integer("dominant", dominant, low=1, high=min(M.shape[-2:]))
    if method == "deim" and dominant != rank:
        raise ValueError(
            f"dominant must equal rank for 'deim', which takes one row a vector, got {dominant} for {rank}"
        )
    return dominant


def _batch(M: Matrix) -> tuple[int, ...]:
    return () if isinstance(M, ImplicitMatrix) else tuple(M.shape[:-2])


def _draw(weights: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """Return indices (…, count) drawn one after the other in proportion to ``weights`` without replacement.

    The largest of log w + Gumbel noise are such a draw (Efraimidis and Spirakis), in any number of batch dimensions.
    Without replacement, because an intersection block with a repeated index would be singular.
    """
    uniform = torch.rand(weights.shape, dtype=torch.float64, device=weights.device, generator=generator)
    return (weights.double().log() - (-uniform.log()).log()).topk(count, dim=-1).indices


def _kmeans(points: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """The point (…, n, d) nearest to each of ``count`` k-means centres: indices (…, count), distinct."""
    if points.ndim > 2:
        flat = points.reshape(-1, *points.shape[-2:])
        return torch.stack([_kmeans(one, count, generator) for one in flat]).reshape(*points.shape[:-2], count)
    check_readable("k-means", points)
    n = points.shape[0]
    pool = torch.arange(n, device=points.device)
    if n > max(_LLOYD_SAMPLE, count):
        pool = torch.randperm(n, generator=generator, device=points.device)[: max(_LLOYD_SAMPLE, 2 * count)]
    X = points[pool]
    centres = X[_plus_plus(X, count, generator)]
    for _ in range(_LLOYD_STEPS):
        label = torch.cdist(X, centres).argmin(-1)
        size = torch.bincount(label, minlength=count).to(X.dtype)
        total = torch.zeros_like(centres).index_add_(0, label, X)
        centres = torch.where(size[:, None] > 0, total / size[:, None].clamp(min=1), centres)
    far = torch.cdist(centres, X)
    picked: list[Tensor] = []
    for row in far:
        if picked:
            row[torch.stack(picked)] = torch.inf
        picked.append(row.argmin())
    return pool[torch.stack(picked)]


def _plus_plus(X: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """k-means++ seeds: each new one drawn in proportion to the squared distance from those before it."""
    seeds = [torch.randint(X.shape[0], (), generator=generator, device=X.device)]
    nearest = (X - X[seeds[0]]).square().sum(-1)
    for _ in range(count - 1):
        weights = nearest if bool(nearest.max() > 0) else torch.ones_like(nearest)
        seeds.append(_draw(weights, 1, generator)[0])
        nearest = torch.minimum(nearest, (X - X[seeds[-1]]).square().sum(-1))
    return torch.stack(seeds)
