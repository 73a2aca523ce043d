"""Keys that are values: the written-out sum, positions that matter only as differences, decoding from the cache."""

import pytest
import torch
from torch import Tensor

from danlu.nn import GQA, MLA, GQAConfig, KVShared, KVSharedConfig, MLAConfig, rotary_angles
from danlu.nn.rotary import rotate
from danlu.protocols import Context

CPU = torch.device("cpu")


def build(**changes: int) -> KVShared:
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
            o = (a[:, None] @ c)[:, 0]
            heads.append(rotate(o, cos[t], -sin[t]) if turned_back else o)
        rows.append(torch.cat(heads, dim=-1))
    return layer.out(torch.stack(rows, dim=1))


@pytest.mark.parametrize("changes", [{}, {"num_kv_heads": 1}, {"num_kv_heads": 6}, {"rope_dim": 0}, {"rope_dim": 10}])
def test_layer_is_the_written_out_sum(changes: dict[str, int]) -> None:
    layer, x = build(**changes), inputs()
    torch.testing.assert_close(
        layer(x, Context(rope=angles(layer))), written_out(layer, x, 0.0), rtol=1e-12, atol=1e-13
    )


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


@pytest.mark.parametrize("chunk", [1, 2, 5, 11])
def test_decoding_from_the_cache_equals_the_whole_pass(chunk: int) -> None:
    layer, x = build(), inputs()
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
    ],
)
def test_impossible_sizes_are_rejected_by_name(changes: dict[str, int], message: str) -> None:
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
