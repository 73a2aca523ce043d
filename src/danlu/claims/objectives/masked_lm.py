"""Masked language modelling as dropout: what a model is shown on average, and how far from it the plain table is."""

import math

import torch
from torch import Tensor

from danlu.claims.frame import Claim, at_most, relative
from danlu.models import Transformer, TransformerConfig
from danlu.nn import GQAConfig
from danlu.objectives import MaskedLM, MaskedLMConfig, drop_tokens, expected_embedding
from danlu.objectives.masked_lm import askable


class _Shown(Transformer):
    """A network whose hidden states are what it is shown."""

    def hidden(self, tokens_bt: Tensor, **_: object) -> Tensor:
        self.shown = tokens_bt
        return tokens_bt


def _shown_error(*, uniform: bool) -> float:
    """Largest error of a table as the mean of what is shown for each of 7 tokens, in standard errors of that mean.

    The control takes random tokens for unchanged ones.
    """
    config = TransformerConfig(vocab_size=7, dim=4, layers=1, hidden=4, attention=GQAConfig(num_heads=1))
    tokens = torch.randint(7, (2000, 141), generator=torch.Generator().manual_seed(1))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = _Shown(config)
        objective = MaskedLM(model)
        objective({"tokens": tokens, "targets": tokens.roll(-1, 1)})
        shown = model.shown[:, 1:].double().flatten(0, 1)
        table, mask = model.embedding.double(), objective.mask_token.double()
        expected = expected_embedding(table, mask, random=0.1 if uniform else 0.0)
    worst = 0.0
    for token, row in enumerate(expected):
        found = shown[tokens[:, 1:].flatten() == token]
        error = found.std(0) / len(found) ** 0.5
        worst = max(worst, float(((found.mean(0) - row) / error).abs().max()))
    return worst


def _even_loss(*, weighted: bool = True) -> float:
    """Loss of a network that finds all 13 tokens equally likely, over its targets' number times ln 13.

    Times the same in evaluation. Half of each sequence is left out of the step, two thirds of one are padding; the
    control weighs what is left.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        attention = GQAConfig(num_heads=1, mask="bidirectional")
        model = Transformer(TransformerConfig(vocab_size=13, dim=4, layers=1, hidden=4, attention=attention))
        torch.nn.init.zeros_(model.head_weight)
        objective = MaskedLM(model, MaskedLMConfig(drop_tokens=0.5))
        tokens = torch.randint(13, (3, 61))
        targets = tokens.roll(-1, 1)
        targets[0, 20:] = -100
        batch = {"tokens": tokens, "targets": targets}
        # 0.15 of 60, 60 and 20 tokens that may be asked for.
        number = 9 + 9 + 3
        with torch.no_grad():
            measured = objective.evaluate([batch])["val_loss"]
        loss = float(objective(batch).detach()) * float(measured.total / measured.denominator) / math.log(13)
        if not weighted:
            short = drop_tokens({**batch, "asked": askable(batch)}, 0.5)
            loss *= float(objective.denominator(short) / objective.denominator(batch))
    return loss / number / math.log(13)


def _shrinkage(random: float) -> float:
    """Distance of two rows of the table after the correction, over their distance before."""
    table = torch.randn(11, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    fixed = expected_embedding(table, table[3], masked=0.8, random=random)
    return float((fixed[0] - fixed[1]).norm() / (table[0] - table[1]).norm())


CLAIMS = (
    Claim(
        name="mean-of-the-shown",
        statement="error of the corrected table as the mean shown, in standard errors; control: no random tokens",
        source="kexue.fm 8770: 0.865 E + 0.12 m + 0.015 mean(E)",
        expected=2.5,
        tolerance=at_most(),
        measure=lambda: _shown_error(uniform=True),
        control=lambda: _shown_error(uniform=False),
        seconds=0.4,
    ),
    Claim(
        name="even-loss",
        statement="loss of an even prediction over its targets times ln 13, half left out; control: not weighed up",
        source="derivation: a target has one weight whatever is left out",
        expected=1,
        tolerance=relative(1e-6),
        measure=_even_loss,
        control=lambda: _even_loss(weighted=False),
        seconds=0.1,
    ),
    Claim(
        name="shrinkage",
        statement="distance of two embeddings after the correction over before; control: no token shown as it is",
        source="derivation: 0.85 + 0.15 * 0.1 = 0.865",
        expected=0.865,
        tolerance=relative(1e-15),
        measure=lambda: _shrinkage(0.1),
        control=lambda: _shrinkage(0.2),
        seconds=0.1,
    ),
)
