"""Keys that are values: what is cached, and positions that enter as differences."""

import torch

from danlu.claims.frame import Claim, at_most, exact
from danlu.nn import GQA, GQAConfig, KVShared, KVSharedConfig, rotary_angles
from danlu.nn.rotary import rotate
from danlu.protocols import Context

_CONFIG = KVSharedConfig(num_heads=6, num_kv_heads=3, head_dim=10, rope_dim=4)


@torch.no_grad()
def _shift_error(*, turned_back: bool) -> float:
    """Largest change of the heads' outputs when every position grows by 1000, in float64."""
    generator = torch.Generator().manual_seed(0)
    layer = KVShared(60, _CONFIG).double()
    layer.q_kv.weight.copy_(torch.randn(layer.q_kv.weight.shape, generator=generator) / 8)
    layer.out.weight.copy_(torch.eye(60))
    x = torch.randn(1, 13, 60, generator=generator, dtype=torch.float64)
    found = []
    for start in (0, 1000):
        cos, sin = rotary_angles(torch.arange(13, dtype=torch.float64) + start, 4)
        heads = layer(x, Context(rope=(cos, sin))).view(1, 13, 6, 10)
        if not turned_back:
            heads = rotate(heads, cos[:, None], sin[:, None])
        found.append(heads)
    return float((found[0] - found[1]).abs().max())


def _elements(config: GQAConfig | KVSharedConfig) -> int:
    layer = KVShared(60, config) if isinstance(config, KVSharedConfig) else GQA(60, config)
    return layer.new_cache(1, 3, dtype=torch.float32, device=torch.device("cpu")).elements_per_token()


def _attention_weights(heads: int) -> float:
    """Attention weights of a layer of the post's study (model size 2048), in millions."""
    config = KVSharedConfig(num_heads=heads, num_kv_heads=2, head_dim=256, rope_dim=64)
    with torch.device("meta"):
        return sum(p.numel() for p in KVShared(2048, config).parameters()) / 1e6


CLAIMS = (
    Claim(
        name="positions-are-differences",
        statement="change of the output when all positions grow by 1000; control: output not rotated back",
        source="kexue.fm 10907; derivation",
        expected=1e-12,
        tolerance=at_most(),
        measure=lambda: _shift_error(turned_back=True),
        control=lambda: _shift_error(turned_back=False),
        seconds=0.1,
    ),
    Claim(
        name="half-the-cache",
        statement="cached elements per token, two groups of 256; control: grouped queries of the same heads",
        source="kexue.fm 10907, table of the study (512)",
        expected=512,
        tolerance=exact(),
        measure=lambda: _elements(KVSharedConfig(num_heads=16, num_kv_heads=2, head_dim=256, rope_dim=64)),
        control=lambda: _elements(GQAConfig(num_heads=16, num_kv_heads=2, head_dim=256)),
        seconds=0.1,
    ),
    Claim(
        name="weights-of-the-study",
        statement="millions of attention weights of a layer, GQA2-(192+64)-S2 of the study; control: 32 heads",
        source="kexue.fm 10907: 943 M in all, of which 12 such layers (17.826 each)",
        expected=17.825792,
        tolerance=exact(),
        measure=lambda: _attention_weights(16),
        control=lambda: _attention_weights(32),
        seconds=0.1,
    ),
)
