"""Multi-head latent attention: what it caches, and that its two forms are one."""

import math

import torch
from torch import Tensor

from danlu.claims.frame import Claim, absolute, at_most, exact, relative
from danlu.nn.attention import GQA, MLA, GQAConfig, MLAConfig
from danlu.nn.rotary import rotary_angles, rotate
from danlu.protocols import Context

_V2 = MLAConfig(num_heads=128, kv_rank=512, q_rank=1536, nope_dim=128, rope_dim=64, value_dim=128)
_LITE = MLAConfig(num_heads=16, kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128)


def _latent(dim: int, config: MLAConfig) -> MLA:
    with torch.device("meta"):
        return MLA(dim, config)


def _grouped(dim: int, heads: int, groups: int | None) -> GQA:
    with torch.device("meta"):
        return GQA(dim, GQAConfig(num_heads=heads, num_kv_heads=groups, head_dim=128))


def _cached(layer: MLA | GQA) -> int:
    """Elements that one layer stores for one token, counted in the cache it allocates."""
    cache = layer.new_cache(1, 8, dtype=torch.float32, device=torch.device("meta"))
    return cache.elements_per_token()


def _saving(bits: float) -> float:
    """Percentage saved by DeepSeek-V2 (``bits`` an element) on DeepSeek 67B (95 layers, 8 groups, 16 bits)."""
    new = 60 * _cached(_latent(5120, _V2)) * bits
    old = 95 * _cached(_grouped(8192, 64, 8)) * 16
    return 100 * (1 - new / old)


def _parameters(config: MLAConfig) -> int:
    return sum(parameter.numel() for parameter in _latent(5120, config).parameters())


def _multi_head(layer: MLA, x_btd: Tensor, *, rotate_latent: bool) -> Tensor:
    """Plain multi-head form with a softmax written out; ``rotate_latent`` puts RoPE on the whole key."""
    B, T, _ = x_btd.shape
    h, n, r = layer.num_heads, layer.nope_dim, layer.rope_dim
    q, c, k_rope = layer.down(x_btd).split((layer.q_rows, layer.kv_rank, r), dim=-1)
    if layer.q_up is not None and layer.q_norm is not None:
        q = layer.q_up(layer.q_norm(q))
    q = q.view(B, T, h, n + r).transpose(1, 2)
    k, v = layer.kv_up(layer.kv_norm(c)).view(B, T, h, -1).transpose(1, 2).split((n, layer.value_dim), dim=-1)
    positions = torch.arange(T, dtype=torch.float64)
    tables = rotary_angles(positions, r)
    q, k_rope = rotate(q, *tables), rotate(k_rope, *tables)[:, None].expand(B, h, T, r)
    if rotate_latent:
        whole = rotary_angles(positions, n)
        q, k = torch.cat((rotate(q[..., :n], *whole), q[..., n:]), dim=-1), rotate(k, *whole)
    scores = q @ torch.cat((k, k_rope), dim=-1).mT / math.sqrt(n + r)
    weights = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf).softmax(-1)
    y: Tensor = layer.out((weights @ v).transpose(1, 2).flatten(2))
    return y


@torch.no_grad()
def _decoding_error(*, rotate_latent: bool) -> float:
    """Relative difference of layers, whole and in chunks from the latent cache, from the multi-head form.

    With and without compressed queries.
    """
    generator, worst = torch.Generator().manual_seed(0), 0.0
    for q_rank in (None, 20):
        config = MLAConfig(num_heads=3, kv_rank=22, q_rank=q_rank, nope_dim=14, rope_dim=6, value_dim=13)
        layer = MLA(35, config).double()
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
            parameter.div_(math.sqrt(parameter.shape[-1]))
        x = torch.randn(2, 17, 35, generator=generator, dtype=torch.float64)
        cache = layer.new_cache(2, 17, dtype=torch.float64, device=x.device)
        tables = rotary_angles(torch.arange(17, dtype=torch.float64), layer.rope_dim)
        steps, start = [], 0
        for size in (2, 1, 1, 13):  # the last is expanded
            rope = (tables[0][start : start + size], tables[1][start : start + size])
            steps.append(layer(x[:, start : start + size], Context(rope=rope, cache=cache)))
            start += size
        whole = _multi_head(layer, x, rotate_latent=rotate_latent)
        for found in (torch.cat(steps, dim=1), layer(x, Context(rope=tables))):
            worst = max(worst, float((found - whole).abs().max() / whole.abs().max()))
    return worst


def _merged_change(distance: int) -> float:
    """Relative change of ``W_q R W_k^T`` when a rotation over ``distance`` stands between orthonormal projections."""
    generator = torch.Generator().manual_seed(0)
    w_q, w_k = torch.linalg.qr(torch.randn(2, 512, 128, generator=generator, dtype=torch.float64)).Q
    tables = rotary_angles(torch.tensor([float(distance)], dtype=torch.float64), 128)
    merged = w_q @ w_k.mT
    return float((rotate(w_q, *tables) @ w_k.mT - merged).norm() / merged.norm())


CLAIMS = (
    Claim(
        name="cache-lite",
        statement="elements cached for a token by DeepSeek-V2-Lite's 27 layers; control: multi-head attention",
        source="DeepSeek-V2, arXiv 2405.04434, Table 9 (15.6K)",
        expected=15_552,
        tolerance=exact(),
        measure=lambda: 27 * _cached(_latent(2048, _LITE)),
        control=lambda: 27 * _cached(_grouped(2048, 16, None)),
        seconds=0.1,
    ),
    Claim(
        name="cache-v2",
        statement="elements cached for a token by DeepSeek-V2's 60 layers; control: every head's keys and values",
        source="DeepSeek-V2, arXiv 2405.04434, Table 9 (34.6K)",
        expected=34_560,
        tolerance=exact(),
        measure=lambda: 60 * _cached(_latent(5120, _V2)),
        control=lambda: 60 * 128 * (128 + 64 + 128),
        seconds=0.1,
    ),
    Claim(
        name="cache-in-groups",
        statement="groups of 128-wide grouped-query attention with the same cache; control: multi-head of 16 heads",
        source="DeepSeek-V2, arXiv 2405.04434, Table 1 (2.25 groups)",
        expected=2.25,
        tolerance=exact(),
        measure=lambda: _cached(_latent(2048, _LITE)) / _cached(_grouped(2048, 16, 1)),
        control=lambda: _cached(_grouped(2048, 16, None)) / _cached(_grouped(2048, 16, 1)),
        seconds=0.1,
    ),
    Claim(
        name="cache-saving",
        statement="percent of cache saved on DeepSeek 67B with 6-bit latents; control: both at 16 bits",
        source="DeepSeek-V2, arXiv 2405.04434, abstract (93.3 %)",
        expected=93.34,
        tolerance=absolute(0.01),
        measure=lambda: _saving(6),
        control=lambda: _saving(16),
        seconds=0.1,
    ),
    Claim(
        name="parameters-v2",
        statement="attention weights of a DeepSeek-V2 layer with its two norms; control: queries not compressed",
        source="DeepSeek-V2, arXiv 2405.04434, section 3.1.2 (sizes; the sum is arithmetic)",
        expected=149_225_472 + 2_048,
        tolerance=exact(),
        measure=lambda: _parameters(_V2),
        control=lambda: _parameters(MLAConfig(num_heads=128, kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128)),
        seconds=0.1,
    ),
    Claim(
        name="decoding",
        statement="relative error of layers, whole and absorbed in chunks, float64; control: RoPE on the latent keys",
        source="derivation: W_k and W_v act linearly on the latent, so they move to the query and the output",
        expected=5e-15,
        tolerance=at_most(),
        measure=lambda: _decoding_error(rotate_latent=False),
        control=lambda: _decoding_error(rotate_latent=True),
        seconds=0.1,
    ),
    Claim(
        name="rotation-does-not-merge",
        statement="change of W_q W_k^T by a rotation over 15 positions between them, heads of 128; control: over 14",
        source="kexue.fm 10091 for the argument; for orthonormal projections sqrt(mean_j 2 - 2 cos(15 theta_j))",
        expected=math.sqrt(sum(2 - 2 * math.cos(15 * 10000 ** (-j / 64)) for j in range(64)) / 64),
        tolerance=relative(1e-12),
        measure=lambda: _merged_change(15),
        control=lambda: _merged_change(14),
        seconds=0.1,
    ),
)
