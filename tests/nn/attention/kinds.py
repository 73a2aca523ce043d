"""Layers of attention of every kind, of sizes that have no common factor, and the definition written out."""

import math
from collections.abc import Callable
from functools import partial

import torch
from tensors import gaussian
from torch import Tensor

from danlu.nn import GQA, MLA, GQAConfig, MLAConfig, causal_mask, rotary_angles

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


random = partial(gaussian, seed=4)


def build(kind: str) -> GQA | MLA:
    torch.manual_seed(3)
    return KINDS[kind]().double()


def rope(layer: GQA | MLA, start: int, end: int) -> tuple[Tensor, Tensor]:
    return rotary_angles(torch.arange(start, end, dtype=torch.float64), layer.rope_dim)


def reference(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Softmax attention written out, (heads, time, size)."""
    scores = (q @ k.transpose(-1, -2)) * scale
    scores = scores.masked_fill(~causal_mask(q.shape[-2], k.shape[-2]), -math.inf)
    return scores.softmax(-1) @ v
