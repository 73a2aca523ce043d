r"""The rank of attention: how much of a sequence a matrix of attention weights lets through (kexue.fm 9529).

An ``n x n`` matrix of weights is made from queries and keys of ``d << n`` coordinates. Without a softmax its rank is at
most ``d``. A causal matrix is triangular with a positive diagonal, so it always has full rank in exact arithmetic. For
the softmax the argument is weaker than it looks: the exponential makes random bidirectional attention numerically
full rank too, and at usual sizes better conditioned than the causal one. What does separate them is depth:
`rank_collapse`.

Matrices are ``(..., n, n)``, rows are queries. Everything works in float64 and is meant for diagnostics.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from danlu._validate import integer, number


def attention_matrix(q: Tensor, k: Tensor, *, mask: Tensor | None = None, kind: str = "softmax") -> Tensor:
    """Attention weights with rows that add to one.

    Args:
        q: queries ``(..., n, d)``.
        k: keys ``(..., n, d)``.
        mask: booleans ``(..., n, n)``, True where a query may look; each row needs one. None: everywhere.
        kind: "softmax" of ``q k^T / sqrt(d)``, or "linear": softplus features without an exponential.

    Raises:
        ValueError: an unknown kind.

    >>> attention_matrix(torch.zeros(2, 3), torch.zeros(2, 3)).tolist()
    [[0.5, 0.5], [0.5, 0.5]]
    """
    if kind == "softmax":
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        return torch.softmax(scores if mask is None else scores.masked_fill(~mask, -torch.inf), dim=-1)
    if kind != "linear":
        raise ValueError(f"kind must be 'softmax' or 'linear', got {kind!r}")
    weights = F.softplus(q) @ F.softplus(k).mT
    weights = weights if mask is None else weights * mask
    return weights / weights.sum(-1, keepdim=True)


def numerical_rank(a: Tensor, *, tolerance: float | None = None) -> Tensor:
    """Singular values above ``tolerance`` times the largest, ``(...)`` int64.

    None is ``n`` times the rounding unit of the dtype, as NumPy's and MATLAB's rank.

    >>> numerical_rank(torch.ones(3, 3)).item()
    1
    """
    if tolerance is None:
        tolerance = max(a.shape[-2:]) * torch.finfo(a.dtype).eps
    number("tolerance", tolerance, low=0, high=1)
    s: Tensor = torch.linalg.svdvals(a)
    return (s > tolerance * s[..., :1]).sum(-1)


def effective_rank(a: Tensor) -> Tensor:
    r"""``exp(-sum q log q)`` with ``q = s / sum s`` over the singular values, ``(...)``.

    Roy and Vetterli, EUSIPCO 2007. Between 1 (rank one) and ``n`` (all singular values equal), without a threshold.

    >>> round(effective_rank(torch.eye(5)).item(), 4)
    5.0
    """
    s: Tensor = torch.linalg.svdvals(a)
    q = s / s.sum(-1, keepdim=True)
    entropy: Tensor = torch.special.entr(q).sum(-1)
    return entropy.exp()


def triangular_logdet(a: Tensor) -> Tensor:
    """Log of the determinant of triangular matrices with a positive diagonal: the sum of its logarithms, ``(...)``.

    A factorisation is not needed, and not wanted: diagonals of causal attention reach 1e-20 beside entries of size
    one, where that of ``slogdet`` can lose even the sign.

    Raises:
        ValueError: an entry on both sides of the diagonal.

    >>> triangular_logdet(torch.tensor([[1.0, 0.0], [0.5, 0.5]])).item()
    -0.6931471824645996
    """
    if a.triu(1).any() and a.tril(-1).any():
        raise ValueError("a must be triangular, got entries on both sides of the diagonal")
    return a.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def token_spread(x: Tensor) -> Tensor:
    """Share of ``x`` ``(..., n, d)`` that is not the mean token: ``||x - mean|| / ||x||``, ``(...)``."""
    spread: Tensor = (x - x.mean(-2, keepdim=True)).norm(dim=(-2, -1)) / x.norm(dim=(-2, -1))
    return spread


def rank_collapse(
    tokens: int, dim: int, layers: int, *, mask: Tensor | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """`token_spread` after each of ``layers`` random attention layers without skips or feed-forwards.

    Dong et al., arXiv 2103.03404. Tokens are normal, as are the three maps of a layer, with variance ``1 / dim``.

    Args:
        tokens: length n.
        dim: size of tokens, queries, keys and values.
        layers: number of layers.
        mask: as in `attention_matrix`.
        generator: source of randomness.

    Returns:
        float64 ``(layers,)``.

    >>> falls = rank_collapse(32, 16, 3, generator=torch.Generator().manual_seed(0))
    >>> bool(falls[2] < falls[0])
    True
    """
    for name, value in (("tokens", tokens), ("dim", dim), ("layers", layers)):
        integer(name, value)
    x = torch.randn(tokens, dim, dtype=torch.float64, generator=generator)
    found = []
    for _ in range(layers):
        w_q, w_k, w_v = torch.randn(3, dim, dim, dtype=torch.float64, generator=generator) / dim**0.5
        x = attention_matrix(x @ w_q, x @ w_k, mask=mask) @ (x @ w_v)
        found.append(token_spread(x))
    return torch.stack(found)
