"""DropToken: leaving tokens out is masking their columns, and what it saves."""

import torch
from torch import Tensor

from danlu.claims.frame import Claim, absolute, at_most
from danlu.models import MAE, MAEConfig, Transformer, TransformerConfig
from danlu.nn import GQAConfig
from danlu.objectives import kept_tokens


def _difference(*, renumbered: bool) -> float:
    """Largest difference in the kept rows between a sequence without some tokens and one with their columns masked."""
    torch.manual_seed(0)
    attention = GQAConfig(num_heads=4, mask="bidirectional")
    model = Transformer(TransformerConfig(vocab_size=31, dim=32, layers=3, hidden=48, attention=attention)).double()
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(31, (3, 23), generator=generator)
    kept = kept_tokens(3, 23, 0.4, generator=generator)
    # Kept and left out as two documents, one behind the other: a kept token then sees the kept columns alone.
    left_out = torch.ones_like(tokens).scatter(1, kept, 0)
    documents, order = left_out.sort(dim=1, stable=True)
    positions = torch.arange(kept.shape[1], dtype=torch.int64).expand_as(kept) if renumbered else kept
    with torch.no_grad():
        masked = model.hidden(tokens.gather(1, order), documents=documents, positions=order[..., None])
        short = model.hidden(tokens.gather(1, kept), positions=positions[..., None])
    return float((masked[:, : kept.shape[1]] - short).abs().max())


def _matrix() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    return scores.softmax(-1)


def _renormalised(weights: Tensor) -> Tensor:
    return weights / weights.sum(-1, keepdim=True)


def _mean_mask_error() -> float:
    matrix = _matrix()
    return float((_renormalised(0.25 * matrix) - matrix).abs().max())


def _mean_matrix_error() -> float:
    """The same of the mean of the matrices under all masks that keep some column, each with its probability."""
    matrix, p = _matrix(), 0.25
    mean, total = torch.zeros_like(matrix), 0.0
    for number in range(1, 64):
        mask = torch.tensor([float(number >> bit & 1) for bit in range(6)], dtype=torch.float64)
        kept = int(mask.sum())
        chance = p**kept * (1 - p) ** (6 - kept)
        mean += chance * _renormalised(matrix * mask)
        total += chance
    return float((mean / total - matrix).abs().max())


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
        expected=1e-10,
        tolerance=at_most(),
        measure=lambda: _difference(renumbered=False),
        control=lambda: _difference(renumbered=True),
        seconds=0.3,
    ),
    Claim(
        name="mean-mask",
        statement="change of attention by the mean of its masks, keep 0.25; control: mean of the masked attentions",
        source="kexue.fm 8770: renormalising p A gives A",
        expected=1e-15,
        tolerance=at_most(),
        measure=_mean_mask_error,
        control=_mean_matrix_error,
        seconds=0.1,
    ),
    Claim(
        name="work",
        statement="share of a layer's work left with 32 of 128 tokens at width 768; control: masking the columns",
        source="derivation: (24 k d^2 + 4 k^2 d) / (24 n d^2 + 4 n^2 d)",
        expected=(24 * 32 * 768 + 4 * 32**2) / (24 * 128 * 768 + 4 * 128**2),
        tolerance=absolute(1e-9),
        measure=lambda: _work(32),
        control=lambda: _work(128),
        seconds=0.1,
    ),
)
