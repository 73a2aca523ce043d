"""CR approximation of a product X Y: r columns of X against the same r rows of Y."""

from dataclasses import dataclass

import torch
from torch import Tensor

from danlu._validate import choice, integer
from danlu.linalg._matrix import in_own_dtype
from danlu.linalg.lowrank.matrix import as_tensor, check_finite, columns_of, draw, rows_of
from danlu.linalg.lowrank.svd import PROBES


@dataclass(frozen=True, eq=False)
class CRProduct:
    """X Y ≈ X[:, indices] Λ Y[indices] = left @ right.

    Attributes:
        indices: (…, r) terms kept; a sampled product may hold one more than once.
        left: (…, n, r), right: (…, r, m); Λ is already in them.
        weights: (…, r), the diagonal of Λ; None for the full (r, r) one, which is never formed.
        error: (…) estimate of ‖XY − left right‖_F from 8 random probes (its square is unbiased).
    """

    indices: Tensor
    left: Tensor
    right: Tensor
    weights: Tensor | None
    error: Tensor

    @in_own_dtype
    def reconstruct(self) -> Tensor:
        """The approximate product, (…, n, m)."""
        return self.left @ self.right


@in_own_dtype
def cr(
    X: Tensor,
    Y: Tensor,
    rank: int,
    *,
    method: str = "top",
    weights: str | None = None,
    generator: torch.Generator | None = None,
) -> CRProduct:
    """Approximate X Y = Σ_i x_i y_iᵀ by r of its l terms.

    Args:
        X: (…, n, l), float32 or float64.
        Y: (…, l, m), the same dtype.
        rank: r, from 1 to l.
        method: ``"top"`` the largest ‖x_i‖‖y_i‖; ``"greedy"`` discards pairs of terms so that the sum of all that is
            discarded stays smallest (O(l²) memory); ``"sampled"`` draws with replacement with p_i ∝ ‖x_i‖‖y_i‖ and
            weights 1/(r p_i), which is unbiased with the least variance (see :func:`cr_variance`); ``"uniform"`` the
            same with equal p_i.
        weights: ``None`` keeps the method's own (1 where deterministic); ``"diagonal"`` solves for the best diagonal Λ,
            [(CᵀC)∘(RRᵀ)]λ = [(CᵀX)∘(RYᵀ)]1; ``"full"`` takes the best matrix Λ = C⁺XYR⁺, through two QRs.
        generator: source of the random numbers.

    Raises:
        TypeError: dtypes that differ or are not float32 or float64.
        ValueError: inner sizes that differ, rank above l, NaN or Inf, an unknown method, or weights solved for terms
            that were drawn with repetition.

    References:
        Drineas, Kannan and Mahoney, "Fast Monte Carlo algorithms for matrices I", SIAM J. Comput. 36 (2006).

    >>> X, Y = torch.eye(3) * torch.tensor([1.0, 5.0, 2.0]), torch.eye(3)
    >>> cr(X, Y, 2).indices
    tensor([1, 2])
    """
    as_tensor("X", X)
    as_tensor("Y", Y)
    if X.dtype != Y.dtype:
        raise TypeError(f"Y must have X's dtype {X.dtype}, got {Y.dtype}")
    terms = X.shape[-1]
    if Y.shape[-2] != terms:
        raise ValueError(f"Y must have as many rows as X has columns ({terms}), got shape {tuple(Y.shape)}")
    if X.shape[:-2] != Y.shape[:-2]:
        raise ValueError(f"Y must have X's leading dimensions {tuple(X.shape[:-2])}, got {tuple(Y.shape[:-2])}")
    integer("rank", rank, high=terms)
    choice("method", method, ["top", "greedy", "sampled", "uniform"])
    choice("weights", weights, [None, "diagonal", "full"])
    drawn = method in ("sampled", "uniform")
    if drawn and weights is not None:
        raise ValueError(
            f"weights must be None for the {method!r} method, whose weights make it unbiased, got {weights!r}"
        )
    sizes = torch.linalg.vector_norm(X, dim=-2) * torch.linalg.vector_norm(Y, dim=-1)
    check_finite("X", torch.linalg.vector_norm(X, dim=-2), X)
    check_finite("Y", torch.linalg.vector_norm(Y, dim=-1), Y)

    scale = torch.ones(*X.shape[:-2], rank, dtype=X.dtype, device=X.device)
    if drawn:
        p = sizes if method == "sampled" else torch.ones_like(sizes)
        p = torch.where((p.sum(-1, keepdim=True) > 0), p, torch.ones_like(p))
        p = p / p.sum(-1, keepdim=True)
        flat = torch.multinomial(p.reshape(-1, terms), rank, replacement=True, generator=generator)
        indices = flat.reshape(*p.shape[:-1], rank)
        scale = 1 / (rank * p.gather(-1, indices))
    elif method == "top":
        indices = sizes.topk(rank, dim=-1).indices
    else:
        indices = _greedy(X, Y, rank)
    C, R = columns_of(X, indices), rows_of(Y, indices)
    used: Tensor | None = scale
    if weights == "full":
        Q, P = torch.linalg.qr(C)[0], torch.linalg.qr(R.mT)[0]
        left, right, used = Q, ((Q.mT @ X) @ (Y @ P)) @ P.mT, None
    else:
        if weights == "diagonal":
            scale = _diagonal(X, Y, C, R)
        root = scale.abs().sqrt()
        left, right, used = C * (root * scale.sign()).unsqueeze(-2), R * root.unsqueeze(-1), scale
    probe = draw(*Y.shape[:-2], Y.shape[-1], PROBES, generator=generator, dtype=Y.dtype, device=Y.device)
    residual = X @ (Y @ probe) - left @ (right @ probe)
    return CRProduct(indices, left, right, used, torch.linalg.vector_norm(residual, dim=(-2, -1)) / PROBES**0.5)


@in_own_dtype
def cr_variance(X: Tensor, Y: Tensor, rank: int, *, probabilities: Tensor | None = None) -> Tensor:
    """E‖XY − sampled product‖²_F of r independent draws: (Σ_i ‖x_i‖²‖y_i‖²/p_i − ‖XY‖²_F)/r, (…).

    Args:
        X: (…, n, l). Y: (…, l, m).
        rank: number of draws.
        probabilities: (…, l), positive where the term is not zero; None means the best, p_i ∝ ‖x_i‖‖y_i‖.

    Raises:
        TypeError, ValueError: as :func:`cr`.

    >>> cr_variance(torch.eye(2), torch.eye(2), 1)  # (1 + 1)^2 - 2
    tensor(2.)
    """
    as_tensor("X", X)
    as_tensor("Y", Y)
    integer("rank", rank)
    if Y.shape[-2] != X.shape[-1]:
        raise ValueError(f"Y must have as many rows as X has columns ({X.shape[-1]}), got shape {tuple(Y.shape)}")
    sizes = torch.linalg.vector_norm(X, dim=-2) * torch.linalg.vector_norm(Y, dim=-1)
    product = torch.linalg.matrix_norm(X @ Y).square()
    if probabilities is None:
        best: Tensor = (sizes.sum(-1).square() - product) / rank
        return best
    if probabilities.shape[-1] != X.shape[-1] or bool((probabilities < 0).any()):
        raise ValueError(f"probabilities must be {X.shape[-1]} numbers of at least 0, got {tuple(probabilities.shape)}")
    share = probabilities / probabilities.sum(-1, keepdim=True)
    terms = torch.where(sizes > 0, sizes.square() / share, torch.zeros_like(sizes))
    variance: Tensor = (terms.sum(-1) - product) / rank
    return variance


def _diagonal(X: Tensor, Y: Tensor, C: Tensor, R: Tensor) -> Tensor:
    normal = (C.mT @ C) * (R @ R.mT)
    right = ((C.mT @ X) * (R @ Y.mT)).sum(-1, keepdim=True)
    # Terms that are multiples of one another make the system singular; the pseudo-inverse shares the weight among them.
    solved: Tensor = torch.linalg.pinv(normal, hermitian=True) @ right
    return solved[..., 0]


def _greedy(X: Tensor, Y: Tensor, rank: int) -> Tensor:
    """Keep r terms by discarding, two at a time, those with which the sum of everything discarded is smallest."""
    G = (X.mT @ X) * (Y @ Y.mT)
    terms = G.shape[-1]
    diagonal = G.diagonal(dim1=-2, dim2=-1)
    gone = torch.zeros(G.shape[:-1], dtype=torch.bool, device=G.device)
    pairs = 2 * G + diagonal.unsqueeze(-1) + diagonal.unsqueeze(-2)
    pairs.diagonal(dim1=-2, dim2=-1).fill_(torch.inf)
    left = terms - rank
    while left > 0:
        # ‖s + v_i + v_j‖² = ‖s‖² + ‖v_i + v_j‖² + 2⟨s, v_i⟩ + 2⟨s, v_j⟩ for s, the sum discarded so far.
        with_gone = 2 * (G @ gone.to(G.dtype).unsqueeze(-1))[..., 0]
        if left == 1:
            out = (diagonal + with_gone).masked_fill(gone, torch.inf).argmin(-1, keepdim=True)
        else:
            cost = pairs + with_gone.unsqueeze(-1) + with_gone.unsqueeze(-2)
            cost = cost.masked_fill(gone.unsqueeze(-1) | gone.unsqueeze(-2), torch.inf)
            flat = cost.flatten(-2).argmin(-1)
            out = torch.stack([flat // terms, flat % terms], -1)
        gone.scatter_(-1, out, True)
        left -= out.shape[-1]
    return gone.long().argsort(dim=-1, stable=True)[..., :rank]
