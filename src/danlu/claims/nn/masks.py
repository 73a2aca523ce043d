"""Masks by fused kernels: equal to the written-out ones, prefixes between causal and bidirectional, nothing leaks."""

import torch
from torch import Tensor

from danlu.claims.frame import Claim, at_most, exact
from danlu.nn.attention.masks import MASKS, Mask, document_mask, masked_attention

_TIME, _PREFIX = 37, 11


def _sample() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 6, _TIME, 8, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, 2, 2, _TIME, 8, generator=generator, dtype=torch.float64)
    return q, k, v


def _fused(mask: Mask) -> Tensor:
    q, k, v = _sample()
    return masked_attention(q, k, v, mask, prefix=_PREFIX if mask == "prefix" else None)


def _written_out(mask: Mask) -> Tensor:
    q, k, v = _sample()
    alone = torch.zeros(1, _TIME, dtype=torch.int64)
    allowed = document_mask(alone, mask, num_heads=6, prefix=_PREFIX if mask == "prefix" else None)
    scores = (q @ k.repeat_interleave(3, 1).mT / 8**0.5).masked_fill(~allowed, -torch.inf)
    return scores.softmax(-1) @ v.repeat_interleave(3, 1)


def _largest_error(*, own: bool) -> float:
    """Largest difference over the masks; else each is compared with the next one."""
    others = MASKS if own else (*MASKS[1:], MASKS[0])
    return max(float((_fused(a) - _written_out(b)).abs().max()) for a, b in zip(MASKS, others))


def _between(empty: int, full: int) -> float:
    """Numbers in which an empty prefix differs from causal, or a full one from bidirectional attention."""
    q, k, v = _sample()
    differs = masked_attention(q, k, v, "prefix", prefix=empty) != masked_attention(q, k, v)
    differs_too = masked_attention(q, k, v, "prefix", prefix=full) != masked_attention(q, k, v, "bidirectional")
    return float(differs.sum() + differs_too.sum())


def _leaks(mask: Mask) -> float:
    """Outputs before a changed token that move, over all tokens behind the prefix."""
    q, k, v = _sample()
    prefix = _PREFIX if mask == "prefix" else None
    base, leaks = masked_attention(q, k, v, mask, prefix=prefix), 0.0
    for j in range(_PREFIX, _TIME):
        value = v.clone()
        value[:, :, j] += 1
        moved = masked_attention(q, k, value, mask, prefix=prefix)[:, :, :j] != base[:, :, :j]
        leaks += float(moved.sum())
    return leaks


CLAIMS = (
    Claim(
        name="no-matrix-needed",
        statement="fused calls against the mask written out, five masks, float64; control: against the next mask",
        source="definitions; rounding of 37 terms",
        expected=1e-13,
        tolerance=at_most(),
        measure=lambda: _largest_error(own=True),
        control=lambda: _largest_error(own=False),
        seconds=0.2,
    ),
    Claim(
        name="prefix-between",
        statement="numbers that differ: empty prefix from causal, full from bidirectional; control: two more, one less",
        source="kexue.fm 9529: GPT and BERT are the ends of UniLM",
        expected=0,
        tolerance=exact(),
        measure=lambda: _between(0, _TIME),
        control=lambda: _between(2, _TIME - 1),
        seconds=0.1,
    ),
    Claim(
        name="nothing-leaks",
        statement="outputs that move when a token after the prefix and after them changes; control: bidirectional",
        source="definition of a prefix language model",
        expected=0,
        tolerance=exact(),
        measure=lambda: _leaks("causal") + _leaks("prefix"),
        control=lambda: _leaks("bidirectional"),
        seconds=0.3,
    ),
)
