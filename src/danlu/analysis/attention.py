r"""The rank of attention: how much of a sequence a matrix of attention weights lets through (kexue.fm 9529).

An ``n x n`` matrix of weights is made from queries and keys of ``d << n`` coordinates. Without a softmax its rank is at
most ``d``. A causal matrix is triangular with a positive diagonal, so it always has full rank in exact arithmetic. With
the softmax the argument is weaker: the exponential gives random bidirectional attention full numerical rank too, and at
usual sizes a better condition number than causal attention. The two differ clearly in depth: see `rank_collapse`.

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
        mask: booleans ``(..., n, n)``, True where a query may attend; each row needs at least one. None: everywhere.
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
    """Return the number of singular values above ``tolerance`` times the largest, ``(...)`` int64.

    The default tolerance is ``n`` times the machine epsilon of the dtype, as in NumPy and MATLAB.

    >>> numerical_rank(torch.ones(3, 3)).item()
    1
    """
    if tolerance is None:
        tolerance = max(a.shape[-2:]) * torch.finfo(a.dtype).eps
    number("tolerance", tolerance, low=0, high=1)
    s: Tensor = torch.linalg.svdvals(a)
    return (s > tolerance * s[..., :1]).sum(-1)


def effective_rank(a: Tensor) -> Tensor:
    r"""Return ``exp(-sum q log q)`` with ``q = s / sum s`` over the singular values, ``(...)``.

    It lies between 1 (rank one) and ``n`` (all singular values equal) and needs no threshold. Source: Roy and
    Vetterli, EUSIPCO 2007.

    >>> round(effective_rank(torch.eye(5)).item(), 4)
    5.0
    """
    s: Tensor = torch.linalg.svdvals(a)
    q = s / s.sum(-1, keepdim=True)
    entropy: Tensor = torch.special.entr(q).sum(-1)
    return entropy.exp()


def triangular_logdet(a: Tensor) -> Tensor:
    """Return the log-determinant of triangular matrices with a positive diagonal, ``(...)``.

    It is the sum of the logarithms of the diagonal, without a factorisation. Diagonals of causal attention reach 1e-20
    beside entries of size one, where the factorisation of ``slogdet`` can even get the sign wrong.

    Raises:
        ValueError: non-zero entries on both sides of the diagonal.

    >>> triangular_logdet(torch.tensor([[1.0, 0.0], [0.5, 0.5]])).item()
    -0.6931471824645996
    """
    if a.triu(1).any() and a.tril(-1).any():
        raise ValueError("a must be triangular, got entries on both sides of the diagonal")
    return a.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def token_spread(x: Tensor) -> Tensor:
    """Return how far the tokens ``x`` ``(..., n, d)`` are from their mean: ``||x - mean|| / ||x||``, ``(...)``."""
    spread: Tensor = (x - x.mean(-2, keepdim=True)).norm(dim=(-2, -1)) / x.norm(dim=(-2, -1))
    return spread


def rank_collapse(
    tokens: int, dim: int, layers: int, *, mask: Tensor | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """Return `token_spread` after each of ``layers`` random attention layers without skips or feed-forwards.

    Tokens are standard normal; the three projections of a layer are normal with variance ``1 / dim``. Source: Dong et
    al., arXiv 2103.03404.

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
