r"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

Keys and values of every head are linear in one normalised latent ``c = RMSNorm(x W_c)``; positions enter through a
separate rotated key ``k_r = RoPE(x W_kr)`` that all heads share, since a rotation between ``W_q`` and ``W_k`` would
keep the two from being merged. For training each head's keys ``[c W_k, k_r]`` and values ``c W_v`` are formed. For
decoding ``W_k`` moves to the query and ``W_v`` behind the attention (the absorbed form), which then looks at the cached
``[c, k_r]`` alone: ``kv_rank + rope_dim`` elements per token. Both forms scale by ``1 / sqrt(nope_dim + rope_dim)``.

Shape suffixes: B batch, T new tokens, L all tokens so far, H heads, C kv_rank, N nope_dim, R rope_dim, V value_dim.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from danlu._validate import integer
from danlu.nn.attention.blocked import one_query
from danlu.nn.attention.cache import LayerCache
from danlu.nn.attention.kernel import scaled_dot_product
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
from danlu.nn.effective import is_plain
from danlu.nn.linear import Linear
from danlu.nn.norm import RMSNorm
from danlu.nn.rotary import rotate
from danlu.protocols import Context


@dataclass(frozen=True, kw_only=True)
class MLAConfig:
    """Sizes of an `MLA` layer."""

    renamed: ClassVar[dict[str, str]] = {"heads": "num_heads"}

    num_heads: int = 8
    """attention heads"""
    kv_rank: int = 64
    """size of the latent that keys and values come from (d_c), cached"""
    q_rank: int | None = None
    """size of the latent that queries come from; None: queries straight from the model dimension"""
    nope_dim: int = 32
    """coordinates of a query/key head without position"""
    rope_dim: int = 16
    """coordinates with rotary position; the key's are shared by all heads, cached"""
    value_dim: int = 48
    """size of a value head; equal to nope_dim + rope_dim, the CPU's fused float32 attention kernel applies"""
    mask: LayeredMask = "causal"
    """which tokens a query sees, see `danlu.nn.attention.masks`"""
    norm_eps: float | None = None
    """added to the mean square in the norms of the latents; None: as in the model's other norms (alone: 1e-6)"""

    def build(
        self, dim: int, *, out_std: float, index: int | None = None, norm_eps: float | None = None, **others: Any
    ) -> "MLA":
        """Make the layer of block ``index``; see `danlu.protocols.MixerConfig`."""
        eps = norm_eps if self.norm_eps is None else self.norm_eps
        own = replace(self, mask=mask_of_layer(self.mask, index), norm_eps=eps)
        return MLA(dim, own, out_std=out_std * math.sqrt(dim / max(self.num_heads * self.value_dim, 1)))


class MLA(nn.Module):
    """Multi-head latent attention, causal unless ``config.mask`` says otherwise.

    Args:
        dim: model size D.
        config: sizes.
        out_std: standard deviation of the output projection; None means ``1 / sqrt(num_heads * value_dim)``.

    Raises:
        ValueError: a size below one, or an odd ``rope_dim``.

    >>> from danlu.nn.rotary import rotary_angles
    >>> layer = MLA(12, MLAConfig(num_heads=3, kv_rank=8, nope_dim=4, rope_dim=2, value_dim=6))
    >>> layer(torch.randn(2, 5, 12), Context(rope=rotary_angles(torch.arange(5), layer.rope_dim))).shape
    torch.Size([2, 5, 12])
    """

    def __init__(self, dim: int, config: MLAConfig, *, out_std: float | None = None) -> None:
        super().__init__()
        for name in ("num_heads", "kv_rank", "nope_dim", "value_dim"):
            integer(name, getattr(config, name))
        if config.q_rank is not None:
            integer("q_rank", config.q_rank)
        integer("rope_dim", config.rope_dim, low=0)
        if config.rope_dim % 2:
            raise ValueError(f"rope_dim must be even (coordinates are rotated in pairs), got {config.rope_dim}")
        self.num_heads, self.kv_rank = config.num_heads, config.kv_rank
        self.nope_dim, self.rope_dim, self.value_dim = config.nope_dim, config.rope_dim, config.value_dim
        self.mask = check_mask(config.mask, config.num_heads, config.num_heads)
        self.key_dim = config.nope_dim + config.rope_dim
        self.scale = 1 / math.sqrt(self.key_dim)
        q_out = config.num_heads * (config.nope_dim + config.rope_dim)
        # The maps that read x share one product. Queries come first: compressed, or whole.
        self.q_rows = q_out if config.q_rank is None else config.q_rank
        rows = (self.q_rows, config.kv_rank, *((config.rope_dim,) if config.rope_dim else ()))
        self.down = Linear(dim, sum(rows), split=rows)
        eps = 1e-6 if config.norm_eps is None else config.norm_eps
        self.q_norm: RMSNorm | None = None
        self.q_up: Linear | None = None
        if config.q_rank is not None:
            self.q_norm, self.q_up = RMSNorm(config.q_rank, eps=eps), Linear(config.q_rank, q_out)
        self.kv_norm = RMSNorm(config.kv_rank, eps=eps)
        self.kv_up = Linear(config.kv_rank, config.num_heads * (config.nope_dim + config.value_dim))
        self.out = Linear(config.num_heads * config.value_dim, dim, std=out_std)

    def new_cache(self, batch: int, capacity: int, *, dtype: torch.dtype, device: torch.device) -> LayerCache:
        """Cache of ``capacity`` tokens: ``kv_rank + rope_dim`` elements per token, whatever the number of heads."""
        check_cached(self.mask)
        shape = (batch, capacity, self.kv_rank + self.rope_dim)
        return LayerCache(torch.empty(shape, dtype=dtype, device=device))

    def flops_per_token(self, length: int) -> float:
        """Operations per token of the score and value products at ``length`` tokens, two for a multiply-add."""
        return 2 * self.num_heads * (self.nope_dim + self.rope_dim + self.value_dim) * keys_seen(self.mask, length)

    def forward(self, x_btd: Tensor, context: Context[LayerCache] | None = None) -> Tensor:
        """Attend.

        Args:
            x_btd: ``(batch, time, dim)``.
            context: the tables ``rope`` for these tokens; ``mask`` (with a cache, ``(batch, 1, time, keys)``),
                ``prefix`` and ``cache`` where there are any.

        Returns:
            ``(batch, time, dim)``.
        """
        context = Context() if context is None else context
        mask, prefix, cache = context.mask, context.prefix, context.cache
        B, T, _ = x_btd.shape
        q, c_btc, k_btr = self.down(x_btd).split((self.q_rows, self.kv_rank, self.rope_dim), dim=-1)
        if self.q_up is not None and self.q_norm is not None:
            q = self.q_up(self.q_norm(q))
        cos, sin = context.tables(self.rope_dim)
        q_bthk = rotate(q.view(B, T, self.num_heads, self.key_dim), cos.unsqueeze(-2), sin.unsqueeze(-2))
        c_btc, k_btr = self.kv_norm(c_btc), rotate(k_btr, cos, sin)
        if cache is None:
            o_bthv = self._expanded(q_bthk, c_btc, k_btr, mask, prefix)
        else:
            (seen,) = cache.append(torch.cat((c_btc, k_btr), dim=-1))
            L = seen.shape[1]
            check_start(prefix, L - T)
            if mask is None and 1 < T < L:
                mask = causal_mask(T, L, device=x_btd.device)
            # Expanding costs the products with kv_up for the whole history, absorbing makes the scores wider.
            expanded = L * self.kv_rank + T * L
            absorbed = T * self.kv_rank + T * L * (2 * self.kv_rank + self.rope_dim) / (self.nope_dim + self.value_dim)
            # An adapter or a quantized layer is more than its weight: it is called, not absorbed.
            if absorbed < expanded and (T < L or T == 1) and is_plain(self.kv_up):
                o_bthv = self._absorbed(q_bthk, seen, mask)
            else:
                o_bthv = self._expanded(q_bthk, seen[..., : self.kv_rank], seen[..., self.kv_rank :], mask, prefix)
        y: Tensor = self.out(o_bthv.reshape(B, T, self.num_heads * self.value_dim))
        return y

    def _expanded(
        self, q_bthk: Tensor, c_blc: Tensor, k_blr: Tensor, mask: Tensor | None, prefix: int | None = None
    ) -> Tensor:
        """Multi-head form: every head's keys and values are formed from the latent."""
        B, L, _ = c_blc.shape
        kv = self.kv_up(c_blc).view(B, L, self.num_heads, self.nope_dim + self.value_dim)
        k_nope, v = kv.split((self.nope_dim, self.value_dim), dim=-1)
        k_rope = k_blr[:, :, None, :].expand(B, L, self.num_heads, self.rope_dim)
        k_blhk = torch.cat((k_nope, k_rope), dim=-1)
        q, k, v = (t.transpose(1, 2) for t in (q_bthk, k_blhk, v))
        if mask is None and q.shape[2] == L:
            return masked_attention(q, k, v, self.mask, prefix=prefix, scale=self.scale).transpose(1, 2)
        return attention_under(q, k, v, mask, scale=self.scale).transpose(1, 2)

    def _absorbed(self, q_bthk: Tensor, seen_blm: Tensor, mask: Tensor | None) -> Tensor:
        """Multi-query form: heads look at the latent itself, as so many queries of one key."""
        B, T, H, _ = q_bthk.shape
        weight: Tensor = self.kv_up.weight
        weight = weight if weight.dtype == q_bthk.dtype else weight.to(q_bthk.dtype)
        w_k, w_v = weight.unflatten(0, (H, -1)).split((self.nope_dim, self.value_dim), dim=1)
        q_nope, q_rope = q_bthk.reshape(B * T, H, self.key_dim).split((self.nope_dim, self.rope_dim), dim=2)
        # Serial products, heads as the batch: a merged W_q W_k would be larger than both factors together.
        q_latent = torch.bmm(q_nope.transpose(0, 1), w_k).transpose(0, 1)
        q_bhm = torch.cat((q_latent, q_rope), dim=2).view(B, T * H, seen_blm.shape[2])
        if T == 1 and mask is None:
            # Keys wider than values have no fused kernel; these three products are what is left of one query.
            o = one_query(q_bhm, seen_blm, seen_blm[..., : self.kv_rank], self.scale)
        else:
            if mask is not None:
                mask = mask.expand(B, 1, T, mask.shape[-1]).repeat_interleave(H, dim=2)
            seen = seen_blm.unsqueeze(1)
            o = scaled_dot_product(q_bhm.unsqueeze(1), seen, seen[..., : self.kv_rank], mask=mask, scale=self.scale)
        o_hnv = torch.bmm(o.reshape(B * T, H, self.kv_rank).transpose(0, 1), w_v.transpose(1, 2))
        return o_hnv.transpose(0, 1).reshape(B, T, H, self.value_dim)
