r"""Attention whose values are its keys (kexue.fm 11111 and 10907, there: KV-shared with partial RoPE and VO-RoPE).

One vector ``c_i`` of ``head_dim`` coordinates a group is key and value alike; its last ``rope_dim`` coordinates are
rotated by the position ``i``. A value rotated by ``i`` and summed at ``t`` would carry absolute positions, so the
output is rotated back by ``t``:

.. math:: o_t = R_t^T \sum_{i \le t} a_{ti} R_i c_i, \qquad a_{ti} \propto \exp(\tau\, (R_t q_t)^T R_i c_i),

which depends on ``t - i`` alone. A token costs ``num_kv_heads * head_dim`` cached elements, half of a grouped-query
layer of the same heads: at an equal cache the heads can be twice as large.

The study has two more ways with the rotated coordinates (`KVSharedConfig.value_rope`): values that have coordinates of
their own in that place (there: S1), which costs ``rope_dim`` more cached elements a group, and values without them (S3,
the form in which latent attention decodes, trained as it is).

Shape suffixes: B batch, T new tokens, L all tokens so far, H heads, G groups, K head size, V value size,
D model size.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from danlu._validate import integer, literals
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
class KVSharedConfig:
    """Sizes of a `KVShared` layer."""

    renamed: ClassVar[dict[str, str]] = {"heads": "num_heads", "groups": "num_kv_heads"}

    num_heads: int = 8
    """query heads"""
    num_kv_heads: int = 1
    """key-values, a divisor of num_heads"""
    head_dim: int = 64
    """size of a head; cached once a group"""
    rope_dim: int = 16
    """rotated coordinates of each head (the last ones); 0: no positions"""
    value_rope: Literal["turned-back", "own", "none"] = "turned-back"
    """in their place in the values: the same, and the output turned back; coordinates of their own; or nothing"""
    mask: LayeredMask = "causal"
    """which tokens a query sees, see `danlu.nn.attention.masks`"""

    def build(self, dim: int, *, out_std: float, index: int | None = None, **others: Any) -> "KVShared":
        """Make the layer of block ``index``; see `danlu.protocols.MixerConfig`."""
        own = replace(self, mask=mask_of_layer(self.mask, index))
        return KVShared(dim, own, out_std=out_std * math.sqrt(dim / max(self.num_heads * self.value_dim, 1)))

    @property
    def value_dim(self) -> int:
        """Size of a value."""
        return self.head_dim - self.rope_dim if self.value_rope == "none" else self.head_dim


class KVShared(nn.Module):
    """Attention of ``num_heads`` queries over ``num_kv_heads`` vectors that are key and value at once, under
    ``config.mask``.

    Args:
        dim: model size D.
        config: sizes.
        out_std: standard deviation of the output projection; None means ``1 / sqrt(num_heads * value size)``.

    Raises:
        ValueError: sizes that do not divide, an odd number of rotated coordinates, or values without coordinates.

    >>> from danlu.nn.rotary import rotary_angles
    >>> layer = KVShared(12, KVSharedConfig(num_heads=4, num_kv_heads=2, head_dim=6, rope_dim=2))
    >>> layer(torch.randn(2, 5, 12), Context(rope=rotary_angles(torch.arange(5), layer.rope_dim))).shape
    torch.Size([2, 5, 12])
    """

    def __init__(self, dim: int, config: KVSharedConfig, *, out_std: float | None = None) -> None:
        super().__init__()
        for name in ("num_heads", "num_kv_heads", "head_dim"):
            integer(name, getattr(config, name))
        if config.num_heads % config.num_kv_heads:
            raise ValueError(f"num_kv_heads must divide num_heads = {config.num_heads}, got {config.num_kv_heads}")
        integer("rope_dim", config.rope_dim, low=0, high=config.head_dim)
        if config.rope_dim % 2:
            raise ValueError(f"rope_dim must be even (coordinates are rotated in pairs), got {config.rope_dim}")
        literals(config)
        if not config.value_dim:
            raise ValueError(f"rope_dim must be below head_dim for value_rope 'none', got {config.rope_dim}")
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.rope_dim, self.value_rope, self.value_dim = config.rope_dim, config.value_rope, config.value_dim
        self.mask = check_mask(config.mask, config.num_heads, config.num_kv_heads)
        rows = [config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim]
        # Behind the queries and the shared vectors: the coordinates that values have instead of the rotated ones.
        self.own_dim = config.rope_dim if config.value_rope == "own" else 0
        if self.own_dim:
            rows.append(config.num_kv_heads * self.own_dim)
        self.q_kv = Linear(dim, sum(rows), split=tuple(rows))
        self.out = Linear(config.num_heads * config.value_dim, dim, std=out_std)

    def new_cache(self, batch: int, capacity: int, *, dtype: torch.dtype, device: torch.device) -> LayerCache:
        """Cache of ``capacity`` tokens: ``num_kv_heads * (head_dim + own coordinates of the value)`` elements each."""
        check_cached(self.mask)
        shape = (batch, self.num_kv_heads, capacity, self.head_dim + self.own_dim)
        return LayerCache(torch.empty(shape, dtype=dtype, device=device))

    def flops_per_token(self, length: int) -> float:
        """Operations per token of the score and value products at ``length`` tokens, two for a multiply-add."""
        return 2 * self.num_heads * (self.head_dim + self.value_dim) * keys_seen(self.mask, length)

    def forward(self, x_btd: Tensor, context: Context[LayerCache] | None = None) -> Tensor:
        """Attend; arguments and result as in `danlu.nn.GQA`."""
        context = Context() if context is None else context
        mask, prefix, cache = context.mask, context.prefix, context.cache
        B, T, _ = x_btd.shape
        H, G = self.num_heads, self.num_kv_heads
        cos, sin = (table.unsqueeze(-2) for table in context.tables(self.rope_dim))
        q_kv, own = self.q_kv(x_btd), None
        if self.own_dim:
            q_kv, own = q_kv.split(((H + G) * self.head_dim, G * self.own_dim), dim=-1)
        rotated = rotate(q_kv.view(B, T, H + G, self.head_dim), cos, sin).transpose(1, 2)
        q_bhtk, c_bgln = rotated[:, :H], rotated[:, H:]
        if own is not None:
            c_bgln = torch.cat((c_bgln, own.view(B, T, G, self.own_dim).transpose(1, 2)), dim=-1)
        if cache is not None:
            (c_bgln,) = cache.append(c_bgln)
        k_bglk, v_bglv = self._keys_and_values(c_bgln)
        L = k_bglk.shape[-2]
        if mask is None and T == L:
            o = masked_attention(q_bhtk, k_bglk, v_bglv, self.mask, prefix=prefix)
        else:
            check_start(prefix, L - T)
            if mask is None and T > 1:
                mask = causal_mask(T, L, device=x_btd.device)
            o = attention_under(q_bhtk, k_bglk, v_bglv, mask)
        o_bthv = o.transpose(1, 2)
        if self.value_rope == "turned-back":
            o_bthv = rotate(o_bthv, cos, -sin)
        y: Tensor = self.out(o_bthv.reshape(B, T, H * self.value_dim))
        return y

    def _keys_and_values(self, c_bgln: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of what is kept of a token: the shared vector and what the value has of its own."""
        if self.value_rope == "turned-back":
            return c_bgln, c_bgln
        k_bglk, own = c_bgln[..., : self.head_dim], c_bgln[..., self.head_dim :]
        shared = k_bglk[..., : self.head_dim - self.rope_dim]
        return k_bglk, torch.cat((shared, own), dim=-1) if self.own_dim else shared
