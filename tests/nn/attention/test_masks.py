"""Masks: what each lets through, that the fused way equals the written-out one, and how they compose with documents."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from tensors import gaussian
from torch import Tensor

from danlu.models import Transformer, TransformerConfig
from danlu.nn import (
    GQA,
    MLA,
    GQAConfig,
    KVShared,
    KVSharedConfig,
    MLAConfig,
    causal_mask,
    document_mask,
    masked_attention,
    rotary_angles,
)
from danlu.nn.attention.masks import MASKS, Mask
from danlu.protocols import Context

every_mask = pytest.mark.parametrize("mask", MASKS)
LAYERS: dict[str, GQAConfig | MLAConfig | KVSharedConfig] = {
    "mha": GQAConfig(num_heads=4, head_dim=6),
    "gqa": GQAConfig(num_heads=4, num_kv_heads=2, head_dim=6),
    "mqa": GQAConfig(num_heads=4, num_kv_heads=1, head_dim=6),
    "mla": MLAConfig(num_heads=4, kv_rank=7, nope_dim=5, rope_dim=4, value_dim=3),
    "kv-shared": KVSharedConfig(num_heads=4, num_kv_heads=2, head_dim=6, rope_dim=4),
    "kv-shared one group": KVSharedConfig(num_heads=4, num_kv_heads=1, head_dim=6, rope_dim=0),
}
KINDS = {GQAConfig: GQA, MLAConfig: MLA, KVSharedConfig: KVShared}
every_layer = pytest.mark.parametrize("kind", LAYERS)
DIM = 13


random = partial(gaussian, seed=9)


def visible(mask: Mask, time: int, prefix: int) -> Tensor:
    """``(heads = 4, time, time)``, written from the definitions."""
    i, j = torch.arange(time)[:, None], torch.arange(time)
    rules = {
        "causal": j <= i,
        "anti-causal": j >= i,
        "bidirectional": (j >= 0).expand(time, time),
        "prefix": (j <= i) | (j < prefix),
    }
    if mask == "mixed-heads":
        return torch.stack([rules["causal"], rules["causal"], rules["anti-causal"], rules["anti-causal"]])
    return rules[mask].expand(4, time, time)


def build(kind: str, mask: str) -> GQA | MLA | KVShared:
    torch.manual_seed(3)
    config = replace(LAYERS[kind], mask=mask)  # type: ignore[arg-type]
    layer: GQA | MLA | KVShared = KINDS[type(config)](DIM, config)  # type: ignore[arg-type]
    return layer.double()


def rope(layer: GQA | MLA | KVShared, time: int) -> tuple[Tensor, Tensor]:
    return rotary_angles(torch.arange(time, dtype=torch.float64), layer.rope_dim)


def given(mask: Mask, prefix: int | Tensor) -> dict[str, int | Tensor]:
    return {"prefix": prefix} if mask == "prefix" else {}


@every_mask
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("prefix", [0, 1, 5, 11])
def test_fused_kernels_give_what_the_written_out_mask_gives(mask: Mask, groups: int, prefix: int) -> None:
    q, k, v = random(2, 4, 11, 6), random(2, groups, 11, 6).flip(2), random(2, groups, 11, 5)
    scores = q @ k.repeat_interleave(4 // groups, 1).mT / math.sqrt(6)
    scores = scores.masked_fill(~visible(mask, 11, prefix), -math.inf)
    expected = scores.softmax(-1) @ v.repeat_interleave(4 // groups, 1)
    found = masked_attention(q, k, v, mask, **given(mask, prefix))  # type: ignore[arg-type]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


def test_a_prefix_of_nothing_is_causal_and_of_everything_bidirectional_bit_for_bit() -> None:
    q, k, v = random(2, 4, 11, 6), random(2, 2, 11, 6).flip(2), random(2, 2, 11, 5)
    causal, whole = masked_attention(q, k, v, "causal"), masked_attention(q, k, v, "bidirectional")
    for prefix in (None, 0, 1):
        assert torch.equal(masked_attention(q, k, v, "prefix", prefix=prefix), causal)
    assert torch.equal(masked_attention(q, k, v, "prefix", prefix=11), whole)
    documents = torch.zeros(1, 11, dtype=torch.int64)
    for prefix in (None, 0, 1):
        assert torch.equal(document_mask(documents, "prefix", prefix=prefix), causal_mask(11, 11)[None, None])
    assert torch.equal(document_mask(documents, "prefix", prefix=11), document_mask(documents, "bidirectional"))


@every_layer
@every_mask
def test_a_changed_token_changes_the_outputs_that_may_see_it_and_no_other(mask: Mask, kind: str) -> None:
    layer, x = build(kind, mask), random(1, 9, DIM)
    base = layer(x, Context(rope=rope(layer, 9), **given(mask, 4)))
    seen = visible(mask, 9, 4).any(0)
    for j in range(9):
        changed = x.clone()
        changed[:, j] += 1
        moved = (layer(changed, Context(rope=rope(layer, 9), **given(mask, 4))) - base)[0].abs().amax(-1)
        assert torch.equal(moved > 1e-9, seen[:, j])


@every_layer
@every_mask
def test_packed_documents_equal_each_document_alone_under_every_mask(mask: Mask, kind: str) -> None:
    layer, x = build(kind, mask), random(1, 13, DIM)
    documents = torch.tensor([[4] * 5 + [9] * 8])
    own = document_mask(documents, mask, num_heads=4, **given(mask, 3))  # type: ignore[arg-type]
    packed = layer(x, Context(rope=rope(layer, 13), mask=own))
    alone = [layer(t, Context(rope=rope(layer, t.shape[1]), **given(mask, 3))) for t in (x[:, :5], x[:, 5:])]
    torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=0, atol=1e-12)


def test_a_prefix_of_booleans_is_another_length_in_every_sequence() -> None:
    lengths = torch.tensor([[2], [5]])
    mask = document_mask(torch.zeros(2, 7, dtype=torch.int64), "prefix", prefix=torch.arange(7) < lengths)
    for row, length in enumerate([2, 5]):
        assert torch.equal(mask[row, 0], visible("prefix", 7, length)[0])


@every_layer
def test_a_prefix_that_was_read_whole_is_continued_over_a_cache(kind: str) -> None:
    layer, x = build(kind, "prefix"), random(2, 11, DIM)
    cos, sin = rope(layer, 11)
    full = layer(x, Context(rope=(cos, sin), prefix=4))
    cache = layer.new_cache(2, 12, dtype=torch.float64, device=torch.device("cpu"))
    parts = []
    for a, b in [(0, 6), (6, 7), (7, 11)]:
        first = {"prefix": 4} if a == 0 else {}
        parts.append(layer(x[:, a:b], Context(rope=(cos[a:b], sin[a:b]), cache=cache, **first)))
    torch.testing.assert_close(torch.cat(parts, 1), full, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="prefix must be given with the first tokens"):
        layer(x[:, :1], Context(rope=(cos[:1], sin[:1]), cache=cache, prefix=4))


def test_a_latent_smaller_than_a_head_reads_its_first_chunk_causally() -> None:
    layer = MLA(DIM, MLAConfig(num_heads=2, kv_rank=2, nope_dim=9, rope_dim=2, value_dim=9)).double()
    x = random(1, 7, DIM)
    cache = layer.new_cache(1, 7, dtype=torch.float64, device=torch.device("cpu"))
    torch.testing.assert_close(
        layer(x, Context(rope=rope(layer, 7), cache=cache)), layer(x, Context(rope=rope(layer, 7))), rtol=0, atol=1e-12
    )


@every_layer
@pytest.mark.parametrize("mask", ["anti-causal", "bidirectional", "mixed-heads"])
def test_a_mask_that_looks_ahead_keeps_no_cache(mask: str, kind: str) -> None:
    with pytest.raises(ValueError, match=f"'{mask}' keeps no cache"):
        build(kind, mask).new_cache(1, 5, dtype=torch.float64, device=torch.device("cpu"))


def model(mask: str, layers: int = 3, kind: type[GQAConfig | KVSharedConfig] = GQAConfig) -> Transformer:
    torch.manual_seed(1)
    attention = kind(num_heads=4, head_dim=6, rope_dim=4, mask=mask)  # type: ignore[arg-type]
    return Transformer(TransformerConfig(vocab_size=17, dim=24, layers=layers, hidden=20, attention=attention)).double()


@pytest.mark.parametrize("kind", [GQAConfig, KVSharedConfig])
def test_a_model_of_mixed_layers_gives_them_their_masks(kind: type[GQAConfig | KVSharedConfig]) -> None:
    layers = [block.attention for block in model("mixed-layers", kind=kind).blocks]
    assert [layer.mask for layer in layers] == ["causal", "anti-causal", "causal"]  # type: ignore[union-attr]


def test_mixed_layers_are_causal_and_anti_causal_in_turn() -> None:
    tokens = torch.arange(9)[None]
    changed = tokens.clone()
    changed[0, 4] = 16
    moved = (model("mixed-layers", 1)(tokens) - model("mixed-layers", 1)(changed))[0].abs().amax(-1) > 1e-9
    assert moved.tolist() == [False] * 4 + [True] * 5
    moved = (model("mixed-layers", 2)(tokens) - model("mixed-layers", 2)(changed))[0].abs().amax(-1) > 1e-9
    assert moved.all()


@pytest.mark.parametrize("kind", [GQAConfig, KVSharedConfig])
@pytest.mark.parametrize("mask", [*MASKS, "mixed-layers"])
def test_a_model_keeps_packed_documents_apart_under_every_mask(
    mask: str, kind: type[GQAConfig | KVSharedConfig]
) -> None:
    network, tokens = model(mask, kind=kind), torch.arange(13)[None]
    documents = torch.tensor([[0] * 5 + [1] * 8])
    more = {"prefix": 3} if mask == "prefix" else {}
    alone = torch.cat((network(tokens[:, :5], **more), network(tokens[:, 5:], **more)), 1)
    torch.testing.assert_close(network(tokens, documents=documents, **more), alone, rtol=0, atol=1e-11)


def test_a_model_reads_a_prefix_as_a_number_or_as_booleans() -> None:
    network, tokens = model("prefix"), torch.arange(13)[None]
    number = network(tokens, prefix=6)
    torch.testing.assert_close(network(tokens, prefix=(torch.arange(13) < 6)[None]), number, rtol=0, atol=1e-12)
    assert torch.equal(network(tokens), model("causal")(tokens))
    assert torch.equal(network(tokens, prefix=13), model("bidirectional")(tokens))


@every_layer
def test_a_bidirectional_layer_does_twice_the_work(kind: str) -> None:
    causal, both = (build(kind, mask) for mask in ("causal", "bidirectional"))
    assert both.flops_per_token(999) == causal.flops_per_token(999) * 999 / 500


def test_impossible_masks_and_prefixes_are_rejected_by_name() -> None:
    q = random(1, 4, 5, 6)
    with pytest.raises(ValueError, match=r"mask must be one of .* did you mean 'causal'"):
        GQA(24, GQAConfig(num_heads=4, mask="casual"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="for a model of several layers"):
        GQA(24, GQAConfig(num_heads=4, mask="mixed-layers"))
    with pytest.raises(ValueError, match="num_heads must be even"):
        GQA(24, GQAConfig(num_heads=3, mask="mixed-heads"))
    with pytest.raises(ValueError, match="num_kv_heads must be even or 1"):
        GQA(36, GQAConfig(num_heads=6, num_kv_heads=3, mask="mixed-heads"))
    with pytest.raises(ValueError, match="num_kv_heads must be even or 1"):
        KVShared(36, KVSharedConfig(num_heads=6, num_kv_heads=3, mask="mixed-heads"))
    with pytest.raises(ValueError, match="for a model of several layers"):
        KVShared(24, KVSharedConfig(mask="mixed-layers"))
    with pytest.raises(ValueError, match="prefix is for mask 'prefix'"):
        masked_attention(q, q, q, prefix=2)
    with pytest.raises(ValueError, match="at most the 5 tokens"):
        masked_attention(q, q, q, "prefix", prefix=6)
    with pytest.raises(ValueError, match="prefix"):
        masked_attention(q, q, q, "prefix", prefix=-1)
    with pytest.raises(ValueError, match="as many as queries"):
        masked_attention(q[:, :, :3], q, q)
    with pytest.raises(ValueError, match="prefix must be booleans"):
        document_mask(torch.zeros(1, 5), "prefix", prefix=torch.zeros(1, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="no layer of this model has the mask"):
        model("causal")(torch.arange(5)[None], prefix=2)
    network = model("prefix")
    with pytest.raises(ValueError, match="a number of tokens when there is a cache"):
        network(torch.arange(5)[None], prefix=torch.ones(1, 5, dtype=torch.bool), cache=network.new_cache(1, 5))


def test_two_runs_of_one_number_are_two_documents() -> None:
    twice, own = torch.tensor([[4, 4, 9, 4, 4]]), torch.tensor([[0, 0, 1, 2, 2]])
    for mask in MASKS:
        prefix = 1 if mask == "prefix" else None
        assert torch.equal(document_mask(twice, mask, prefix=prefix), document_mask(own, mask, prefix=prefix))
