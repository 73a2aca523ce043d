r"""Attention in blocks of queries by batched matrix products: for bfloat16 on a CPU.

There PyTorch's fused attention reaches a tenth of the rate of a matrix product, because its inner products are small
and its arithmetic between them is not vectorised for bfloat16. Here a block of queries of all heads meets the keys up
to its last one in one batched product, so that a causal mask saves the work that it hides. The backward pass is
(FlashAttention, arXiv 2205.14135, appendix B)

.. math:: dV = P^T dO, \quad dS = P \circ (dO\, V^T - \mathrm{rowsum}(dO \circ O)), \quad dQ = s\, dS\, K, \quad
          dK = s\, dS^T Q

and forms the weights ``P`` of a block again, unless the sequence is so short that they take no more memory than the
queries, keys and values, which are kept anyway.

Scores are rounded to bfloat16 before the softmax, an error of the size that rounding queries and keys has brought.

Shape suffixes: N batch times groups, R query heads of a group, T queries and keys, K head size, V value size.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_BLOCK, _LARGEST = 64, 256
"""Queries of a block: fewer waste less work above the diagonal, more have larger products."""


def applies(q: Tensor, k: Tensor) -> bool:
    """Whether `blocked_attention` is the faster way: a whole sequence in bfloat16 on a CPU."""
    return q.dtype == torch.bfloat16 and q.device.type == "cpu" and q.shape[2] == k.shape[2] > 1


def blocked_attention(q_bhtk: Tensor, k_bgtk: Tensor, v_bgtv: Tensor, *, causal: bool, scale: float) -> Tensor:
    """``softmax(scale q k^T) v`` with a group of keys and values for each ``heads / groups`` query heads.

    Args:
        q_bhtk: queries ``(batch, heads, time, size)``.
        k_bgtk: keys ``(batch, groups, time, size)``.
        v_bgtv: values ``(batch, groups, time, value size)``.
        causal: whether a query sees the keys up to its own only, or all.
        scale: factor of the scores.

    Returns:
        ``(batch, heads, time, value size)``. Differentiable once.

    >>> q = torch.randn(2, 4, 7, 6)
    >>> y = blocked_attention(q, q[:, :2], q[:, :2], causal=True, scale=0.5)
    >>> z = torch.nn.functional.scaled_dot_product_attention(
    ...     q, q[:, :2], q[:, :2], is_causal=True, scale=0.5, enable_gqa=True
    ... )
    >>> torch.allclose(y, z, atol=1e-5)
    True
    """
    B, H, T, K = q_bhtk.shape
    G = k_bgtk.shape[1]
    q = q_bhtk.reshape(B * G, H // G, T, K)
    k, v = k_bgtk.reshape(B * G, T, K), v_bgtv.reshape(B * G, T, -1)
    y: Tensor = _Blocked.apply(q, k, v, causal, scale)
    return y.view(B, H, T, -1)


class _Blocked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_nrtk: Tensor, k_ntk: Tensor, v_ntv: Tensor, causal: bool, scale: float) -> Tensor:
        N, R, T, K = q_nrtk.shape
        o = q_nrtk.new_empty(N, R, T, v_ntv.shape[-1])
        keep = any(ctx.needs_input_grad) and R * T <= 4 * (R + 1) * K
        kept = []
        for start, end, seen in _blocks(T, causal):
            p = _weights(q_nrtk[:, :, start:end], k_ntk[:, :seen], causal, scale)
            o[:, :, start:end] = torch.bmm(p, v_ntv[:, :seen]).view(N, R, end - start, -1)
            if keep:
                kept.append(p)
        ctx.causal, ctx.scale = causal, scale
        ctx.save_for_backward(q_nrtk, k_ntk, v_ntv, o, *kept)
        return o

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q_nrtk, k_ntk, v_ntv, o, *kept = ctx.saved_tensors
        N, R, T, K = q_nrtk.shape
        grad_q, grad_k, grad_v = torch.empty_like(q_nrtk), torch.zeros_like(k_ntk), torch.zeros_like(v_ntv)
        for index, (start, end, seen) in enumerate(_blocks(T, ctx.causal)):
            q, k, v = q_nrtk[:, :, start:end], k_ntk[:, :seen], v_ntv[:, :seen]
            p = kept[index] if kept else _weights(q, k, ctx.causal, ctx.scale)
            grad_o = grad[:, :, start:end].reshape(N, R * (end - start), -1)
            along = torch.linalg.vecdot(grad_o, o[:, :, start:end].reshape_as(grad_o)).unsqueeze(-1)
            grad_v[:, :seen].baddbmm_(p.mT, grad_o)
            grad_s = torch.bmm(grad_o, v.mT).sub_(along).mul_(p)
            product = torch.baddbmm(_nothing(q), grad_s, k, beta=0, alpha=ctx.scale)
            grad_q[:, :, start:end] = product.view(N, R, end - start, K)
            grad_k[:, :seen].baddbmm_(grad_s.mT, q.reshape(N, -1, K), alpha=ctx.scale)
        return grad_q, grad_k, grad_v, None, None


def _blocks(time: int, causal: bool) -> Iterator[tuple[int, int, int]]:
    """First query, end, and number of keys seen, of each block."""
    size = min(max(_BLOCK, time // 8), _LARGEST)
    for start in range(0, time, size):
        end = min(start + size, time)
        yield start, end, end if causal else time


def _weights(q_nrtk: Tensor, k_nsk: Tensor, causal: bool, scale: float) -> Tensor:
    """Softmax of a block's scores, ``(N, R T, S)``; in a causal one its last key is its last query's own."""
    N, R, T, K = q_nrtk.shape
    scores = torch.baddbmm(_nothing(q_nrtk), q_nrtk.reshape(N, R * T, K), k_nsk.mT, beta=0, alpha=scale)
    if causal:
        hidden = scores.new_full((T, T), -torch.inf).triu(1)
        scores.view(N, R, T, -1)[..., -T:] += hidden
    return scores.softmax(-1)


def _nothing(like: Tensor) -> Tensor:
    """What `torch.baddbmm` needs as its first argument when nothing is to be added."""
    return like.new_empty(1)
