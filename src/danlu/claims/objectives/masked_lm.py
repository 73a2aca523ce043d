"""Masked language modelling as dropout: what a model is shown on average, and how far from it the plain table is."""

import torch
from torch import Tensor

from danlu.claims.frame import Claim, at_most, relative
from danlu.models import Transformer, TransformerConfig
from danlu.nn import GQAConfig
from danlu.objectives import MaskedLM, expected_embedding


class _Shown(Transformer):
    """A network whose hidden states are what it is shown."""

    def hidden(self, tokens_bt: Tensor, **_: object) -> Tensor:
        self.shown = tokens_bt
        return tokens_bt


def _shown_error(*, fixed: bool) -> float:
    """Largest error of a table as the mean of what is shown for each of 7 tokens, in standard errors of that mean."""
    torch.manual_seed(0)
    config = TransformerConfig(vocab_size=7, dim=4, layers=1, hidden=4, attention=GQAConfig(num_heads=1))
    model = _Shown(config)
    objective = MaskedLM(model)
    tokens = torch.randint(7, (2000, 141), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        objective({"tokens": tokens, "targets": tokens.roll(-1, 1)})
        shown = model.shown[:, 1:].double().flatten(0, 1)
        table, mask = model.embedding.double(), objective.mask_token.double()
        expected = expected_embedding(table, mask) if fixed else table
    worst = 0.0
    for token, row in enumerate(expected):
        found = shown[tokens[:, 1:].flatten() == token]
        error = found.std(0) / len(found) ** 0.5
        worst = max(worst, float(((found.mean(0) - row) / error).abs().max()))
    return worst


def _shrinkage(random: float) -> float:
    """Distance of two rows of the table after the correction, over their distance before."""
    table = torch.randn(11, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    fixed = expected_embedding(table, table[3], masked=0.8, random=random)
    return float((fixed[0] - fixed[1]).norm() / (table[0] - table[1]).norm())


CLAIMS = (
    Claim(
        name="mean-of-the-shown",
        statement="error of the corrected table as the mean of what is shown, in standard errors; control: plain table",
        source="kexue.fm 8770: 0.865 E + 0.12 m + 0.015 mean(E)",
        expected=4.5,
        tolerance=at_most(),
        measure=lambda: _shown_error(fixed=True),
        control=lambda: _shown_error(fixed=False),
        seconds=1.0,
    ),
    Claim(
        name="shrinkage",
        statement="distance of two embeddings after the correction over before; control: no token shown as it is",
        source="derivation: 0.85 + 0.15 * 0.1 = 0.865",
        expected=0.865,
        tolerance=relative(1e-12),
        measure=lambda: _shrinkage(0.1),
        control=lambda: _shrinkage(0.2),
        seconds=0.1,
    ),
)
