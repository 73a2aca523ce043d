"""PyTorch's scaled dot-product attention, whose fused kernels can be differentiated once, made differentiable.

The kernels have neither a derivative of their derivative nor one in forward mode. There, and under ``torch.func``, the
plain formula is taken: the weights of all pairs of tokens are then formed.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from danlu._autograd import Fused, device_type, ordinary


def scaled_dot_product(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, causal: bool = False, scale: float | None = None
) -> Tensor:
    """``softmax(scale q k^T) v`` by PyTorch's kernels: ``(batch, heads, time, value size)``.

    Args:
        q: queries ``(batch, heads, time, size)``.
        k: keys ``(batch, groups, keys, size)``, groups dividing heads.
        v: values ``(batch, groups, keys, value size)``.
        mask: booleans, True where a query may look, broadcastable to ``(batch, heads, time, keys)``.
        causal: whether a query sees the keys up to its own only.
        scale: factor of the scores; None is ``1 / sqrt(size)``.

    >>> import torch
    >>> x = torch.ones(1, 1, 2, 3, requires_grad=True)
    >>> (slope,) = torch.autograd.grad(scaled_dot_product(x, x, x).sum(), x, create_graph=True)
    >>> torch.autograd.grad(slope.square().sum(), x)[0].shape
    torch.Size([1, 1, 2, 3])
    """
    return _Attention.of(q, k, v, mask, causal, scale)


class _Attention(Fused):
    products = True
    native = True

    @staticmethod
    def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return _Attention.fast(None, q, k, v, mask, causal, scale)[0]

    @staticmethod
    def fast(
        _: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None
    ) -> tuple[Tensor]:
        shared = q.shape[1] != k.shape[1]
        # Planned: a CPU's fused kernel wants values of the size of keys, a GPU's does not.
        if q.is_meta and ordinary(q, k, v) and (device_type(q) != "cpu" or q.shape[-1] == v.shape[-1]):
            return (_Sizes.apply(q, k, v),)
        return (
            F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=shared),
        )


class _Sizes(torch.autograd.Function):
    """What a fused kernel keeps and returns, of tensors without numbers: on meta PyTorch would form all weights."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        (B, H, T, _), V = q.shape, v.shape[-1]
        o = q.new_empty(B, T, H, V).transpose(1, 2)
        ctx.save_for_backward(q, k, v, o, q.new_empty(B, H, T, dtype=torch.float32))
        return o

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])
