"""ANNCUR: complete a query's scores against every item from its scores against a few anchor items."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from danlu._validate import integer
from danlu.linalg._matrix import in_own_dtype
from danlu.linalg.lowrank.interpolative import interpolative
from danlu.linalg.lowrank.matrix import MatrixLike


@dataclass(frozen=True, eq=False)
class Anncur:
    """An index over items for an expensive score s(query, item).

    Attributes:
        items: (a,) indices of the anchor items, the only ones a new query is scored against.
        weights: (a, items) matrix G S[V, :] with G = S[V, U]⁺, from the scores S[V, :] of the anchor queries.
        error: () estimated Frobenius norm of the error of completion on the anchor queries themselves.
    """

    items: Tensor
    weights: Tensor
    error: Tensor

    @in_own_dtype
    def complete(self, scores: Tensor) -> Tensor:
        """Return approximate scores (…, items) of queries from their scores (…, a) against the anchors, in order."""
        if scores.shape[-1] != self.items.shape[-1]:
            raise ValueError(f"scores must be (…, {self.items.shape[-1]}), got shape {tuple(scores.shape)}")
        return scores @ self.weights

    def search(
        self, score: Callable[[Tensor], Tensor], *, top: int = 10, candidates: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the best items for one query and their exact scores: (top,), (top,), descending.

        Args:
            score: maps item indices (k,) to the query's exact scores (k,); called with the anchors, then with the
                ``candidates`` items of highest completed score.
            top: how many to return.
            candidates: how many to score exactly in the second call; default 4 ``top``. The anchors, whose scores are
                exact already, compete too.

        Raises:
            ValueError: ``top`` or ``candidates`` is larger than the number of items.
        """
        total = self.weights.shape[-1]
        integer("top", top, high=total)
        wanted = min(total, 4 * top) if candidates is None else candidates
        integer("candidates", wanted, low=top, high=total)
        known = score(self.items)
        completed = self.complete(known).index_fill(-1, self.items, -torch.inf)
        fresh = completed.topk(min(wanted, total - self.items.numel())).indices
        pool = torch.cat([self.items, fresh])
        exact = torch.cat([known, score(fresh)])
        best = exact.topk(top)
        return pool[best.indices], best.values


@in_own_dtype
def anncur(
    scores: MatrixLike,
    anchors: int | None = None,
    *,
    items: Tensor | None = None,
    method: str = "uniform",
    generator: torch.Generator | None = None,
) -> Anncur:
    """Build the index from the scores of some queries against all items: an interpolative decomposition of that matrix.

    Args:
        scores: S[V, :], (queries, items), float32 or float64, or an array, memory map or implicit matrix.
        anchors: number of anchor items, at most the smaller side.
        items: (a,) anchor items to use in place of a draw.
        method: how the anchors are chosen, as in :func:`~danlu.linalg.lowrank.columns.choose_columns`; uniform in the
            paper.
        generator: source of the random numbers.

    Raises:
        TypeError: a dtype other than float32 and float64.
        ValueError: not a matrix, more anchors than queries or items, NaN or Inf.

    References:
        Yadav et al., "Efficient nearest neighbor search for cross-encoder models using matrix factorization", EMNLP
        2022, arXiv 2210.12579.

    >>> queries, catalogue = torch.randn(6, 2, dtype=torch.float64), torch.randn(2, 50, dtype=torch.float64)
    >>> index = anncur(queries @ catalogue, 2)
    >>> new = torch.randn(2, dtype=torch.float64) @ catalogue
    >>> torch.allclose(index.complete(new[index.items]), new)
    True
    """
    if len(scores.shape) != 2:
        raise ValueError(f"scores must be a matrix (queries, items), got shape {tuple(scores.shape)}")
    if anchors is None and items is None:
        raise ValueError("anchors must be given, or items")
    found = interpolative(scores, anchors, columns=items, method=method, generator=generator)
    return Anncur(found.columns, found.Z, found.error)
