r"""Multi-head, grouped-query and multi-query attention.

Head ``s`` of ``h`` uses key and value group ``ceil(s g / h)`` (counted from one): ``g = h`` is multi-head attention
(Vaswani et al., 1706.03762), ``g = 1`` multi-query attention (Shazeer, 1911.02150), anything between is grouped-query
attention (Ainslie et al., 2305.13245). Only the groups' keys and values are cached.

Shape suffixes: B batch, T new tokens, L all tokens so far, H heads, G groups, K head size, D model size.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from danlu._validate import integer
from danlu.nn.attention.cache import LayerCache
from danlu.nn.attention.masks import (
    LayeredMask,
    attention_under,
    causal_mask,
    check_cached,
    check_mask,
    check_start,
    keys_seen,
    mask_of_layer,
    masked_attention,
)
from danlu.nn.linear import Linear
from danlu.nn.rotary import rotate
from danlu.protocols import Context


@dataclass(frozen=True, kw_only=True)
class GQAConfig:
    """Sizes of a `GQA` layer."""

    renamed: ClassVar[dict[str, str]] = {"heads": "num_heads", "groups": "num_kv_heads"}

    num_heads: int = 8
    """query heads"""
    num_kv_heads: int | None = None
    """key and value heads, a divisor of num_heads; None: as many as num_heads (multi-head), 1: multi-query"""
    head_dim: int | None = None
    """size of a head; None: dim / num_heads"""
    rope_dim: int | None = None
    """rotated coordinates of each head (the last ones); None: all of them, 0: no positions"""
    mask: LayeredMask = "causal"
    """which tokens a query sees, see `danlu.nn.attention.masks`"""

    def build(self, dim: int, *, out_std: float, index: int | None = None, **others: Any) -> "GQA":
        """Make the layer of block ``index``; see `danlu.protocols.MixerConfig`."""
        inner = self.num_heads * self.head_dim if self.head_dim else dim
        own = replace(self, mask=mask_of_layer(self.mask, index))
        return GQA(dim, own, out_std=out_std * math.sqrt(dim / max(inner, 1)))


class GQA(nn.Module):
    """Attention of ``num_heads`` queries over ``num_kv_heads`` keys and values, under ``config.mask``.

    Args:
        dim: model size D.
        config: sizes.
        out_std: standard deviation of the output projection; None means ``1 / sqrt(num_heads * head_dim)``.

    Raises:
        ValueError: sizes that do not divide, or an odd number of rotated coordinates.

    >>> from danlu.nn.rotary import rotary_angles
    >>> layer = GQA(12, GQAConfig(num_heads=3, num_kv_heads=1))
    >>> layer(torch.randn(2, 5, 12), Context(rope=rotary_angles(torch.arange(5), layer.rope_dim))).shape
    torch.Size([2, 5, 12])
    """

    def __init__(self, dim: int, config: GQAConfig, *, out_std: float | None = None) -> None:
        super().__init__()
        integer("num_heads", config.num_heads)
        self.num_heads = config.num_heads
        self.num_kv_heads = config.num_heads if config.num_kv_heads is None else config.num_kv_heads
        integer("num_kv_heads", self.num_kv_heads)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads must divide num_heads = {self.num_heads}, got {self.num_kv_heads}")
        if config.head_dim is None and dim % self.num_heads:
            raise ValueError(f"num_heads must divide dim = {dim} when head_dim is not given, got {self.num_heads}")
        self.head_dim = dim // self.num_heads if config.head_dim is None else config.head_dim
        integer("head_dim", self.head_dim)
        self.rope_dim = self.head_dim if config.rope_dim is None else config.rope_dim
        integer("rope_dim", self.rope_dim, low=0, high=self.head_dim)
        if self.rope_dim % 2:
            raise ValueError(f"rope_dim must be even (coordinates are rotated in pairs), got {self.rope_dim}")
        self.mask = check_mask(config.mask, self.num_heads, self.num_kv_heads)
        rows = (self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim, self.num_kv_heads * self.head_dim)
        self.qkv = Linear(dim, sum(rows), split=rows)
        self.out = Linear(rows[0], dim, std=out_std)

    def new_cache(self, batch: int, capacity: int, *, dtype: torch.dtype, device: torch.device) -> LayerCache:
        """Cache of ``capacity`` tokens: ``2 * num_kv_heads * head_dim`` elements per token."""
        check_cached(self.mask)
        shape = (batch, self.num_kv_heads, capacity, self.head_dim)
        return LayerCache(*(torch.empty(shape, dtype=dtype, device=device) for _ in range(2)))

    def flops_per_token(self, length: int) -> float:
        """Operations per token of the score and value products at ``length`` tokens, two for a multiply-add."""
        return 2 * self.num_heads * 2 * self.head_dim * keys_seen(self.mask, length)

    def forward(self, x_btd: Tensor, context: Context[LayerCache] | None = None) -> Tensor:
        """Attend.

        Args:
            x_btd: ``(batch, time, dim)``.
            context: the tables ``rope`` for these tokens; ``mask``, ``prefix`` and ``cache`` where there are any.

        Returns:
            ``(batch, time, dim)``.
        """
        context = Context() if context is None else context
        mask, prefix, cache = context.mask, context.prefix, context.cache
        B, T, _ = x_btd.shape
        H, G = self.num_heads, self.num_kv_heads
        # Split, not sliced: the gradients of slices are made by filling each up with zeros, and are then added.
        qk, v = self.qkv(x_btd).view(B, T, H + 2 * G, self.head_dim).split((H + G, G), dim=2)
        cos, sin = context.tables(self.rope_dim)
        q, k = rotate(qk, cos.unsqueeze(-2), sin.unsqueeze(-2)).split((H, G), dim=2)
        q_bhtk, k_bglk, v_bglk = (t.transpose(1, 2) for t in (q, k, v))
        if cache is not None:
            k_bglk, v_bglk = cache.append(k_bglk, v_bglk)
        L = k_bglk.shape[-2]
        if mask is None and T == L:
            o = masked_attention(q_bhtk, k_bglk, v_bglk, self.mask, prefix=prefix)
        else:
            check_start(prefix, L - T)
            if mask is None and T > 1:
                mask = causal_mask(T, L, device=x_btd.device)
            o = attention_under(q_bhtk, k_bglk, v_bglk, mask)
        y: Tensor = self.out(o.transpose(1, 2).reshape(B, T, H * self.head_dim))
        return y
