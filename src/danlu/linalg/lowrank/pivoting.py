"""Greedy choice of columns: column-pivoted QR, DEIM and the total-residual rule."""

import torch
from torch import Tensor

from danlu.linalg._matrix import check_readable


def pivots(T: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return rows of T in the order of column-pivoted QR of Tᵀ: each time the row with the largest residual.

    The algorithm is left-looking: T is only read (one matrix-vector product per step) and the squared residual norms
    are downdated. Once the largest has lost half its digits, T is deflated and the norms are recomputed, as LAPACK's
    geqp3 does per column.

    Args:
        T: (…, n, d), the n candidates as rows.
        count: number of pivots, at most n.

    Returns:
        Indices (…, count), distinct also if the rank of T is smaller, and the Frobenius norm (…) of the residual of T.
    """
    check_readable("column-pivoted QR", T)
    eps = torch.finfo(T.dtype).eps
    scale = T.abs().amax((-2, -1), keepdim=True)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    T = T / scale
    batch, d = T.shape[:-2], T.shape[-1]
    Q = T.new_zeros(*batch, count, d)
    chosen = torch.empty(*batch, count, dtype=torch.long, device=T.device)
    norms = T.square().sum(-1)
    reference = norms.amax(-1, keepdim=True)
    for j in range(count):
        best, p = norms.max(-1, keepdim=True)
        if bool((best < eps**0.5 * reference).any()):
            T = T - (T @ Q[..., :j, :].mT) @ Q[..., :j, :]
            norms = T.square().sum(-1).scatter_(-1, chosen[..., :j], -1.0)
            reference, p = norms.max(-1, keepdim=True)
        chosen[..., j] = p[..., 0]
        v = torch.take_along_dim(T, p.unsqueeze(-1), dim=-2)
        # Two passes of Gram-Schmidt are enough: the first leaves an error of the size of the cancellation.
        for _ in range(2 if j else 0):
            v = v - (v @ Q[..., :j, :].mT) @ Q[..., :j, :]
        length = torch.linalg.vector_norm(v, dim=-1, keepdim=True)
        q = torch.where(length > 0, v / length, torch.zeros_like(v))
        Q[..., j : j + 1, :] = q
        r = T @ q[0] if T.ndim == 2 else (T @ q.mT)[..., 0]
        norms.addcmul_(r, r, value=-1.0)
        norms.scatter_(-1, p, -1.0)
    left = norms.clamp(min=0).sum(-1).sqrt()
    return chosen, left * scale[..., 0, 0]


def deim(V: Tensor) -> Tensor:
    """Return rows of V (…, n, r) chosen by the discrete empirical interpolation method: indices (…, r).

    For each basis vector DEIM takes the largest entry of its residual after interpolation at the rows chosen so far
    (Sorensen and Embree, arXiv 1407.5516, algorithm 1). These are exactly the pivots of Gaussian elimination with
    partial pivoting on V, which LAPACK computes in one call.
    """
    n, r = V.shape[-2:]
    swaps = torch.linalg.lu_factor(V)[1].long() - 1
    order = torch.arange(n, device=V.device).expand(*V.shape[:-2], n).clone()
    for j in range(r):
        target = swaps[..., j : j + 1]
        here, there = order[..., j : j + 1].clone(), order.gather(-1, target)
        order[..., j : j + 1] = there
        order.scatter_(-1, target, here)
    return order[..., :r].contiguous()


def residual_greedy(M: Tensor, count: int) -> Tensor:
    """Return columns of M (…, m, n), each of which lowers the *total* residual the most: indices (…, count).

    Each step takes the column with the largest Σ_j ⟨e_i, e_j⟩²/‖e_i‖² over the current residual E and deflates. The
    Gram matrix of the residual is updated in O(n²); it is recomputed from a deflated E once half its digits are lost.
    """
    check_readable("the choice of columns by the total residual", M)
    eps = torch.finfo(M.dtype).eps
    scale = M.abs().amax((-2, -1), keepdim=True)
    M = M / torch.where(scale > 0, scale, torch.ones_like(scale))
    chosen = torch.empty(*M.shape[:-2], count, dtype=torch.long, device=M.device)
    G = M.mT @ M
    reference = G.diagonal(dim1=-2, dim2=-1).amax(-1)
    taken = torch.zeros(*M.shape[:-2], M.shape[-1], dtype=torch.bool, device=M.device)
    for j in range(count):
        norms = G.diagonal(dim1=-2, dim2=-1)
        if j and bool((norms.amax(-1) < eps**0.5 * reference).any()):
            Q = torch.linalg.qr(torch.take_along_dim(M, chosen[..., None, :j], dim=-1))[0]
            E = M - Q @ (Q.mT @ M)
            E = E - Q @ (Q.mT @ E)
            G = E.mT @ E
            norms = G.diagonal(dim1=-2, dim2=-1)
            reference = norms.amax(-1)
        # For a column whose residual is at the rounding level of the Gram matrix the gain is noise.
        usable = norms > 8 * eps * reference.unsqueeze(-1)
        gain = torch.where(usable, G.square().sum(-1) / norms.clamp(min=torch.finfo(M.dtype).tiny), norms.clamp(min=0))
        p = gain.masked_fill(taken, -1.0).argmax(-1, keepdim=True)
        chosen[..., j] = p[..., 0]
        taken.scatter_(-1, p, True)
        g = torch.take_along_dim(G, p.unsqueeze(-1), dim=-1)
        pivot = torch.take_along_dim(g, p.unsqueeze(-1), dim=-2)
        G = torch.where(pivot > 0, G - g @ (g / pivot.clamp(min=torch.finfo(M.dtype).tiny)).mT, G)
    return chosen
