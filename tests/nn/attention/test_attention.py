"""One set of trials for every attention kind, and what is special to grouped heads."""

import math

import pytest
import torch

from danlu.nn import GQA, MLA, GQAConfig, MLAConfig, document_mask
from danlu.protocols import Context

from .kinds import DIM, KINDS, build, random, reference, rope

every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
@pytest.mark.parametrize("chunks", [[23], [1] * 23, [7, 16], [11, 1, 1, 9, 1], [2, 21]])
def test_cached_attention_equals_the_full_pass(kind: str, chunks: list[int]) -> None:
    layer, x = build(kind), random(2, 23, DIM)
    full = layer(x, Context(rope=rope(layer, 0, 23)))
    cache = layer.new_cache(2, 23, dtype=torch.float64, device=torch.device("cpu"))
    parts, start = [], 0
    for size in chunks:
        parts.append(layer(x[:, start : start + size], Context(rope=rope(layer, start, start + size), cache=cache)))
        start += size
    torch.testing.assert_close(torch.cat(parts, 1), full, rtol=1e-12, atol=1e-12)


@every_kind
def test_a_token_never_sees_what_follows(kind: str) -> None:
    layer, x = build(kind), random(2, 11, DIM)
    changed = x.clone()
    changed[:, 7:] = 5.0
    a, b = (layer(t, Context(rope=rope(layer, 0, 11))) for t in (x, changed))
    torch.testing.assert_close(a[:, :7], b[:, :7], rtol=0, atol=1e-13)
    assert (a[:, 7:] - b[:, 7:]).abs().max() > 1e-3


@every_kind
def test_positions_shifted_by_a_constant_change_nothing(kind: str) -> None:
    layer, x = build(kind), random(2, 11, DIM)
    here, there = layer(x, Context(rope=rope(layer, 0, 11))), layer(x, Context(rope=rope(layer, 1000, 1011)))
    torch.testing.assert_close(here, there, rtol=0, atol=1e-12)


@every_kind
def test_packed_documents_equal_each_document_alone(kind: str) -> None:
    layer, x = build(kind), random(1, 13, DIM)
    documents = torch.tensor([[4] * 5 + [9] * 8])
    packed = layer(x, Context(rope=rope(layer, 0, 13), mask=document_mask(documents)))
    alone = torch.cat(
        (layer(x[:, :5], Context(rope=rope(layer, 0, 5))), layer(x[:, 5:], Context(rope=rope(layer, 0, 8)))), 1
    )
    torch.testing.assert_close(packed, alone, rtol=1e-12, atol=1e-12)


@every_kind
def test_a_nan_in_one_sequence_leaves_the_others_alone(kind: str) -> None:
    layer, x = build(kind), random(3, 7, DIM)
    clean = layer(x, Context(rope=rope(layer, 0, 7)))
    x[1, 3] = math.nan
    dirty = layer(x, Context(rope=rope(layer, 0, 7)))
    assert torch.equal(dirty[0], clean[0])
    assert torch.equal(dirty[2], clean[2])
    assert dirty[1].isnan().any()


@every_kind
def test_bfloat16_is_close_to_float64(kind: str) -> None:
    layer, x = build(kind), random(2, 11, DIM)
    exact = layer(x, Context(rope=rope(layer, 0, 11)))
    low = layer.float()(x.bfloat16(), Context(rope=rope(layer, 0, 11)))
    assert low.dtype == torch.bfloat16
    assert (low.double() - exact).norm() / exact.norm() < 0.02


@every_kind
def test_a_cache_longer_than_its_capacity_is_rejected(kind: str) -> None:
    layer = build(kind)
    cache = layer.new_cache(1, 3, dtype=torch.float64, device=torch.device("cpu"))
    with pytest.raises(ValueError, match="holds 3 tokens, 5"):
        layer(random(1, 5, DIM), Context(rope=rope(layer, 0, 5), cache=cache))


@every_kind
def test_state_dict_round_trip_is_exact(kind: str) -> None:
    layer, x = build(kind), random(1, 5, DIM)
    other = KINDS[kind]().double()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x, Context(rope=rope(layer, 0, 5))), other(x, Context(rope=rope(layer, 0, 5))))


def test_grouped_heads_share_keys_in_the_order_one_one_one_one_two_two_two_two() -> None:
    torch.manual_seed(0)
    layer = GQA(24, GQAConfig(num_heads=8, num_kv_heads=2, head_dim=6, rope_dim=0)).double()
    x = random(1, 5, 24)
    q, k, v = (t.view(5, -1, 6).transpose(0, 1) for t in layer.qkv(x)[0].split((48, 12, 12), -1))
    group = [0, 0, 0, 0, 1, 1, 1, 1]
    expected = reference(q, k[group], v[group], 6**-0.5).transpose(0, 1).reshape(5, 48) @ layer.out.weight.T
    torch.testing.assert_close(layer(x, Context(rope=rope(layer, 0, 5)))[0], expected, rtol=1e-12, atol=1e-12)


def test_one_group_a_head_is_multi_head_attention_exactly() -> None:
    torch.manual_seed(0)
    mha, gqa = GQA(24, GQAConfig(num_heads=6)).double(), GQA(24, GQAConfig(num_heads=6, num_kv_heads=6)).double()
    gqa.load_state_dict(mha.state_dict())
    x = random(2, 7, 24)
    assert torch.equal(mha(x, Context(rope=rope(mha, 0, 7))), gqa(x, Context(rope=rope(gqa, 0, 7))))


def test_cache_sizes_are_those_of_the_published_models() -> None:
    """DeepSeek-V2's 34,560 cached elements per token, V2-Lite's 15,552, their MHA counterparts."""
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
def test_impossible_sizes_are_rejected_by_name(config: GQAConfig | MLAConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GQA(DIM, config) if isinstance(config, GQAConfig) else MLA(DIM, config)
