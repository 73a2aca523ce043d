"""Landmark (Nyström) attention: softmax attention in time linear in the length."""

import torch
from torch import Tensor
from torch.nn.functional import softmax

from danlu._validate import choice, integer, number
from danlu.linalg._matrix import in_own_dtype
from danlu.linalg.lowrank.matrix import as_tensor, check_finite
from danlu.linalg.lowrank.pinv import ITERATIONS, iterative_pinv, pinv


@in_own_dtype
def landmark_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    landmarks: int = 64,
    inverse: str = "chebyshev",
    condition: float = 1e3,
    steps: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """softmax(q k̃ᵀ) [softmax(q̃ k̃ᵀ)]⁺ softmax(q̃ kᵀ) v with q̃, k̃ the means over ``landmarks`` segments.

    This is the intersection CUR of the attention matrix, in O(length · landmarks) time and memory; it equals exact
    attention at ``landmarks`` = length. It is not causal: every position attends to the segment means of all. It is
    differentiable.

    The sequence is divided into segments whose lengths differ by at most one. They equal the paper's segments if the
    length is a multiple of ``landmarks``; other lengths need no padding.

    Args:
        q: (…, n, d), float32 or float64.
        k: (…, t, d). v: (…, t, e).
        landmarks: number of segments, at most n and t.
        inverse: ``"chebyshev"`` or ``"nystromformer"`` (see :func:`~danlu.linalg.lowrank.pinv.iterative_pinv`) or
            ``"svd"``.
        condition, steps: passed to the iteration.
        scale: factor on the scores; default 1/sqrt(d).

    Returns:
        (…, n, e).

    Raises:
        TypeError: dtypes that differ or are not float32 or float64.
        ValueError: shapes that do not fit, NaN or Inf in q or k, more landmarks than positions.

    References:
        Xiong et al., "Nyströmformer", AAAI 2021, arXiv 2102.03902.

    >>> torch.manual_seed(0) and None
    >>> q, k, v = torch.randn(3, 2, 16, 4, dtype=torch.float64).unbind()
    >>> landmark_attention(q, k, v, landmarks=8).shape
    torch.Size([2, 16, 4])
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        as_tensor(name, x)
        if x.dtype != q.dtype:
            raise TypeError(f"{name} must have q's dtype {q.dtype}, got {x.dtype}")
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"k must have q's width {q.shape[-1]}, got shape {tuple(k.shape)}")
    if v.shape[-2] != k.shape[-2]:
        raise ValueError(f"v must have k's length {k.shape[-2]}, got shape {tuple(v.shape)}")
    integer("landmarks", landmarks, high=min(q.shape[-2], k.shape[-2]))
    choice("inverse", inverse, (*ITERATIONS, "svd"))
    if scale is None:
        scale = q.shape[-1] ** -0.5
    number("scale", scale)
    q = q * scale
    q_mean, k_mean = segment_means(q, landmarks), segment_means(k, landmarks)
    check_finite("q", q_mean.detach(), q)
    check_finite("k", k_mean.detach(), k)
    A = softmax(q_mean @ k_mean.mT, -1)
    inverted = pinv(A) if inverse == "svd" else iterative_pinv(A, method=inverse, condition=condition, steps=steps)
    near, far = softmax(q @ k_mean.mT, -1), softmax(q_mean @ k.mT, -1)
    values: Tensor = far @ v
    out: Tensor = near @ (inverted @ values)
    return out


def segment_means(x: Tensor, segments: int) -> Tensor:
    """Means of x (…, n, d) over consecutive segments whose lengths differ by at most one: (…, segments, d).

    >>> segment_means(torch.tensor([[0.0], [2.0], [4.0]]), 2)
    tensor([[1.],
            [4.]])
    """
    n = x.shape[-2]
    integer("segments", segments, high=n)
    if n % segments == 0:
        means: Tensor = x.unflatten(-2, (segments, n // segments)).mean(-2)
        return means
    segment = torch.arange(n, device=x.device) * segments // n
    total = x.new_zeros(*x.shape[:-2], segments, x.shape[-1]).index_add(-2, segment, x)
    return total / torch.bincount(segment, minlength=segments).to(x.dtype).unsqueeze(-1)
