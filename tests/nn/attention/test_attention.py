"""One set of trials for every attention kind, and what is special to each."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from danlu.nn import GQA, MLA, GQAConfig, MLAConfig, causal_mask, document_mask, rotary_angles

DIM = 29
KINDS: dict[str, Callable[[], GQA | MLA]] = {
    "mha": lambda: GQA(DIM, GQAConfig(num_heads=6, head_dim=10)),
    "gqa": lambda: GQA(DIM, GQAConfig(num_heads=6, num_kv_heads=2, head_dim=10)),
    "mqa": lambda: GQA(DIM, GQAConfig(num_heads=5, num_kv_heads=1, head_dim=14)),
    "partial rope": lambda: GQA(DIM, GQAConfig(num_heads=6, num_kv_heads=3, head_dim=10, rope_dim=4)),
    "no positions": lambda: GQA(DIM, GQAConfig(num_heads=3, head_dim=10, rope_dim=0)),
    "mla": lambda: MLA(DIM, MLAConfig(num_heads=5, kv_rank=13, nope_dim=7, rope_dim=6, value_dim=11)),
    "mla compressed queries": lambda: MLA(
        DIM, MLAConfig(num_heads=3, kv_rank=13, q_rank=17, nope_dim=7, rope_dim=4, value_dim=11)
    ),
    "mla without positions": lambda: MLA(DIM, MLAConfig(num_heads=3, kv_rank=13, nope_dim=7, rope_dim=0, value_dim=7)),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def build(kind: str) -> GQA | MLA:
    torch.manual_seed(3)
    return KINDS[kind]().double()


def rope(layer: GQA | MLA, start: int, end: int) -> tuple[Tensor, Tensor]:
    return rotary_angles(torch.arange(start, end, dtype=torch.float64), layer.rope_dim)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


@every_kind
@pytest.mark.parametrize("chunks", [[23], [1] * 23, [7, 16], [11, 1, 1, 9, 1], [2, 21]])
def test_cached_attention_equals_the_full_pass(kind: str, chunks: list[int]) -> None:
    layer, x = build(kind), random(2, 23, DIM)
    full = layer(x, rope(layer, 0, 23))
    cache = layer.new_cache(2, 23, dtype=torch.float64, device=torch.device("cpu"))
    parts, start = [], 0
    for size in chunks:
        parts.append(layer(x[:, start : start + size], rope(layer, start, start + size), cache=cache))
        start += size
    torch.testing.assert_close(torch.cat(parts, 1), full, rtol=1e-12, atol=1e-12)


@every_kind
def test_a_token_never_sees_what_follows(kind: str) -> None:
    layer, x = build(kind), random(2, 11, DIM)
    changed = x.clone()
    changed[:, 7:] = 5.0
    a, b = (layer(t, rope(layer, 0, 11)) for t in (x, changed))
    torch.testing.assert_close(a[:, :7], b[:, :7], rtol=0, atol=1e-13)
    assert (a[:, 7:] - b[:, 7:]).abs().max() > 1e-3


@every_kind
def test_positions_shifted_by_a_constant_change_nothing(kind: str) -> None:
    layer, x = build(kind), random(2, 11, DIM)
    here, there = layer(x, rope(layer, 0, 11)), layer(x, rope(layer, 1000, 1011))
    torch.testing.assert_close(here, there, rtol=0, atol=1e-12)


@every_kind
def test_packed_documents_equal_each_document_alone(kind: str) -> None:
    layer, x = build(kind), random(1, 13, DIM)
    documents = torch.tensor([[4] * 5 + [9] * 8])
    packed = layer(x, rope(layer, 0, 13), mask=document_mask(documents))
    alone = torch.cat((layer(x[:, :5], rope(layer, 0, 5)), layer(x[:, 5:], rope(layer, 0, 8))), 1)
    torch.testing.assert_close(packed, alone, rtol=1e-12, atol=1e-12)


@every_kind
def test_a_nan_in_one_sequence_leaves_the_others_alone(kind: str) -> None:
    layer, x = build(kind), random(3, 7, DIM)
    clean = layer(x, rope(layer, 0, 7))
    x[1, 3] = math.nan
    dirty = layer(x, rope(layer, 0, 7))
    assert torch.equal(dirty[0], clean[0])
    assert torch.equal(dirty[2], clean[2])
    assert dirty[1].isnan().any()


@every_kind
def test_bfloat16_is_close_to_float64(kind: str) -> None:
    layer, x = build(kind), random(2, 11, DIM)
    exact = layer(x, rope(layer, 0, 11))
    low = layer.float()(x.bfloat16(), rope(layer, 0, 11))
    assert low.dtype == torch.bfloat16
    assert (low.double() - exact).norm() / exact.norm() < 0.02


@every_kind
def test_a_cache_longer_than_its_capacity_is_refused(kind: str) -> None:
    layer = build(kind)
    cache = layer.new_cache(1, 3, dtype=torch.float64, device=torch.device("cpu"))
    with pytest.raises(ValueError, match="holds 3 tokens, 5"):
        layer(random(1, 5, DIM), rope(layer, 0, 5), cache=cache)


@every_kind
def test_state_dict_round_trip_is_exact(kind: str) -> None:
    layer, x = build(kind), random(1, 5, DIM)
    other = KINDS[kind]().double()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x, rope(layer, 0, 5)), other(x, rope(layer, 0, 5)))


def reference(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Softmax attention written out, (heads, time, size)."""
    scores = (q @ k.transpose(-1, -2)) * scale
    scores = scores.masked_fill(~causal_mask(q.shape[-2], k.shape[-2]), -math.inf)
    return scores.softmax(-1) @ v


def test_grouped_heads_share_keys_in_the_order_one_one_one_one_two_two_two_two() -> None:
    torch.manual_seed(0)
    layer = GQA(24, GQAConfig(num_heads=8, num_kv_heads=2, head_dim=6, rope_dim=0)).double()
    x = random(1, 5, 24)
    q, k, v = (t.view(5, -1, 6).transpose(0, 1) for t in layer.qkv(x)[0].split((48, 12, 12), -1))
    group = [0, 0, 0, 0, 1, 1, 1, 1]
    expected = reference(q, k[group], v[group], 6**-0.5).transpose(0, 1).reshape(5, 48) @ layer.out.weight.T
    torch.testing.assert_close(layer(x, rope(layer, 0, 5))[0], expected, rtol=1e-12, atol=1e-12)


def test_one_group_a_head_is_multi_head_attention_exactly() -> None:
    torch.manual_seed(0)
    mha, gqa = GQA(24, GQAConfig(num_heads=6)).double(), GQA(24, GQAConfig(num_heads=6, num_kv_heads=6)).double()
    gqa.load_state_dict(mha.state_dict())
    x = random(2, 7, 24)
    assert torch.equal(mha(x, rope(mha, 0, 7)), gqa(x, rope(gqa, 0, 7)))


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
    torch.testing.assert_close(layer(x, (cos, sin))[0], expected, rtol=1e-12, atol=1e-12)


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
    full = layer(x, rotary_angles(torch.arange(31), layer.rope_dim))
    cache = layer.new_cache(1, 31, dtype=torch.float32, device=torch.device("cpu"))
    steps = [
        layer(x[:, t : t + 1], rotary_angles(torch.arange(t, t + 1), layer.rope_dim), cache=cache) for t in range(31)
    ]
    torch.testing.assert_close(torch.cat(steps, 1), full, rtol=1e-5, atol=1e-5)


def test_rotating_what_was_compressed_breaks_the_absorbed_form() -> None:
    """Negative control of spec C3.6: with RoPE between them, W_q and W_k cannot be merged."""
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


def test_cache_sizes_are_those_of_the_published_models() -> None:
    """Spec C3.5: DeepSeek-V2's 34,560 elements a token, V2-Lite's 15,552, their MHA counterparts."""
    with torch.device("meta"):
        v2 = MLA(5120, MLAConfig(num_heads=128, kv_rank=512, q_rank=1536, nope_dim=128, rope_dim=64, value_dim=128))
        mha = GQA(2048, GQAConfig(num_heads=16, head_dim=128))
        gqa = GQA(8192, GQAConfig(num_heads=64, num_kv_heads=8, head_dim=128))
        sizes = [a.new_cache(1, 3, dtype=torch.float32, device=torch.device("meta")) for a in (v2, mha, gqa)]
    a_layer = [cache.elements_per_token() for cache in sizes]
    assert a_layer[0] * 60 == 34_560
    assert a_layer[0] * 27 == 15_552
    assert a_layer[1] * 27 == 110_592
    assert a_layer[2] * 95 == 194_560
    assert sum(p.numel() for p in v2.parameters()) == 149_225_472 + 2_048


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GQAConfig(num_heads=6, num_kv_heads=4, head_dim=8), "num_kv_heads must divide num_heads = 6, got 4"),
        (GQAConfig(num_heads=6), "num_heads must divide dim = 29"),
        (GQAConfig(num_heads=0, head_dim=8), "num_heads"),
        (GQAConfig(num_heads=2, head_dim=8, rope_dim=3), "rope_dim must be even"),
        (GQAConfig(num_heads=2, head_dim=8, rope_dim=10), "rope_dim"),
        (MLAConfig(rope_dim=5), "rope_dim must be even"),
        (MLAConfig(kv_rank=0), "kv_rank"),
        (MLAConfig(q_rank=0), "q_rank"),
    ],
)
def test_impossible_sizes_are_refused_by_name(config: GQAConfig | MLAConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GQA(DIM, config) if isinstance(config, GQAConfig) else MLA(DIM, config)
