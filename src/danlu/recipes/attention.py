"""The attention variants of the study "why is MLA good" (kexue.fm 10907, 11111) on the dense language model.

All cache 128 elements per token and layer but two: the multi-head one, the baseline, and
``kv-shared2-64-own`` (160), whose values have coordinates of their own. They differ in the attention alone: parameters
are not matched, as in the source.
"""

from dataclasses import replace

from danlu.nn import GQAConfig, KVSharedConfig, MLAConfig, SquarePlusConfig
from danlu.recipes.lm import lm_dense
from danlu.train import RunConfig

VARIANTS: dict[str, GQAConfig | MLAConfig | KVSharedConfig] = {
    "mha-32": GQAConfig(num_heads=8),
    "gqa2-32": GQAConfig(num_heads=8, num_kv_heads=2),
    "gqa1-64": GQAConfig(num_heads=8, num_kv_heads=1, head_dim=64),
    "gqa1-64-partial-rope": GQAConfig(num_heads=8, num_kv_heads=1, head_dim=64, rope_dim=16),
    "kv-shared2-64": KVSharedConfig(num_heads=8, num_kv_heads=2, head_dim=64, rope_dim=16),
    "kv-shared1-128": KVSharedConfig(num_heads=8, num_kv_heads=1, head_dim=128, rope_dim=16),
    "kv-shared2-64-own": KVSharedConfig(num_heads=8, num_kv_heads=2, head_dim=64, rope_dim=16, value_rope="own"),
    "kv-shared1-128-none": KVSharedConfig(num_heads=8, num_kv_heads=1, head_dim=128, rope_dim=16, value_rope="none"),
    "mla-48": MLAConfig(num_heads=8, kv_rank=112, nope_dim=32, rope_dim=16, value_dim=48),
    "mla-64": MLAConfig(num_heads=8, kv_rank=112, nope_dim=48, rope_dim=16, value_dim=64),
    "mla-64-query-96": MLAConfig(num_heads=8, kv_rank=112, q_rank=96, nope_dim=48, rope_dim=16, value_dim=64),
}
"""Attention of a model of size 256, by name: kind and groups, then the size of a head."""


def variant(name: str, recipe: str) -> RunConfig:
    """``lm-dense`` with the attention of one variant."""
    config = lm_dense()
    return replace(config, recipe=recipe, model=replace(config.model, attention=VARIANTS[name]))


def lm_mha() -> RunConfig:
    """lm-dense with multi-head attention of eight heads."""
    return variant("mha-32", "lm-mha")


def lm_gqa() -> RunConfig:
    """lm-dense with two keys and values for eight heads, a quarter of the cache.

    Grouped queries over two keys and values: 128 numbers.
    """
    return variant("gqa2-32", "lm-gqa")


def lm_mla() -> RunConfig:
    """lm-dense with latent attention and the cache of lm-gqa.

    Latent attention, 112 + 16 numbers.
    """
    return variant("mla-64", "lm-mla")


def lm_kv_shared() -> RunConfig:
    """lm-dense with keys that are values and the cache of lm-gqa.

    Keys that are values, two groups of 64 coordinates, 16 of them rotated: 128 numbers.
    """
    return variant("kv-shared2-64", "lm-kv-shared")


def lm_squareplus() -> RunConfig:
    """lm-dense with SquarePlus gates, b trained.

    ``lm-dense`` with SquarePlus in the gates in place of SiLU, its corner trained in every layer.
    """
    config = lm_dense()
    return replace(
        config, recipe="lm-squareplus", model=replace(config.model, activation=SquarePlusConfig(b=4.0, learnable=True))
    )
