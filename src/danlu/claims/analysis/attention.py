"""What the rank of attention says, and what it does not: linear and softmax, causal and not, one layer and several."""

import math

import torch
from torch import Tensor

from danlu.analysis.attention import attention_matrix, effective_rank, numerical_rank, rank_collapse, triangular_logdet
from danlu.claims.frame import Claim, at_least, at_most, exact, relative
from danlu.nn import causal_mask


def _random(kind: str, *, causal: bool, size: int = 64) -> Tensor:
    """Attention of 512 normal queries and keys."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 512, size, generator=generator, dtype=torch.float64)
    return attention_matrix(q, k, mask=causal_mask(512, 512) if causal else None, kind=kind)


def _uniform_logdet(*, causal: bool) -> float:
    """Log determinant of uniform attention over 64 tokens."""
    zeros = torch.zeros(64, 4, dtype=torch.float64)
    weights = attention_matrix(zeros, zeros, mask=causal_mask(64, 64) if causal else None)
    return float(triangular_logdet(weights if causal else weights.tril()))


def _third_layer(*, causal: bool) -> float:
    """Largest (causal: smallest) residual after three layers over five seeds."""
    mask = causal_mask(128, 128) if causal else None
    found = [
        float(rank_collapse(128, 64, 3, mask=mask, generator=torch.Generator().manual_seed(s))[2]) for s in range(5)
    ]
    return min(found) if causal else max(found)


CLAIMS = (
    Claim(
        name="linear-rank",
        statement="rank of linear attention over 512 tokens with heads of 64; control: the same, causal",
        source="kexue.fm 9529; a product of rank-64 factors",
        expected=64,
        tolerance=exact(),
        measure=lambda: float(numerical_rank(_random("linear", causal=False))),
        control=lambda: float(numerical_rank(_random("linear", causal=True))),
        seconds=0.5,
    ),
    Claim(
        name="softmax-is-not-low-rank",
        statement="rank of random bidirectional softmax attention, 512 tokens, heads of 64; control: linear",
        source="measured against kexue.fm 9529, which expects less than full rank",
        expected=512,
        tolerance=exact(),
        measure=lambda: float(numerical_rank(_random("softmax", causal=False))),
        control=lambda: float(numerical_rank(_random("linear", causal=False))),
        seconds=0.5,
    ),
    Claim(
        name="causal-gains-at-small-heads",
        statement="effective rank, causal over bidirectional, heads of 4; control: heads of 64",
        source="table of random attention: 127 / 39",
        expected=127 / 39,
        tolerance=relative(0.1),
        measure=lambda: float(
            effective_rank(_random("softmax", causal=True, size=4))
            / effective_rank(_random("softmax", causal=False, size=4))
        ),
        control=lambda: float(
            effective_rank(_random("softmax", causal=True)) / effective_rank(_random("softmax", causal=False))
        ),
        seconds=0.8,
    ),
    Claim(
        name="uniform-determinant",
        statement="log determinant of uniform causal attention over 64 tokens; control: the bidirectional's triangle",
        source="derivation: -log 64!",
        expected=-math.lgamma(65),
        tolerance=relative(1e-12),
        measure=lambda: _uniform_logdet(causal=True),
        control=lambda: _uniform_logdet(causal=False),
        seconds=0.1,
    ),
    Claim(
        name="bidirectional-collapse",
        statement="part of the tokens beside their mean after three bare layers, worst of 5 seeds; control: causal",
        source="Dong et al., arXiv 2103.03404; measured 5e-9 to 4e-8",
        expected=1e-6,
        tolerance=at_most(),
        measure=lambda: _third_layer(causal=False),
        control=lambda: _third_layer(causal=True),
        seconds=0.5,
    ),
    Claim(
        name="causal-survives",
        statement="the same of causal layers, worst of 5 seeds; control: bidirectional",
        source="measured 0.43 to 0.63",
        expected=0.3,
        tolerance=at_least(),
        measure=lambda: _third_layer(causal=True),
        control=lambda: _third_layer(causal=False),
        seconds=0.5,
    ),
)
