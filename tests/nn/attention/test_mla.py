"""Latent attention against its definition, and its two forms against one another."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from danlu.models import Transformer, TransformerConfig
from danlu.nn import MLA, MLAConfig, causal_mask, rotary_angles
from danlu.protocols import Context

from .kinds import DIM, build, random, reference, rope


def test_mla_equals_the_written_out_definition() -> None:
    layer = build("mla compressed queries")
    assert isinstance(layer, MLA)
    assert layer.q_up is not None
    assert layer.q_norm is not None
    x = random(1, 9, DIM)
    cos, sin = rope(layer, 0, 9)
    w_q, w_c, w_kr = layer.down.weight.split((17, 13, 4))
    c = F.rms_norm(x[0] @ w_c.T, (13,), layer.kv_norm.weight, 1e-6)
    q_all = (F.rms_norm(x[0] @ w_q.T, (17,), layer.q_norm.weight, 1e-6) @ layer.q_up.weight.T).view(9, 3, 11)

    def turned(t: Tensor) -> Tensor:
        half = t.shape[-1] // 2
        pair = torch.complex(t[:, :half], t[:, half:]) * torch.complex(cos[:, :half], sin[:, :half])
        return torch.cat((pair.real, pair.imag), -1)

    heads = []
    for s in range(3):
        w_k, w_v = layer.kv_up.weight.view(3, 18, 13)[s].split((7, 11))
        q = torch.cat((q_all[:, s, :7], turned(q_all[:, s, 7:])), -1)
        k = torch.cat((c @ w_k.T, turned(x[0] @ w_kr.T)), -1)
        heads.append(reference(q, k, c @ w_v.T, (7 + 4) ** -0.5))
    expected = torch.cat(heads, -1) @ layer.out.weight.T
    torch.testing.assert_close(layer(x, Context(rope=(cos, sin)))[0], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["mla", "mla compressed queries", "mla without positions"])
def test_mla_absorbed_form_equals_the_expanded_one(kind: str) -> None:
    layer = build(kind)
    assert isinstance(layer, MLA)
    q = random(2, 7, layer.num_heads, layer.nope_dim + layer.rope_dim)
    c, k = random(2, 7, 13), random(2, 7, layer.rope_dim)
    mask = causal_mask(7, 7)
    expanded = layer._expanded(q, c, k, None)
    absorbed = layer._absorbed(q, torch.cat((c, k), -1), mask[None, None])
    torch.testing.assert_close(absorbed, expanded, rtol=1e-12, atol=1e-12)


def test_mla_float32_decoding_stays_within_1e_5() -> None:
    layer = build("mla").float()
    x = random(1, 31, DIM).float()
    full = layer(x, Context(rope=rotary_angles(torch.arange(31), layer.rope_dim)))
    cache = layer.new_cache(1, 31, dtype=torch.float32, device=torch.device("cpu"))
    steps = [
        layer(x[:, t : t + 1], Context(rope=rotary_angles(torch.arange(t, t + 1), layer.rope_dim), cache=cache))
        for t in range(31)
    ]
    torch.testing.assert_close(torch.cat(steps, 1), full, rtol=1e-5, atol=1e-5)


def test_rotating_what_was_compressed_breaks_the_absorbed_form() -> None:
    """Negative control: with RoPE between them, W_q and W_k cannot be merged."""
    layer = build("mla")
    assert isinstance(layer, MLA)
    c, q = random(1, 7, 13), random(1, 7, 5, 13)
    cos, sin = rotary_angles(torch.arange(7, dtype=torch.float64), 6)
    w_k = layer.kv_up.weight.view(5, 18, 13)[0, :6]
    rotated = c[0] @ w_k.T
    half = 3
    turned = torch.cat(
        (
            rotated[:, :half] * cos[:, :half] - rotated[:, half:] * sin[:, :half],
            rotated[:, half:] * cos[:, :half] + rotated[:, :half] * sin[:, :half],
        ),
        -1,
    )
    scores_rotated = q[0, :, 0, :6] @ turned.T
    scores_merged = (q[0, :, 0, :6] @ w_k) @ c[0].T
    assert (scores_rotated - scores_merged).abs().max() > 1e-2


@pytest.mark.parametrize("q_rank", [None, 5])
@pytest.mark.parametrize(("batch", "time"), [(0, 5), (2, 0), (0, 1)])
def test_of_nothing_it_makes_nothing(q_rank: int | None, batch: int, time: int) -> None:
    layer = MLA(12, MLAConfig(num_heads=3, kv_rank=8, q_rank=q_rank, nope_dim=4, rope_dim=2, value_dim=6))
    tables = rotary_angles(torch.arange(time), 2)
    x = torch.randn(batch, time, 12, requires_grad=True)
    y = layer(x, Context(rope=tables))
    y.sum().backward()
    assert y.shape == x.shape
    cache = layer.new_cache(batch, 8, dtype=torch.float32, device=torch.device("cpu"))
    with torch.no_grad():
        assert layer(x, Context(rope=tables, cache=cache)).shape == x.shape


def test_the_norms_of_the_latents_have_the_eps_of_the_model_or_their_own() -> None:
    sizes = {"num_heads": 3, "kv_rank": 8, "q_rank": 5, "nope_dim": 4, "rope_dim": 2, "value_dim": 6}
    for own, expected in ((None, 1e-3), (1e-6, 1e-6)):
        config = TransformerConfig(dim=12, layers=1, attention=MLAConfig(norm_eps=own, **sizes), norm_eps=1e-3)
        layer = Transformer(config).mixers[0]
        assert isinstance(layer, MLA)
        assert layer.q_norm is not None
        assert (layer.q_norm.eps, layer.kv_norm.eps) == (expected, expected)
    alone = MLA(12, MLAConfig(**sizes))
    assert alone.kv_norm.eps == 1e-6


@pytest.mark.parametrize("kind", ["mla", "mla compressed queries", "mla without positions"])
@pytest.mark.parametrize("chunk", [2, 3])
def test_a_chunk_behind_a_cache_sees_itself_only_up_to_each_token(kind: str, chunk: int) -> None:
    layer = build(kind)
    x = random(2, 20 + chunk, DIM)

    full = layer(x, Context(rope=rope(layer, 0, 20 + chunk)))
    cache = layer.new_cache(2, 20 + chunk, dtype=torch.float64, device=torch.device("cpu"))
    for start, end in ((0, 20), (20, 20 + chunk)):
        part = layer(x[:, start:end], Context(rope=rope(layer, start, end), cache=cache))
        torch.testing.assert_close(part, full[:, start:end], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["mla", "mla compressed queries"])
@pytest.mark.parametrize("chunk", [1, 2, 20])
def test_a_mask_behind_a_cache_is_the_only_one(kind: str, chunk: int) -> None:
    """Of a sequence whose first three tokens are hidden, nothing depends on them."""
    layer = build(kind)
    x = random(2, 20 + chunk, DIM)
    other = torch.cat((random(2, 3, DIM) + 1, x[:, 3:]), 1)
    mask = causal_mask(chunk, 20 + chunk)[None, None].clone()
    mask[..., :3] = False
    ends = []
    for tokens in (x, other):
        cache = layer.new_cache(2, 20 + chunk, dtype=torch.float64, device=torch.device("cpu"))
        hidden = causal_mask(20, 20)[None, None].clone()
        hidden[..., 3:, :3] = False
        layer(tokens[:, :20], Context(rope=rope(layer, 0, 20), cache=cache, mask=hidden))
        ends.append(layer(tokens[:, 20:], Context(rope=rope(layer, 20, 20 + chunk), cache=cache, mask=mask)))
    torch.testing.assert_close(*ends, rtol=0, atol=1e-12)
    assert ends[0].isfinite().all()
