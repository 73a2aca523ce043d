"""Keys that are values: what is cached, and positions that enter as differences."""

import torch

from danlu.claims.frame import Claim, at_most, exact
from danlu.nn import GQA, GQAConfig, KVShared, KVSharedConfig, rotary_angles
from danlu.nn.rotary import rotate
from danlu.protocols import Context

_CONFIG = KVSharedConfig(num_heads=6, num_kv_heads=3, head_dim=10, rope_dim=4)


@torch.no_grad()
def _formula_error(*, turned_back: bool) -> float:
    """Largest error of the layer, whole and in chunks, far from position 0, against differences of positions.

    Key and value of a token are turned by its distance to the query alone, one pair at a time.
    """
    generator = torch.Generator().manual_seed(0)
    layer = KVShared(60, _CONFIG).double()
    for parameter in layer.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 8)
    x = torch.randn(1, 13, 60, generator=generator, dtype=torch.float64)
    q, c = (x @ layer.q_kv.weight.mT).view(13, 9, 10).split((6, 3), 1)
    c = c.repeat_interleave(2, 1)
    rows = []
    for t in range(13):
        # Distances as positions: the token at the query's own place is not turned.
        near = rotate(c[: t + 1], *(table[:, None] for table in rotary_angles(torch.arange(-t, 1.0).double(), 4)))
        weights = (torch.einsum("hk,lhk->lh", q[t], near) / 10**0.5).softmax(0)
        rows.append(torch.einsum("lh,lhk->hk", weights, near))
    heads = torch.stack(rows)
    tables = rotary_angles(torch.arange(13, dtype=torch.float64) + 1000, 4)
    if not turned_back:
        heads = rotate(heads, *(table[:, None] for table in tables))
    wanted = heads.flatten(1) @ layer.out.weight.mT
    cache = layer.new_cache(1, 13, dtype=torch.float64, device=x.device)
    steps, start = [], 0
    for size in (4, 1, 3, 5):
        rope = (tables[0][start : start + size], tables[1][start : start + size])
        steps.append(layer(x[:, start : start + size], Context(rope=rope, cache=cache)))
        start += size
    found = (layer(x, Context(rope=tables)), torch.cat(steps, 1))
    return max(float((y[0] - wanted).abs().max()) for y in found)


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
        statement="error at positions beyond 1000 against keys turned by differences; control: output not turned back",
        source="kexue.fm 10907; derivation",
        expected=1e-13,
        tolerance=at_most(),
        measure=lambda: _formula_error(turned_back=True),
        control=lambda: _formula_error(turned_back=False),
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
