"""DropToken: leaving tokens out is masking their columns, and what it saves."""

import math

import torch
from torch import Tensor

from danlu.claims.frame import Claim, absolute, at_most, exact
from danlu.models import MAE, MAEConfig, Transformer, TransformerConfig
from danlu.nn import GQAConfig
from danlu.objectives import drop_tokens, kept_tokens


def _difference(*, renumbered: bool) -> float:
    """Largest difference in the kept rows between a sequence without some tokens and one with their columns masked.

    Tokens that open a document are kept; infinite where they are not, or where other values lost other tokens.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        attention = GQAConfig(num_heads=4, mask="bidirectional")
        sizes = TransformerConfig(vocab_size=31, dim=32, layers=3, hidden=48, attention=attention)
        model = Transformer(sizes).double()
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(31, (3, 23), generator=generator)
    short = drop_tokens({"tokens": tokens, "targets": tokens + 1}, 0.4, generator=generator)
    kept = short["positions"][..., 0]
    right = torch.equal(short["tokens"], tokens.gather(1, kept)) and torch.equal(short["targets"], short["tokens"] + 1)
    if not right or kept.shape[1] != 14 or bool((kept[:, 0] != 0).any()):
        return math.inf
    # Kept and left out as two documents, one behind the other: a kept token then sees the kept columns alone.
    left_out = torch.ones_like(tokens).scatter(1, kept, 0)
    documents, order = left_out.sort(dim=1, stable=True)
    positions = torch.arange(kept.shape[1], dtype=torch.int64).expand_as(kept) if renumbered else kept
    with torch.no_grad():
        masked = model.hidden(tokens.gather(1, order), documents=documents, positions=order[..., None])
        less = model.hidden(short["tokens"], positions=positions[..., None])
    return float((masked[:, : kept.shape[1]] - less).abs().max())


def _matrix() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    return scores.softmax(-1)


def _renormalised(weights: Tensor) -> Tensor:
    return weights / weights.sum(-1, keepdim=True)


def _mean_mask_error(*, together: bool = True) -> float:
    """Change of attention by the mean of 40 000 masks, two of six kept; else the mean of masked attentions."""
    matrix, generator = _matrix(), torch.Generator().manual_seed(0)
    kept = kept_tokens(40_000, 6, 2 / 3, generator=generator)
    masks = torch.zeros(40_000, 6, dtype=torch.float64).scatter(1, kept, 1.0)
    mean = _renormalised(matrix * masks.mean(0)) if together else _renormalised(matrix * masks[:, None]).mean(0)
    return float((mean - matrix).abs().max())


def _openings(*, protected: bool) -> float:
    """Share of 1000 document openings that are kept where half of the tokens go; a token in eight opens one."""
    generator = torch.Generator().manual_seed(0)
    documents = torch.arange(16).div(8, rounding_mode="floor").expand(500, 16)
    batch = {"tokens": torch.arange(16).expand(500, 16)}
    if protected:
        batch["documents"] = documents
    kept = drop_tokens(batch, 0.5, generator=generator)["tokens"]
    return float((kept[..., None] == torch.tensor([0, 8])).any(1).double().mean())


def _work(visible: int) -> float:
    """Share of the work over 128 tokens that is left, at width 768."""
    with torch.device("meta"):
        encoder = MAE(MAEConfig(dim=768, num_heads=12, layers=1))
    return encoder.encoder_flops(visible) / encoder.encoder_flops(128)


CLAIMS = (
    Claim(
        name="columns-are-tokens",
        statement="difference of leaving tokens out to masking their columns, 3 layers, float64; control: renumbered",
        source="kexue.fm 8770; derivation",
        expected=5e-15,
        tolerance=at_most(),
        measure=lambda: _difference(renumbered=False),
        control=lambda: _difference(renumbered=True),
        seconds=0.1,
    ),
    Claim(
        name="openings-are-kept",
        statement="share of documents' first tokens kept where half of all go; control: documents not told apart",
        source="derivation: a document without its opening is another text",
        expected=1,
        tolerance=exact(),
        measure=lambda: _openings(protected=True),
        control=lambda: _openings(protected=False),
        seconds=0.1,
    ),
    Claim(
        name="mean-mask",
        statement="change of attention by the mean of 40 000 masks of two in six; control: mean of masked attentions",
        source="kexue.fm 8770: renormalising p A gives A; sampling leaves 0.007",
        expected=0.01,
        tolerance=at_most(),
        measure=_mean_mask_error,
        control=lambda: _mean_mask_error(together=False),
        seconds=0.1,
    ),
    Claim(
        name="work",
        statement="share of a layer's work left with 32 of 128 tokens at width 768; control: the share of the tokens",
        source="derivation: (24 k d^2 + 4 k^2 d) / (24 n d^2 + 4 n^2 d)",
        expected=(24 * 32 * 768 + 4 * 32**2) / (24 * 128 * 768 + 4 * 128**2),
        tolerance=absolute(1e-9),
        measure=lambda: _work(32),
        control=lambda: 32 / 128,
        seconds=0.1,
    ),
)
