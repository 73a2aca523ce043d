"""Keys that are values: the written-out sum, positions that matter only as differences, decoding from the cache."""

import pytest
import torch
from torch import Tensor

from danlu.nn import GQA, MLA, GQAConfig, KVShared, KVSharedConfig, MLAConfig, rotary_angles
from danlu.nn.rotary import rotate
from danlu.protocols import Context

CPU = torch.device("cpu")


def build(**changes: int | str) -> KVShared:
    torch.manual_seed(0)
    return KVShared(
        17, KVSharedConfig(**({"num_heads": 6, "num_kv_heads": 3, "head_dim": 10, "rope_dim": 4} | changes))
    ).double()


def inputs(time: int = 11) -> Tensor:
    return torch.randn(2, time, 17, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def angles(layer: KVShared, time: int = 11, start: float = 0.0) -> tuple[Tensor, Tensor]:
    return rotary_angles(torch.arange(time, dtype=torch.float64) + start, layer.rope_dim)


@torch.no_grad()
def written_out(layer: KVShared, x: Tensor, start: float, *, turned_back: bool = True) -> Tensor:
    """Token by token and head by head, from the formula."""
    cos, sin = angles(layer, x.shape[1], start)
    K, H, per_group = layer.head_dim, layer.num_heads, layer.num_heads // layer.num_kv_heads
    q_and_c = layer.q_kv(x)
    rows = []
    for t in range(x.shape[1]):
        heads = []
        for h in range(H):
            q = rotate(q_and_c[:, t, h * K : (h + 1) * K], cos[t], sin[t])
            first = (H + h // per_group) * K
            c = rotate(q_and_c[:, : t + 1, first : first + K], cos[: t + 1], sin[: t + 1])
            a = torch.softmax((c @ q[:, :, None])[..., 0] / K**0.5, dim=-1)
            R, group = layer.rope_dim, h // per_group
            own = q_and_c[:, : t + 1, (H + layer.num_kv_heads) * K :][..., group * R : (group + 1) * R]
            v = {"turned-back": c, "own": torch.cat((c[..., : K - R], own), -1), "none": c[..., : K - R]}
            o = (a[:, None] @ v[layer.value_rope])[:, 0]
            heads.append(rotate(o, cos[t], -sin[t]) if turned_back and layer.value_rope == "turned-back" else o)
        rows.append(torch.cat(heads, dim=-1))
    return layer.out(torch.stack(rows, dim=1))


VALUES = [{"value_rope": "own"}, {"value_rope": "none", "num_kv_heads": 1}]


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_kv_heads": 1}, {"num_kv_heads": 6}, {"rope_dim": 0}, {"rope_dim": 10}, *VALUES],
)
def test_layer_is_the_written_out_sum(changes: dict[str, int | str]) -> None:
    layer, x = build(**changes), inputs()
    torch.testing.assert_close(
        layer(x, Context(rope=angles(layer))), written_out(layer, x, 0.0), rtol=1e-12, atol=1e-13
    )


@pytest.mark.parametrize("changes", VALUES)
def test_values_without_rotated_coordinates_know_no_positions_of_their_own(changes: dict[str, int | str]) -> None:
    layer, x = build(**changes), inputs()
    here, there = layer(x, Context(rope=angles(layer))), layer(x, Context(rope=angles(layer, start=1000.0)))
    torch.testing.assert_close(here, there, rtol=0, atol=1e-12)


@torch.no_grad()
def test_values_without_rotated_coordinates_are_latent_attention_as_it_decodes() -> None:
    """A latent layer with its up-projections merged into queries and output is this layer with one group."""
    torch.manual_seed(5)
    latent = MLA(17, MLAConfig(num_heads=3, kv_rank=8, nope_dim=5, rope_dim=4, value_dim=6)).double()
    direct = build(num_heads=3, num_kv_heads=1, head_dim=12, rope_dim=4, value_rope="none")
    q, c, k_rope = latent.down.weight.split((3 * 9, 8, 4))
    w_k, w_v = latent.kv_up.weight.view(3, 11, 8).split((5, 6), dim=1)
    heads = []
    for head in range(3):
        nope, rope = q[head * 9 : head * 9 + 9].split((5, 4))
        heads.append(torch.cat((w_k[head].T @ nope, rope)))
        direct.out.weight[:, head * 8 : head * 8 + 8] = latent.out.weight[:, head * 6 : head * 6 + 6] @ w_v[head]
    # The softmax scale is 1 / sqrt(12) here and 1 / sqrt(9) there; the latent's norm is the one thing left out.
    direct.q_kv.weight.copy_(torch.cat([torch.cat(heads) * (12 / 9) ** 0.5, c, k_rope]))
    latent.kv_norm = torch.nn.Identity()  # type: ignore[assignment]
    x = inputs()
    rope = angles(direct)
    torch.testing.assert_close(direct(x, Context(rope=rope)), latent(x, Context(rope=rope)), rtol=1e-11, atol=1e-12)


def test_shifting_all_positions_changes_nothing_because_the_output_is_turned_back() -> None:
    layer, x = build(), inputs()
    here, there = layer(x, Context(rope=angles(layer))), layer(x, Context(rope=angles(layer, start=1000.0)))
    torch.testing.assert_close(here, there, rtol=0, atol=1e-12)
    unturned = written_out(layer, x, 0.0, turned_back=False) - written_out(layer, x, 1000.0, turned_back=False)
    assert unturned.abs().max() > 1e-2


def test_no_rotated_coordinates_is_no_position() -> None:
    layer, x = build(rope_dim=0), inputs()
    y = layer(x, Context(rope=angles(layer)))
    order = torch.tensor([2, 0, 1, 3, 4, 5, 6, 7, 8, 9, 10])  # the last token sees all others, in any order
    torch.testing.assert_close(layer(x[:, order], Context(rope=angles(layer)))[:, -1], y[:, -1], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("changes", [{}, *VALUES])
@pytest.mark.parametrize("chunk", [1, 2, 5, 11])
def test_decoding_from_the_cache_equals_the_whole_pass(chunk: int, changes: dict[str, int | str]) -> None:
    layer, x = build(**changes), inputs()
    cos, sin = angles(layer)
    cache = layer.new_cache(2, 11, dtype=torch.float64, device=CPU)
    pieces = [
        layer(x[:, s : s + chunk], Context(rope=(cos[s : s + chunk], sin[s : s + chunk]), cache=cache))
        for s in range(0, 11, chunk)
    ]
    torch.testing.assert_close(torch.cat(pieces, dim=1), layer(x, Context(rope=(cos, sin))), rtol=0, atol=1e-12)


def test_cache_is_half_of_grouped_queries_with_the_same_heads() -> None:
    options = {"dtype": torch.float64, "device": CPU}
    shared = build().new_cache(1, 4, **options)  # type: ignore[arg-type]
    grouped = GQA(17, GQAConfig(num_heads=6, num_kv_heads=3, head_dim=10)).new_cache(1, 4, **options)  # type: ignore[arg-type]
    assert shared.elements_per_token() * 2 == grouped.elements_per_token() == 60


@torch.no_grad()
def test_grouped_queries_without_positions_are_one_shared_key_value_as_wide_as_their_cache() -> None:
    """GQA(g) is a shared key-value of size g (d_k + d_v): keys and values side by side, queries and outputs padded."""
    torch.manual_seed(3)
    grouped = GQA(17, GQAConfig(num_heads=6, num_kv_heads=2, head_dim=5, rope_dim=0)).double()
    wide = KVShared(17, KVSharedConfig(num_heads=6, num_kv_heads=1, head_dim=20, rope_dim=0)).double()
    q, k, v = grouped.qkv.weight.split((30, 10, 10))
    wide.q_kv.weight.zero_()
    wide.out.weight.zero_()
    for head in range(6):
        group = head // 3
        # The softmax scale is 1 / sqrt(20) here and 1 / sqrt(5) there.
        wide.q_kv.weight[head * 20 + group * 5 : head * 20 + group * 5 + 5] = 2 * q[head * 5 : head * 5 + 5]
        columns = slice(head * 20 + 10 + group * 5, head * 20 + 10 + group * 5 + 5)
        wide.out.weight[:, columns] = grouped.out.weight[:, head * 5 : head * 5 + 5]
    wide.q_kv.weight[120:130], wide.q_kv.weight[130:140] = k, v
    x, none = inputs(), rotary_angles(torch.arange(11.0, dtype=torch.float64), 0)
    torch.testing.assert_close(wide(x, Context(rope=none)), grouped(x, Context(rope=none)), rtol=1e-11, atol=1e-12)


def test_nan_in_one_sequence_leaves_the_other_alone() -> None:
    layer, x = build(), inputs()
    clean = layer(x, Context(rope=angles(layer)))
    x[0, 3] = torch.nan
    torch.testing.assert_close(layer(x, Context(rope=angles(layer)))[1], clean[1], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 0}, "num_heads"),
        ({"num_kv_heads": 4}, "num_kv_heads must divide"),
        ({"rope_dim": 3}, "even"),
        ({"rope_dim": 12}, "rope_dim"),
        ({"rope_dim": 10, "value_rope": "none"}, "below head_dim"),
        ({"value_rope": "both"}, "value_rope"),
    ],
)
def test_impossible_sizes_are_rejected_by_name(changes: dict[str, int | str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**changes)


def mla(nope: int, value: int) -> MLAConfig:
    return MLAConfig(num_heads=16, kv_rank=512, nope_dim=nope, rope_dim=64, value_dim=value)


@pytest.mark.parametrize(
    ("config", "millions", "cached"),
    [
        (GQAConfig(num_heads=16), 16.777, 4096),
        (GQAConfig(num_heads=16, num_kv_heads=2), 9.437, 512),
        (GQAConfig(num_heads=16, num_kv_heads=2, head_dim=192), 14.156, 768),
        (GQAConfig(num_heads=16, num_kv_heads=1, head_dim=256), 17.826, 512),
        (GQAConfig(num_heads=16, num_kv_heads=1, head_dim=256, rope_dim=64), 17.826, 512),
        (KVSharedConfig(num_heads=16, num_kv_heads=2, head_dim=256, rope_dim=64), 17.826, 512),
        (KVSharedConfig(num_heads=16, num_kv_heads=4, head_dim=128, rope_dim=64), 9.437, 512),
        (KVSharedConfig(num_heads=16, num_kv_heads=4, head_dim=192, rope_dim=64), 14.156, 768),
        (KVSharedConfig(num_heads=16, num_kv_heads=2, head_dim=256, rope_dim=64, value_rope="own"), 18.088, 640),
        (KVSharedConfig(num_heads=16, num_kv_heads=1, head_dim=576, rope_dim=64, value_rope="none"), 36.831, 576),
        (mla(128, 128), 13.763, 576),
        (mla(192, 256), 21.627, 576),  # the study's MLA-256 widened the values too: 192 would not give its total
    ],
)
def test_weights_and_cache_of_the_published_study(
    config: GQAConfig | KVSharedConfig | MLAConfig, millions: float, cached: int
) -> None:
    kinds = {GQAConfig: GQA, KVSharedConfig: KVShared, MLAConfig: MLA}
    with torch.device("meta"):
        layer = kinds[type(config)](2048, config)  # type: ignore[arg-type]
    assert sum(p.numel() for p in layer.parameters() if p.dim() == 2) / 1e6 == pytest.approx(millions, abs=5e-4)
    cache = layer.new_cache(1, 7, dtype=torch.bfloat16, device=torch.device("meta"))
    assert cache.elements_per_token() == cached
