"""Masks by fused kernels: equal to the written-out ones, prefixes between causal and bidirectional, nothing leaks."""

import torch
from torch import Tensor

from danlu.claims.frame import Claim, at_most, exact
from danlu.nn import GQA, FullAttention, GQAConfig, rotary_angles
from danlu.nn.attention.blocked import blocked_attention
from danlu.nn.attention.masks import MASKS, Mask, attention_under, causal_mask, document_mask, masked_attention
from danlu.nn.rotary import rotate
from danlu.protocols import Context

_TIME, _PREFIX = 37, 11


def _sample(time: int = _TIME, size: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 6, time, size, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, 2, 2, time, size, generator=generator, dtype=torch.float64)
    return q, k, v[..., :7]


def _with_gradients(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def _softmax(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, *, in_turn: bool = False) -> Tensor:
    """Attention with its matrix; the heads of a group are neighbours, or (wrongly) every second one."""
    repeats = q.shape[1] // k.shape[1]
    k, v = (t.repeat(1, repeats, 1, 1) if in_turn else t.repeat_interleave(repeats, 1) for t in (k, v))
    y: Tensor = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~allowed, -torch.inf).softmax(-1) @ v
    return y


def _allowed(mask: Mask, documents: Tensor, *, one_more: bool = False) -> Tensor:
    """The definitions of the masks, pair by pair; ``one_more`` lets causal queries see the next key as well."""
    i, j = torch.arange(documents.shape[1])[:, None], torch.arange(documents.shape[1])
    runs = torch.cat((torch.zeros(len(documents), 1), (documents.diff(dim=1) != 0).cumsum(1)), 1)
    same = (runs[:, :, None] == runs[:, None, :])[:, None]
    begins = torch.stack([torch.stack([(run < at).sum() for at in run]) for run in runs])[:, None, None]
    before, after = j <= i + one_more, j >= i
    seen = {
        "causal": before,
        "anti-causal": after,
        "bidirectional": before | after,
        "prefix": before | (j < begins + _PREFIX),
        "mixed-heads": torch.stack([before] * 3 + [after] * 3),
    }[mask]
    return same & seen


def _errors(found: Tensor, wanted: Tensor, inputs: tuple[Tensor, ...]) -> float:
    """Largest error of a result and of its gradients."""
    weight = torch.linspace(-1, 1, wanted.numel(), dtype=wanted.dtype).view_as(wanted)
    pairs = zip(*(torch.autograd.grad((weight * y).sum(), inputs, retain_graph=True) for y in (found, wanted)))
    return max(float((a - b).detach().abs().max()) for a, b in [(found, wanted), *pairs])


def _largest_error(*, one_more: bool = False) -> float:
    """Largest error over the masks, alone and for packed documents, fused and in blocks, and of gradients."""
    worst = 0.0
    packed = torch.tensor([[0] * 16 + [1] * 13 + [0] * 8, [5] * 37])
    for mask in MASKS:
        inputs = _with_gradients(*_sample())
        prefix = _PREFIX if mask == "prefix" else None
        alone = _allowed(mask, torch.zeros(2, _TIME), one_more=one_more)
        together = _allowed(mask, packed, one_more=one_more)
        cut = document_mask(packed, mask, num_heads=6, prefix=prefix)
        for allowed, found in (
            (alone, masked_attention(*inputs, mask, prefix=prefix)),
            (together, attention_under(*inputs, cut)),
            (together, blocked_attention(*inputs, causal=False, scale=8**-0.5, mask=cut)),
        ):
            worst = max(worst, _errors(found, _softmax(*inputs, allowed), inputs))
    for size in (8, 64):  # short rows keep their weights for the backward pass, long ones form them again
        inputs = _with_gradients(*_sample(150, size))
        wanted = _softmax(*inputs, _allowed("causal", torch.zeros(1, 150), one_more=one_more))
        found = blocked_attention(*inputs, causal=True, scale=size**-0.5)
        worst = max(worst, _errors(found, wanted, inputs))
    return worst


def _bfloat16_error(*, exact_scores: bool) -> float:
    """Largest error in bfloat16 where the scores' mean is 50; else their product is rounded before the softmax."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 2, 64, 16, generator=generator) + 3.5
    k = torch.randn(1, 1, 64, 16, generator=generator) + 3.5
    q, k, v = (t.bfloat16() for t in (q, k, torch.rand(1, 1, 64, 24, generator=generator)))
    wanted = _softmax(q.double(), k.double(), v.double(), torch.ones(64, 64).tril() > 0)
    if exact_scores:
        found = blocked_attention(q, k, v, causal=True, scale=0.25)
    else:
        found = (0.25 * q @ k.mT).masked_fill(torch.ones(64, 64).triu(1) > 0, -torch.inf).softmax(-1) @ v
    return float((found.double() - wanted).abs().max())


@torch.no_grad()
def _layer_error(*, in_turn: bool = False) -> float:
    """Largest error of grouped and full attention layers against the multi-head form, at once and chunk by chunk."""
    generator = torch.Generator().manual_seed(0)
    layer = GQA(40, GQAConfig(num_heads=6, num_kv_heads=2, head_dim=10, rope_dim=4)).double()
    full = FullAttention(40, 4).double()
    for parameter in (*layer.parameters(), *full.parameters()):
        parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 6)
    x = torch.randn(2, 23, 40, generator=generator, dtype=torch.float64)
    cos, sin = rotary_angles(torch.arange(23, dtype=torch.float64), 4)
    q, k, v = (x @ layer.qkv.weight.mT).view(2, 23, 10, 10).transpose(1, 2).split((6, 2, 2), 1)
    heads = _softmax(rotate(q, cos, sin), rotate(k, cos, sin), v, causal_mask(23, 23), in_turn=in_turn)
    wanted = heads.transpose(1, 2).flatten(2) @ layer.out.weight.mT
    cache = layer.new_cache(2, 23, dtype=torch.float64, device=x.device)
    steps, start = [], 0
    for size in (3, 1, 2, 1, 16):
        here = slice(start, start + size)
        steps.append(layer(x[:, here], Context(rope=(cos[here], sin[here]), cache=cache)))
        start += size
    errors = [layer(x, Context(rope=(cos, sin))) - wanted, torch.cat(steps, 1) - wanted]
    q, k, v = (x @ full.qkv.weight.mT).view(2, 23, 12, 10).transpose(1, 2).chunk(3, 1)
    heads = _softmax(rotate(q, cos, sin), rotate(k, cos, sin), v, torch.ones(23, 23) > 0)
    errors.append(full(x, (cos, sin)) - heads.transpose(1, 2).flatten(2) @ full.out.weight.mT)
    return max(float(error.abs().max()) for error in errors)


def _between(empty: int, full: int) -> float:
    """Numbers in which an empty prefix differs from causal, or a full one from bidirectional attention."""
    q, k, v = _sample()
    differs = masked_attention(q, k, v, "prefix", prefix=empty) != masked_attention(q, k, v)
    differs_too = masked_attention(q, k, v, "prefix", prefix=full) != masked_attention(q, k, v, "bidirectional")
    return float(differs.sum() + differs_too.sum())


def _leaks(mask: Mask, length: int = _PREFIX) -> float:
    """Outputs before a changed token that move, over all tokens behind the prefix."""
    q, k, v = _sample()
    prefix = length if mask == "prefix" else None
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
        statement="error of five masks and their gradients, fused or in blocks, packed or not; control: one key more",
        source="definitions; rounding of 150 terms in float64",
        expected=5e-14,
        tolerance=at_most(),
        measure=_largest_error,
        control=lambda: _largest_error(one_more=True),
        seconds=0.4,
    ),
    Claim(
        name="large-scores-in-bfloat16",
        statement="error of attention in blocks at mean scores of 50, values in [0, 1]; control: rounded scores",
        source="own measurement: 0.007, and 0.037 with rounded scores",
        expected=0.01,
        tolerance=at_most(),
        measure=lambda: _bfloat16_error(exact_scores=True),
        control=lambda: _bfloat16_error(exact_scores=False),
        seconds=0.1,
    ),
    Claim(
        name="grouped-heads",
        statement="error of grouped layers, in chunks too, against multi-head ones; control: every second head shares",
        source="Ainslie et al., arXiv 2305.13245: neighbouring heads form a group",
        expected=1e-14,
        tolerance=at_most(),
        measure=_layer_error,
        control=lambda: _layer_error(in_turn=True),
        seconds=0.1,
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
        statement="outputs that move when a token after the prefix and after them changes; control: a longer prefix",
        source="definition of a prefix language model",
        expected=0,
        tolerance=exact(),
        measure=lambda: _leaks("causal") + _leaks("prefix"),
        control=lambda: _leaks("prefix", _PREFIX + 1),
        seconds=0.1,
    ),
)
