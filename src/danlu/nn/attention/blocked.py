r"""Attention in blocks of queries by batched matrix products: for bfloat16 on a CPU.

There PyTorch's fused attention reaches a tenth of the rate of a matrix product. Here a block of queries of all heads
meets the keys up to its last one in one batched product, so that a causal mask saves the work that it hides. The
backward pass is (FlashAttention, arXiv 2205.14135, appendix B)

.. math:: dV = P^T dO, \quad dS = P \circ (dO\, V^T - \mathrm{rowsum}(dO \circ O)), \quad dQ = s\, dS\, K, \quad
          dK = s\, dS^T Q

and forms the weights ``P`` of a block again, unless the sequence is so short that they take no more memory than the
queries, keys and values, which are kept anyway.

Scores are rounded to bfloat16 before the softmax, an error of the size that rounding queries and keys has brought.

Shape suffixes: N batch times groups, R query heads of a group, T queries and keys, K head size, V value size.
"""

from typing import Any

import torch
from torch import Tensor

_BLOCK, _LARGEST = 64, 256
"""Queries of a block: fewer waste less work above the diagonal, more have larger products."""


def applies(q: Tensor, k: Tensor, mask: Tensor | None = None) -> bool:
    """Whether `blocked_attention` is the faster way: a whole sequence in bfloat16 on a CPU.

    Not where a mask hides every key from a query, whose weights would not be numbers. A compiled model cannot look.
    """
    if q.dtype != torch.bfloat16 or q.device.type != "cpu" or not q.shape[2] == k.shape[2] > 1:
        return False
    return mask is None or (not torch.compiler.is_compiling() and bool(_any(mask, -1).all()))


def blocked_attention(
    q_bhtk: Tensor, k_bgtk: Tensor, v_bgtv: Tensor, *, causal: bool, scale: float, mask: Tensor | None = None
) -> Tensor:
    """``softmax(scale q k^T) v`` with a group of keys and values for each ``heads / groups`` query heads.

    Args:
        q_bhtk: queries ``(batch, heads, time, size)``.
        k_bgtk: keys ``(batch, groups, time, size)``.
        v_bgtv: values ``(batch, groups, time, value size)``.
        causal: whether a query sees the keys up to its own only, or all.
        scale: factor of the scores.
        mask: True where a query may look, ``(1 or batch, 1 or heads, 1 or time, time)``, in the place of ``causal``;
            what no query of a block may see costs nothing.

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
    bias = None
    if mask is not None:
        mask = mask.expand(-1, -1, T, T)
        bias = q.new_zeros(mask.shape).masked_fill_(~mask, -torch.inf)
        bias = bias.unsqueeze(2) if bias.shape[1] == 1 else bias.unflatten(1, (G, H // G))
    elif causal:
        size = _block(T)
        bias = q.new_full((size, size), -torch.inf).triu(1)
    y: Tensor = _Blocked.apply(q, k, v, bias, scale, (B, *_spans(T, causal, mask)))
    return y.view(B, H, T, -1)


_Span = tuple[int, int, int, int]
"""First query of a block and the one after its last, first key that they see and the one after the last."""


class _Blocked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_nrtk: Tensor, k_ntk: Tensor, v_ntv: Tensor, bias: Tensor | None, scale: float, plan: Any
    ) -> Tensor:
        N, R, T, K = q_nrtk.shape
        o = q_nrtk.new_empty(N, R, T, v_ntv.shape[-1])
        keep = any(ctx.needs_input_grad) and R * T <= 4 * (R + 1) * K
        kept = []
        batch, *spans = plan
        for span in spans:
            start, end, first, last = span
            p = _weights(q_nrtk, k_ntk, bias, scale, batch, span)
            o[:, :, start:end] = torch.bmm(p, v_ntv[:, first:last]).view(N, R, end - start, -1)
            if keep:
                kept.append(p)
        ctx.scale, ctx.plan = scale, plan
        ctx.save_for_backward(q_nrtk, k_ntk, v_ntv, bias, o, *kept)
        return o

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q_nrtk, k_ntk, v_ntv, bias, o, *kept = ctx.saved_tensors
        N, R, _, K = q_nrtk.shape
        grad_q, grad_k, grad_v = torch.empty_like(q_nrtk), torch.zeros_like(k_ntk), torch.zeros_like(v_ntv)
        batch, *spans = ctx.plan
        for index, span in enumerate(spans):
            start, end, first, last = span
            q, k, v = q_nrtk[:, :, start:end], k_ntk[:, first:last], v_ntv[:, first:last]
            p = kept[index] if kept else _weights(q_nrtk, k_ntk, bias, ctx.scale, batch, span)
            grad_o = grad[:, :, start:end].reshape(N, R * (end - start), -1)
            along = torch.linalg.vecdot(grad_o, o[:, :, start:end].reshape_as(grad_o)).unsqueeze(-1)
            grad_v[:, first:last].baddbmm_(p.mT, grad_o)
            grad_s = torch.bmm(grad_o, v.mT).sub_(along).mul_(p)
            product = torch.baddbmm(_nothing(q), grad_s, k, beta=0, alpha=ctx.scale)
            grad_q[:, :, start:end] = product.view(N, R, end - start, K)
            grad_k[:, first:last].baddbmm_(grad_s.mT, q.reshape(N, -1, K), alpha=ctx.scale)
        return grad_q, grad_k, grad_v, None, None, None


def _block(time: int) -> int:
    """Queries of a block."""
    return min(max(_BLOCK, time // 8), _LARGEST, time)


def _spans(time: int, causal: bool, mask: Tensor | None) -> list[_Span]:
    """The blocks, and which keys they see."""
    size = _block(time)
    starts = range(0, time, size)
    ends = [min(start + size, time) for start in starts]
    if mask is None:
        return [(start, end, 0, end if causal else time) for start, end in zip(starts, ends)]
    seen_tt = _any(mask.flatten(0, 1), 0)
    spans = []
    for start, end in zip(starts, ends):
        seen = seen_tt[start:end].any(0).nonzero()
        spans.append((start, end, int(seen[0]), int(seen[-1]) + 1))
    return spans


def _any(mask: Tensor, dim: int) -> Tensor:
    """``mask.any(dim)`` through the largest of its bytes: on a CPU nine to thirty times as fast."""
    return mask.view(torch.uint8).amax(dim).bool()


def _weights(q_nrtk: Tensor, k_ntk: Tensor, bias: Tensor | None, scale: float, batch: int, span: _Span) -> Tensor:
    """Softmax of a block's scores, ``(N, R times the block's queries, the keys that they see)``."""
    start, end, first, last = span
    N, R, _, K = q_nrtk.shape
    q, k = q_nrtk[:, :, start:end].reshape(N, -1, K), k_ntk[:, first:last]
    scores = torch.baddbmm(_nothing(q), q, k.mT, beta=0, alpha=scale)
    if bias is not None:
        shaped = scores.view(batch, N // batch, R, end - start, last - first)
        if bias.dim() == 2:  # causal: only among a block's own keys is there anything to hide
            shaped[..., start - last :] += bias[: end - start, : end - start]
        else:
            shaped += bias[..., start:end, first:last]
    return scores.softmax(-1)


def _nothing(like: Tensor) -> Tensor:
    """What `torch.baddbmm` needs as its first argument when nothing is to be added."""
    return like.new_empty(1)
