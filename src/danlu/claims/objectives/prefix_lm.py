"""Prefix language modelling: nothing that is asked for is shown, and prefixes of every length are as frequent."""

import math

import torch

from danlu.claims.frame import Claim, absolute
from danlu.models import TransformerConfig
from danlu.nn import GQAConfig
from danlu.objectives import PrefixLM, evaluate, prefix_lengths
from danlu.protocols import Batch

_VOCAB, _TIME = 8, 8


class _OneTooEarly(PrefixLM):
    """Asks for the last token of the prefix too, which the token before it has seen."""

    def asked(self, batch: Batch) -> Batch:
        asked = dict(super().asked(batch))
        last = torch.arange(_TIME) == prefix_lengths(batch["tokens"])[:, None] - 2
        asked["targets"] = torch.where(last, batch["targets"], asked["targets"])
        return asked


def _random(rows: int, seed: int) -> Batch:
    text = torch.randint(_VOCAB, (rows, _TIME + 1), generator=torch.Generator().manual_seed(seed))
    return {"tokens": text[:, :-1], "targets": text[:, 1:]}


def _loss_on_random_tokens(kind: type[PrefixLM]) -> float:
    """Loss of what follows the prefix after training on tokens that nothing can predict."""
    torch.manual_seed(0)
    attention = GQAConfig(num_heads=2, mask="prefix")
    objective = kind(TransformerConfig(vocab_size=_VOCAB, dim=32, layers=1, hidden=32, attention=attention).build())
    optimizer = torch.optim.Adam(objective.parameters(), lr=1e-2)
    for step in range(150):
        batch = _random(64, step)
        (objective(batch) / objective.denominator(batch)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return evaluate(objective, [_random(4096, -1)])["val_loss"]


def _mean_length(*, off: int) -> float:
    """Mean length of 100,000 prefixes, in windows; ``off`` is added to each."""
    tokens = torch.randint(4096, (100_000, 16), generator=torch.Generator().manual_seed(0))
    return float((prefix_lengths(tokens) + off).double().mean()) / 16


CLAIMS = (
    Claim(
        name="nothing-is-shown",
        statement="nats a token on random tokens after training; control: the prefix's last token asked for too",
        source="definition: ln 8, for the loss counts only what no token that predicts it has seen",
        expected=math.log(_VOCAB),
        tolerance=absolute(0.02),
        measure=lambda: _loss_on_random_tokens(PrefixLM),
        control=lambda: _loss_on_random_tokens(_OneTooEarly),
        seconds=3.5,
    ),
    Claim(
        name="every-length",
        statement="mean length of a prefix over the window's 16 tokens; control: lengths counted from 0",
        source="derivation: uniform from 1 to 16, 8.5 / 16",
        expected=8.5 / 16,
        tolerance=absolute(0.004),
        measure=lambda: _mean_length(off=0),
        control=lambda: _mean_length(off=-1),
        seconds=0.2,
    ),
)
