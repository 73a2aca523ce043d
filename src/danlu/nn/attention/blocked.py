r"""Attention in blocks of queries by batched matrix products: for bfloat16 on a CPU.

There PyTorch's fused attention reaches a tenth of the rate of a matrix product. Here a block of queries of all heads
meets the keys up to its last one in one batched product, so that a causal mask saves the work that it hides. The
backward pass is (FlashAttention, arXiv 2205.14135, appendix B)

.. math:: dV = P^T dO, \quad dS = P \circ (dO\, V^T - \mathrm{rowsum}(dO \circ O)), \quad dQ = s\, dS\, K, \quad
          dK = s\, dS^T Q

and forms the weights ``P`` of a block again, unless the sequence is so short that they take no more memory than the
queries, keys and values, which are kept anyway.

A product in bfloat16 is rounded to eight bits, which at scores of 50 is an error of 0.1 in the exponent of a weight. So
scores are formed twice: the second product starts from minus the largest score of each query, which a matrix product
adds before it rounds, and what counts after the softmax is then close to zero and as good as exact. The backward pass
knows that score and needs one product; what is subtracted in ``dS`` is inside its product for the same reason.

Shape suffixes: N batch times groups, R query heads of a group, T queries and keys, K head size, V value size.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from danlu._autograd import Fused, ordinary

_BLOCK, _LARGEST = 64, 256
"""Queries of a block: fewer waste less work above the diagonal, more have larger products."""


def applies(q: Tensor, k: Tensor, mask: Tensor | None = None) -> bool:
    """Whether `blocked_attention` is the faster way: a whole sequence in bfloat16 on a CPU.

    Not where a mask hides every key from a query, whose weights would not be numbers. A compiled model cannot look, and
    what transforms or differentiates the call in forward mode has rules for PyTorch's own attention.
    """
    if q.dtype != torch.bfloat16 or q.device.type != "cpu" or not q.shape[2] == k.shape[2] > 1:
        return False
    if torch.compiler.is_compiling():
        return mask is None and not torch.compiler.is_exporting()
    return ordinary(q, k, mask) and (mask is None or bool(_any(mask, -1).all()))


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
        ``(batch, heads, time, value size)``.

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
    k, v = k_bgtk.reshape(B * G, T, K), v_bgtv.reshape(B * G, T, v_bgtv.shape[-1])
    bias = None
    if mask is not None:
        mask = mask.expand(-1, -1, T, T)
        bias = q.new_zeros(mask.shape).masked_fill_(~mask, -torch.inf)
        bias = bias.unsqueeze(2) if bias.shape[1] == 1 else bias.unflatten(1, (G, H // G))
    elif causal:
        size = _block(T)
        bias = q.new_full((size, size), -torch.inf).triu(1)
    y = _Blocked.of(q, k, v, bias, scale, (B, *_spans(T, causal, mask)))
    return y.view(B, H, T, v_bgtv.shape[-1])


_Span = tuple[int, int, int, int]
"""First query of a block and the one after its last, first key that they see and the one after the last."""


class _Blocked(Fused):
    """Keeps of the scores each query's largest and its sum of weights, and the weights themselves if they are small."""

    products = True
    compiled = True

    @staticmethod
    def plain(q_nrtk: Tensor, k_ntk: Tensor, v_ntv: Tensor, bias: Tensor | None, scale: float, plan: Any) -> Tensor:
        wide = torch.promote_types(q_nrtk.dtype, torch.float32)
        N, R, T, _ = q_nrtk.shape
        scores = scale * (q_nrtk.to(wide) @ k_ntk.to(wide).unsqueeze(1).mT)
        if bias is not None and bias.dim() == 2:
            scores = scores.masked_fill(torch.ones(T, T, dtype=torch.bool, device=bias.device).triu(1), -torch.inf)
        elif bias is not None:
            scores = (scores.unflatten(0, (plan[0], -1)) + bias).view(N, R, T, T)
        return (scores.softmax(-1) @ v_ntv.to(wide).unsqueeze(1)).to(q_nrtk.dtype)

    @staticmethod
    def fast(
        ctx: Any, q_nrtk: Tensor, k_ntk: Tensor, v_ntv: Tensor, bias: Tensor | None, scale: float, plan: Any
    ) -> tuple[Tensor, ...]:
        if _torch_is_faster(q_nrtk, v_ntv, bias):
            return _torch_forward(q_nrtk, k_ntk, v_ntv, scale, causal=bias is not None)
        N, R, T, K = q_nrtk.shape
        o = q_nrtk.new_empty(N, R, T, v_ntv.shape[-1])
        largest, total = q_nrtk.new_empty(2, N, R, T, 1)
        keep = any(ctx.needs) and R * T <= 4 * (R + 1) * K
        kept = []
        batch, *spans = plan
        for span in spans:
            start, end, first, last = span
            q, k = q_nrtk[:, :, start:end].reshape(N, -1, K), k_ntk[:, first:last]
            scores, most = scores_below_largest(q, k, scale, _hider(bias, batch, R, span))
            e = scores.exp_()
            sums = e.sum(-1, keepdim=True)
            o[:, :, start:end] = torch.bmm(e, v_ntv[:, first:last]).div_(sums).view(N, R, end - start, -1)
            largest[:, :, start:end], total[:, :, start:end] = (t.view(N, R, -1, 1) for t in (most, sums))
            if keep:
                kept.append(e)
        return (o, o, largest, total, *kept)

    @staticmethod
    def derivative(ctx: Any, grad: Tensor, inputs: Sequence[Any], saved: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        q_nrtk, k_ntk, v_ntv, bias, scale, (batch, *spans) = inputs
        o, largest, total, *kept = saved
        N, R, _, K = q_nrtk.shape
        grad_q, grad_k, grad_v = torch.empty_like(q_nrtk), torch.zeros_like(k_ntk), torch.zeros_like(v_ntv)
        grad = (grad / total).to(grad.dtype)  # so that weights need not be divided by their sums
        for index, span in enumerate(spans):
            start, end, first, last = span
            q, k, v = q_nrtk[:, :, start:end].reshape(N, -1, K), k_ntk[:, first:last], v_ntv[:, first:last]
            if kept:
                e = kept[index]
            else:
                scores = torch.baddbmm(largest[:, :, start:end].reshape(N, -1, 1).neg(), q, k.mT, alpha=scale)
                _hider(bias, batch, R, span)(scores)
                e = scores.exp_()
            grad_o = grad[:, :, start:end].reshape(N, R * (end - start), -1)
            along, rest = _along(grad_o, o[:, :, start:end].reshape_as(grad_o))
            grad_v[:, first:last].baddbmm_(e.mT, grad_o)
            grad_s = torch.baddbmm(along.neg_(), grad_o, v.mT).sub_(rest).mul_(e)
            product = torch.baddbmm(_nothing(q), grad_s, k, beta=0, alpha=scale)
            grad_q[:, :, start:end] = product.view(N, R, end - start, K)
            grad_k[:, first:last].baddbmm_(grad_s.mT, q, alpha=scale)
        return grad_q, grad_k, grad_v, None, None, None


def _torch_is_faster(q_nrtk: Tensor, v_ntv: Tensor, bias: Tensor | None) -> bool:
    """Whether PyTorch's forward pass is faster, and only that: with the tiles of AMX, and no mask that saves work."""
    masked = bias is not None and bias.dim() > 2
    return q_nrtk.dtype == torch.bfloat16 and not masked and q_nrtk.shape[-1] == v_ntv.shape[-1] and _tiles()


@cache
def _tiles() -> bool:
    return torch.cpu._is_amx_tile_supported()


def _torch_forward(q_nrtk: Tensor, k_ntk: Tensor, v_ntv: Tensor, scale: float, *, causal: bool) -> tuple[Tensor, ...]:
    """Output by PyTorch's kernel, and what the backward pass needs from the logarithm of its sums of weights."""
    # The kernel reads rows in one piece and looks at no other stride: elsewhere it returns what was in the memory.
    q_nrtk, k_ntk, v_ntv = (t if t.stride(-1) == 1 else t.contiguous() for t in (q_nrtk, k_ntk, v_ntv))
    k, v = (t.unsqueeze(1).expand(-1, q_nrtk.shape[1], -1, -1) for t in (k_ntk, v_ntv))
    o, logs = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q_nrtk, k, v, 0.0, causal, scale=scale)
    logs = logs.unsqueeze(-1)
    largest = logs.to(o.dtype)
    return o, o, largest, (logs - largest).exp()


def _block(time: int) -> int:
    """Queries of a block."""
    return min(max(_BLOCK, time // 8), _LARGEST, time)


def _spans(time: int, causal: bool, mask: Tensor | None) -> list[_Span]:
    """The blocks, and which keys they see."""
    size = _block(time)
    starts = range(0, time, max(size, 1))
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


def scores_below_largest(
    q_nsk: Tensor, k_ntk: Tensor, scale: float, hide: Callable[[Tensor], None]
) -> tuple[Tensor, Tensor]:
    """Scores ``scale q k^T`` less the largest of each query, and this largest one as it was rounded, ``(N, S, 1)``.

    Args:
        q_nsk: queries.
        k_ntk: keys.
        scale: factor.
        hide: adds minus infinity, in place, where a query may not look.

    >>> q, k = torch.full((1, 1, 2), 8.0).bfloat16(), torch.tensor([[[1.0, 2.0], [2.0, 2.0]]]).bfloat16()
    >>> [t.tolist() for t in scores_below_largest(q, k, 1.0, lambda scores: None)]
    [[[[-8.0, 0.0]]], [[[32.0]]]]
    """
    scores = torch.baddbmm(_nothing(q_nsk), q_nsk, k_ntk.mT, beta=0, alpha=scale)
    hide(scores)
    largest = scores.amax(-1, keepdim=True)
    if scores.dtype.itemsize > 2:
        return scores.sub_(largest), largest
    scores = torch.baddbmm(largest.neg(), q_nsk, k_ntk.mT, alpha=scale)
    hide(scores)
    return scores, largest


def one_query(q_nrk: Tensor, k_ntk: Tensor, v_ntv: Tensor, scale: float) -> Tensor:
    """``softmax(scale q k^T) v`` where every query sees every key, ``(N, R, V)``: for one token behind a cache.

    >>> one_query(torch.zeros(1, 1, 2), torch.ones(1, 3, 2), torch.tensor([[[1.0], [2.0], [6.0]]]), 1.0)
    tensor([[[3.]]])
    """
    if q_nrk.dtype.itemsize > 2:
        weights = torch.baddbmm(_nothing(q_nrk), q_nrk, k_ntk.mT, beta=0, alpha=scale).softmax(-1)
    else:
        weights = scores_below_largest(q_nrk, k_ntk, scale, lambda _: None)[0].softmax(-1)
    return torch.bmm(weights, v_ntv)


def _hider(bias: Tensor | None, batch: int, repeats: int, span: _Span) -> Callable[[Tensor], None]:
    """What hides from a block's queries what they may not see, in their scores."""
    start, end, first, last = span

    def hide(scores: Tensor) -> None:
        shaped = scores.view(batch, -1, repeats, end - start, last - first)
        if bias is None:
            return
        if bias.dim() == 2:  # causal: only among a block's own keys is there anything to hide
            shaped[..., start - last :] += bias[: end - start, : end - start]
        else:
            shaped += bias[..., start:end, first:last]

    return hide


def _along(grad_o: Tensor, o: Tensor) -> tuple[Tensor, Tensor]:
    """``rowsum(dO o O)`` as a number of their dtype, and what this rounding leaves."""
    wide = torch.promote_types(o.dtype, torch.float32)
    exact = torch.linalg.vecdot(grad_o.to(wide), o.to(wide)).unsqueeze(-1)
    along = exact.to(o.dtype)
    return along, (exact - along).to(o.dtype)


def _nothing(like: Tensor) -> Tensor:
    """What `torch.baddbmm` needs as its first argument when nothing is to be added."""
    return like.new_empty(1)
