r"""Attention in blocks of queries by batched matrix products: for bfloat16 on a CPU.

There the backward pass of PyTorch's fused attention reaches a tenth of the rate of a matrix product. Here a block of
queries of all heads meets the keys up to its last one in one batched product, so that a causal mask saves the work that
it hides. The backward pass is (FlashAttention, arXiv 2205.14135, appendix B)

.. math:: dV = P^T dO, \quad dS = P \circ (dO\, V^T - \mathrm{rowsum}(dO \circ O)), \quad dQ = s\, dS\, K, \quad
          dK = s\, dS^T Q

and forms the weights ``P`` of a block again.

A product in bfloat16 is rounded to eight bits, which at scores of 50 is an error of 0.1 in the exponent of a weight. So
what all scores of a query have in common is subtracted inside of the product, before it rounds: it stands, as two
numbers of eight bits, in two more columns of the queries, and the keys have two columns of ones. What counts after the
softmax is then close to zero and as good as exact. The same two columns subtract ``rowsum(dO o O)``. Scores and weights
are transposed, ``(keys, queries)``, so that three of the five products read them row by row.

The forward pass is PyTorch's kernel, whose scores are float32, on processors with the tiles of AMX. Elsewhere it forms
scores twice, first to find the largest of each query.

Shape suffixes: N batch times groups, R query heads of a group, T queries and keys, S queries of a block times R, K head
size, V value size.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from danlu._autograd import Fused, device_type, ordinary

_BLOCK, _LARGEST = 128, 256
"""Queries of a block: fewer waste less work above the diagonal, more have larger products."""

_SHIFT = 8.0
"""PyTorch's kernel keeps the logarithm of a query's sum of weights. The largest score, which is closer to what counts,
lies somewhere below it: a factor of eight is a middle, and a power of two rounds nothing."""


def applies(q: Tensor, k: Tensor, mask: Tensor | None = None) -> bool:
    """Whether `blocked_attention` is the faster way: a whole sequence in bfloat16 on a CPU.

    Not where a mask hides every key from a query, whose weights would not be numbers. A compiled model cannot look, and
    what transforms or differentiates the call in forward mode has rules for PyTorch's own attention.
    """
    if q.dtype != torch.bfloat16 or device_type(q) != "cpu" or not q.shape[2] == k.shape[2] > 1:
        return False
    if torch.compiler.is_compiling():
        return mask is None and not torch.compiler.is_exporting()
    return ordinary(q, k, mask) and (mask is None or mask.is_meta or bool(_any(mask, -1).all()))


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
    T = q_bhtk.shape[2]
    bias = None
    if mask is not None:
        mask = mask.expand(-1, -1, T, T)
        bias = _bias(mask).to(q_bhtk.dtype)
    elif causal:
        size = _block(T)
        bias = q_bhtk.new_full((size, size), -torch.inf).triu(1)
    # What is subtracted inside of a product is divided by its factor first.
    return _Blocked.of(q_bhtk, k_bgtk, v_bgtv, bias, scale, _spans(T, causal, mask), by_hand=scale != 0)


_Span = tuple[int, int, int, int]
"""First query of a block and the one after its last, first key that they see and the one after the last."""


class _Blocked(Fused):
    """Keeps what is subtracted from each query's scores, its sum of weights after that, and weights if they are few."""

    products = True
    compiled = True

    @staticmethod
    def plain(q_bhtk: Tensor, k_bgtk: Tensor, v_bgtv: Tensor, bias: Tensor | None, scale: float, spans: Any) -> Tensor:
        wide = torch.promote_types(q_bhtk.dtype, torch.float32)
        repeats = q_bhtk.shape[1] // k_bgtk.shape[1]
        k_bhtk, v_bhtv = (t.to(wide).repeat_interleave(repeats, 1) for t in (k_bgtk, v_bgtv))
        scores = scale * (q_bhtk.to(wide) @ k_bhtk.mT)
        if bias is not None and bias.dim() == 2:
            hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=bias.device).triu(1)
            scores = scores.masked_fill(hidden, -torch.inf)
        elif bias is not None:
            scores = scores + bias
        return (scores.softmax(-1) @ v_bhtv).to(q_bhtk.dtype)

    @staticmethod
    def fast(
        ctx: Any, q_bhtk: Tensor, k_bgtk: Tensor, v_bgtv: Tensor, bias: Tensor | None, scale: float, spans: list[_Span]
    ) -> tuple[Tensor | None, ...]:
        if q_bhtk.dtype == torch.bfloat16 and _tiles():
            o, logs = _torch_forward(q_bhtk, k_bgtk, v_bgtv, bias, scale, spans)
            return o, o, logs - math.log(_SHIFT), None
        B, H, T, K = q_bhtk.shape
        G = k_bgtk.shape[1]
        keep = any(ctx.needs) and H * T <= 4 * (H + G) * K
        o = q_bhtk.new_empty(B, T, H, v_bgtv.shape[-1]).transpose(1, 2)
        largest, total = q_bhtk.new_empty(2, B, H, T, dtype=torch.promote_types(q_bhtk.dtype, torch.float32))
        k_ntk, v_ntv = _with_columns(k_bgtk, 1).flatten(0, 1), v_bgtv.flatten(0, 1)
        hide, kept = _hider(bias, B, G, H // G), []
        for span in spans:
            start, end, first, last = span
            q_bhsk, k = _with_columns(q_bhtk[:, :, start:end], 0), k_ntk[:, first:last].contiguous()
            scores_nts = _product(k, _grouped(q_bhsk, G).mT, scale)
            hide(scores_nts, span)
            below = scores_nts.amax(1).view(B, H, end - start).to(largest.dtype)
            _fill(q_bhsk[..., K:], below / -scale)
            e_nts = _product(k, _grouped(q_bhsk, G).mT, scale)
            hide(e_nts, span)
            sums = e_nts.exp_().sum(1, dtype=total.dtype)
            y_nsv = torch.bmm(e_nts.mT, v_ntv[:, first:last]).div_(sums.unsqueeze(-1))
            o[:, :, start:end] = y_nsv.view(B, H, end - start, -1)
            largest[:, :, start:end], total[:, :, start:end] = below, sums.view(B, H, -1)
            if keep:
                kept.append(e_nts)
        return o, o, largest, total, *kept

    @staticmethod
    def derivative(ctx: Any, grad: Tensor, inputs: Sequence[Any], saved: Sequence[Any]) -> tuple[Tensor | None, ...]:
        q_bhtk, k_bgtk, v_bgtv, bias, scale, spans = inputs
        o, below, total, *kept = saved
        (B, H, T, K), G, V = q_bhtk.shape, k_bgtk.shape[1], v_bgtv.shape[-1]
        share = 1 / _SHIFT
        if total is not None:  # instead of the weights
            grad, share = (grad / total.unsqueeze(-1)).to(grad.dtype), 1.0
        along = (grad * o).sum(-1, dtype=below.dtype)
        k_ntk, v_ntv = (_with_columns(t, 1).flatten(0, 1) for t in (k_bgtk, v_bgtv))
        grad_q = torch.empty_like(q_bhtk)
        grad_k, grad_v = torch.empty_like(k_ntk), torch.empty_like(v_ntv)
        hide = _hider(bias, B, G, H // G)
        # The last block comes first: where it sees every key there is nothing yet to add to.
        count = len(spans)
        whole = spans[-1][2] == 0 and spans[-1][3] == T
        if not whole:
            grad_k.zero_()
            grad_v.zero_()
        for index in range(count - 1, -1, -1):
            start, end, first, last = spans[index]
            beta = 0 if whole and index == count - 1 else 1
            q_nsk = _grouped(_with_columns(q_bhtk[:, :, start:end], below[:, :, start:end] / -scale), G)
            grad_nsv = _grouped(_with_columns(grad[:, :, start:end], -along[:, :, start:end]), G)
            k, v = (t[:, first:last].contiguous() for t in (k_ntk, v_ntv))
            if kept:
                e_nts = kept[index]
            else:
                e_nts = _product(k, q_nsk.mT, scale)
                hide(e_nts, spans[index])
                e_nts.exp_()
            grad_v[:, first:last].baddbmm_(e_nts, grad_nsv, beta=beta, alpha=share)
            grad_s = torch.bmm(v, grad_nsv.mT).mul_(e_nts)
            grad_k[:, first:last].baddbmm_(grad_s, q_nsk, beta=beta, alpha=scale * share)
            product = _product(grad_s.mT, k, scale * share)
            grad_q[:, :, start:end] = product.view(B, H, end - start, -1)[..., :K]
        return grad_q, grad_k.view(B, G, T, -1)[..., :K], grad_v.view(B, G, T, -1)[..., :V], None, None, None


@cache
def _tiles() -> bool:
    return torch.cpu._is_amx_tile_supported()


def _torch_forward(
    q_bhtk: Tensor, k_bgtk: Tensor, v_bgtv: Tensor, bias: Tensor | None, scale: float, spans: list[_Span]
) -> tuple[Tensor, Tensor]:
    """Output by PyTorch's kernel, and the logarithms of its sums of weights."""
    H, T = q_bhtk.shape[1:3]
    size, value = q_bhtk.shape[-1], v_bgtv.shape[-1]
    q, k, v = (_wider(t, max(size, value)) for t in (q_bhtk, k_bgtk, v_bgtv))
    k, v = (
        t.expand(-1, H, -1, -1) if t.shape[1] in (1, H) else t.repeat_interleave(H // t.shape[1], 1) for t in (k, v)
    )
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    if bias is None or bias.dim() == 2:
        o, logs = attend(q, k, v, 0.0, bias is not None, scale=scale)
    elif 2 * sum((end - start) * (last - first) for start, end, first, last in spans) > T * T:
        o, logs = attend(q, k, v, 0.0, attn_mask=bias, scale=scale)
    else:
        parts = [
            attend(q[:, :, i:j], k[:, :, m:n], v[:, :, m:n], 0.0, attn_mask=bias[..., i:j, m:n], scale=scale)
            for i, j, m, n in spans
        ]
        o = torch.cat([o.transpose(1, 2) for o, _ in parts], 1).transpose(1, 2)
        logs = torch.cat([logs for _, logs in parts], 2)
    return o[..., :value], logs


def _wider(t: Tensor, size: int) -> Tensor:
    """With rows of this size, zeros at their end, in one piece each."""
    if t.shape[-1] < size:
        return F.pad(t, (0, size - t.shape[-1]))
    # PyTorch's kernel looks at no other stride: elsewhere it returns what was in the memory.
    return t if t.stride(-1) == 1 else t.contiguous()


def _with_columns(t: Tensor, extra: Tensor | float) -> Tensor:
    """A copy whose rows have two more entries: ``extra`` as a sum of two numbers of its dtype, or twice a number."""
    size = t.shape[-1]
    y = t.new_empty(*t.shape[:-1], size + 2)
    y[..., :size] = t
    _fill(y[..., size:], extra)
    return y


def _fill(columns: Tensor, extra: Tensor | float) -> None:
    if not isinstance(extra, Tensor):
        columns.fill_(extra)
        return
    first = extra.to(columns.dtype)
    columns[..., 0], columns[..., 1] = first, extra - first


def _grouped(t_bhsx: Tensor, groups: int) -> Tensor:
    """The rows of all heads of a group, one after the other, ``(N, S, X)``."""
    return t_bhsx.view(t_bhsx.shape[0] * groups, -1, t_bhsx.shape[-1])


def _product(a: Tensor, b: Tensor, factor: float) -> Tensor:
    """``factor a b`` in one pass: `torch.baddbmm`, whose first argument counts for nothing."""
    return torch.baddbmm(a.new_empty(1), a, b, beta=0, alpha=factor)


def _bias(mask: Tensor) -> Tensor:
    """0 where it is True and minus infinity elsewhere, in bfloat16, by its bits: a tenth of the time of a choice."""
    return mask.view(torch.uint8).to(torch.int16).sub_(1).bitwise_and_(-0x80).view(torch.bfloat16)


def _block(time: int) -> int:
    """Queries of a block."""
    return min(max(_BLOCK, time // 8), _LARGEST, time)


def _spans(time: int, causal: bool, mask: Tensor | None) -> list[_Span]:
    """The blocks, and which keys they see."""
    size = _block(time)
    starts = range(0, time, max(size, 1))
    ends = [min(start + size, time) for start in starts]
    if mask is None or mask.is_meta:  # of meta tensors nobody knows: as much as a causal mask shows
        causal = causal or mask is not None
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


def one_query(q_nrk: Tensor, k_ntk: Tensor, v_ntv: Tensor, scale: float) -> Tensor:
    """``softmax(scale q k^T) v`` where every query sees every key, ``(N, R, V)``: for one token behind a cache.

    >>> one_query(torch.zeros(1, 1, 2), torch.ones(1, 3, 2), torch.tensor([[[1.0], [2.0], [6.0]]]), 1.0)
    tensor([[[3.]]])
    """
    scores = _product(q_nrk, k_ntk.mT, scale)
    if scores.dtype.itemsize <= 2:
        # Rounded to eight bits: once more, less the largest, which is subtracted before the product is rounded.
        scores = torch.baddbmm(scores.amax(-1, keepdim=True).neg(), q_nrk, k_ntk.mT, alpha=scale)
    weights = scores.softmax(-1)
    return torch.bmm(weights, v_ntv)


def _hider(bias: Tensor | None, batch: int, groups: int, repeats: int) -> Callable[[Tensor, _Span], None]:
    """What hides from a block's queries what they may not see, in their transposed scores."""
    if bias is not None and bias.dim() == 2:
        turned = bias.mT.contiguous()
    elif bias is not None:
        shaped = bias.unsqueeze(2) if bias.shape[1] == 1 else bias.unflatten(1, (groups, repeats))
        turned = shaped.movedim(-1, 2).contiguous()

    def hide(scores_nts: Tensor, span: _Span) -> None:
        start, end, first, last = span
        if bias is None:
            return
        if bias.dim() == 2:  # causal: only among a block's own keys is there anything to hide
            own = scores_nts.view(-1, last - first, repeats, end - start)[:, start - last :]
            own += turned[: end - start, None, : end - start]
        else:
            scores_nts.view(batch, groups, last - first, repeats, end - start).add_(
                turned[:, :, first:last, :, start:end]
            )

    return hide
