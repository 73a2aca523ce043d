r"""Masked language modelling, seen as a dropout of the embeddings (Devlin et al., arXiv 1810.04805; kexue.fm 8770).

A token's embedding ``e`` is replaced by the mask's ``m`` at random: ``eps e + (1 - eps) m``. Switching a dropout off
puts its mean in the place of the noise, ``p e + (1 - p) m``; a masked language model that is used without masks is fed
``e`` instead. `expected_embedding` is the table that makes up for the difference.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from danlu._validate import integer, number
from danlu.models import Transformer
from danlu.nn import declare
from danlu.nn.balance import expert_load
from danlu.nn.cross_entropy import linear_cross_entropy
from danlu.objectives.causal_lm import check_drops
from danlu.objectives.drop_token import drop_tokens
from danlu.protocols import IGNORE, Batch, Measure


@dataclass(frozen=True, kw_only=True)
class MaskedLMConfig:
    """Which tokens are asked for, and what is shown in their place."""

    rate: float = 0.15
    """share of the tokens of a sequence that are asked for"""
    masked: float = 0.8
    """share of these that the mask stands for"""
    random: float = 0.1
    """share of these that a random token stands for; the rest are shown as they are"""
    chunk: int = 512
    """tokens whose logits are held at one time"""
    drop_tokens: float = 0.0
    """share of each sequence left out of a training step, see `danlu.objectives.drop_token`"""

    def __post_init__(self) -> None:
        number("rate", self.rate, low=0, high=1, low_open=True)
        for name in ("masked", "random"):
            number(name, getattr(self, name), low=0, high=1)
        if self.masked + self.random > 1 + 1e-12:
            raise ValueError(f"masked + random must be at most 1, got {self.masked} + {self.random}")
        integer("chunk", self.chunk)
        number("drop_tokens", self.drop_tokens, low=0, high=1, high_open=True)

    def build(self, model: Transformer, **others: Any) -> "MaskedLM":
        """Make the objective around a network that has ``hidden``, ``head_weight`` and ``embedding``."""
        return MaskedLM(model, self)


class MaskedLM(nn.Module):
    """Cross-entropy of tokens that are hidden, summed over them.

    A share ``rate`` of the tokens of each sequence is asked for: the same number every time, at least one, and never
    the first token, which opens the sequence. The mask's embedding is the objective's own ``mask_token``, so the
    vocabulary needs no place for it, and a random token is drawn evenly from the vocabulary.

    Args:
        model: the network, usually with ``mask="bidirectional"`` in its attention; held as ``self.model``.
        config: see `MaskedLMConfig`.

    A batch is that of `CausalLM`: ``tokens``, ``targets`` (which tell padding) and, where packed documents are to be
    masked apart, ``documents``.

    Raises:
        ValueError: tokens are to be dropped from a model with state spaces.

    >>> from danlu.models import TransformerConfig
    >>> from danlu.nn import GQAConfig
    >>> attention = GQAConfig(num_heads=2, mask="bidirectional")
    >>> model = Transformer(TransformerConfig(vocab_size=7, dim=16, layers=1, hidden=8, attention=attention))
    >>> tokens = torch.tensor([[1, 2, 3, 4, 5, 6, 1, 2]])
    >>> batch = {"tokens": tokens, "targets": tokens.roll(-1)}
    >>> objective = MaskedLM(model)
    >>> objective(batch).shape, objective.denominator(batch).item()
    (torch.Size([]), 1)
    """

    unit = "tokens"
    labels = {"val_accuracy": "accuracy", "max_vio": "imbalance"}  # noqa: RUF012

    def __init__(self, model: Transformer, config: MaskedLMConfig | None = None) -> None:
        super().__init__()
        self.model, self.config = model, MaskedLMConfig() if config is None else config
        if self.config.drop_tokens:
            check_drops(model)
        self.mask_token = nn.Parameter(torch.empty(model.config.dim))
        declare(self, "mask_token", "embedding")
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the mask's embedding like one of the table's."""
        nn.init.normal_(self.mask_token, std=self.model.config.dim**-0.5 if self.model.config.tied else 1.0)

    def forward(self, batch: Batch) -> Tensor:
        """Summed loss in nats, float32."""
        if not (self.training and self.config.drop_tokens):
            x_nd, wanted_n = self._predict(batch, None)
            return linear_cross_entropy(x_nd, self.model.head_weight, wanted_n, chunk=self.config.chunk)
        # What is asked for is chosen among the tokens that stay; a unit weighs the same at every rate.
        short = drop_tokens({**batch, "asked": askable(batch)}, self.config.drop_tokens)
        x_nd, wanted_n = self._predict(short, None)
        loss = linear_cross_entropy(x_nd, self.model.head_weight, wanted_n, chunk=self.config.chunk)
        return loss * (self.denominator(batch) / self.denominator(short).clamp_min(1))

    def denominator(self, batch: Batch) -> Tensor:
        """Number of tokens that are asked for, int64."""
        return self._share(askable(batch)).sum()

    def _share(self, askable_bt: Tensor) -> Tensor:
        """How many tokens of each sequence are asked for, ``(b,)``."""
        there = askable_bt.sum(1)
        return torch.where(there > 0, (self.config.rate * there).round().long().clamp_min(1), 0)

    def _predict(self, batch: Batch, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Hidden states where tokens are asked for, ``(n, dim)``, and these tokens, -100 where a row has fewer."""
        tokens_bt, askable_bt, config = batch["tokens"], askable(batch), self.config
        device, table = tokens_bt.device, self.model.embedding
        draw_bt = torch.rand(tokens_bt.shape, device=device, generator=generator).masked_fill(~askable_bt, 2.0)
        most = max(1, round(config.rate * (tokens_bt.shape[1] - 1)))
        asked_bk = draw_bt.topk(min(most, tokens_bt.shape[1]), dim=1, largest=False).indices
        beyond_bk = torch.arange(asked_bk.shape[1], device=device) >= self._share(askable_bt)[:, None]
        wanted_bk = tokens_bt.gather(1, asked_bk)
        fate_bk = torch.rand(asked_bk.shape, device=device, generator=generator).masked_fill(beyond_bk, 2.0)
        other_bk = torch.randint(table.shape[0], asked_bk.shape, device=device, generator=generator)
        swapped_bk = (fate_bk >= config.masked) & (fate_bk < config.masked + config.random)
        shown_bt = tokens_bt.scatter(1, asked_bk, torch.where(swapped_bk, other_bk, wanted_bk))
        masked_bt = torch.zeros_like(askable_bt).scatter(1, asked_bk, fate_bk < config.masked)
        x_btd = torch.where(masked_bt[..., None], self.mask_token, F.embedding(shown_bt, table))
        x_btd = self.model.hidden(x_btd, documents=batch.get("documents"), positions=batch.get("positions"))
        x_bkd = x_btd.gather(1, asked_bk[..., None].expand(-1, -1, x_btd.shape[-1]))
        return x_bkd.flatten(0, 1), wanted_bk.masked_fill(beyond_bk, IGNORE).flatten()

    def evaluate(self, batches: Iterable[Batch]) -> dict[str, Measure]:
        """Measure with the same masks every time: ``val_loss`` in nats per token that is asked for, and
        ``val_accuracy``, the share of these whose likeliest token is right.
        """
        device = self.model.embedding.device
        nats, right, asked = torch.zeros(3, dtype=torch.float64, device=device).unbind()
        generator = torch.Generator(device).manual_seed(0)
        for batch in batches:
            x_nd, wanted_n = self._predict(batch, generator)
            x_nd, wanted_n = x_nd[wanted_n != IGNORE], wanted_n[wanted_n != IGNORE]
            logits_nv = x_nd @ self.model.head_weight.to(x_nd.dtype).T
            nats += F.cross_entropy(logits_nv.float(), wanted_n, reduction="sum")
            right += (logits_nv.argmax(-1) == wanted_n).sum()
            asked += wanted_n.numel()
        return {"val_loss": Measure(nats, asked), "val_accuracy": Measure(right, asked)}

    def metrics(self) -> dict[str, float]:
        """Expert balance at the last optimizer step; empty for a dense model."""
        return expert_load(self.model)


def askable(batch: Batch) -> Tensor:
    """Booleans ``(batch, time)``: tokens that may be asked for, all but the first of a sequence and padding.

    >>> askable({"tokens": torch.tensor([[0, 5, 6, 1]]), "targets": torch.tensor([[5, 6, -100, -100]])}).int().tolist()
    [[0, 1, 1, 0]]
    """
    if "asked" in batch:
        return batch["asked"]
    return F.pad(batch["targets"][:, :-1] != IGNORE, (1, 0), value=False)


def expected_embedding(
    table_vd: Tensor, mask_d: Tensor, *, rate: float = 0.15, masked: float = 0.8, random: float = 0.1
) -> Tensor:
    r"""Mean of what a masked language model is shown for each token in training, ``(vocab, dim)``.

    ``(1 - r + r b) E_i + r a m + r c mean(E)`` with rate ``r``, shares ``a`` masked, ``c`` random and ``b = 1 - a - c``
    left: for BERT ``0.865 E_i + 0.12 m + 0.015 mean(E)``. It takes the place of the table once, before a fine-tuning
    without masks. A head that is tied to the table changes too. Source: kexue.fm 8770, which reports no significant
    change on CLUE for BERT and RoBERTa.

    Args:
        table_vd: embeddings E; where the mask is one of the tokens its row is changed like the others.
        mask_d: embedding m of the mask.
        rate, masked, random: as in `MaskedLMConfig`.

    Raises:
        ValueError: shapes that do not match, or shares out of range.

    >>> expected_embedding(torch.eye(2), torch.zeros(2))
    tensor([[0.8725, 0.0075],
            [0.0075, 0.8725]])
    """
    if table_vd.dim() != 2 or mask_d.shape != table_vd.shape[1:]:
        raise ValueError(
            f"table must be (vocab, dim) and mask (dim,), got {tuple(table_vd.shape)} and {tuple(mask_d.shape)}"
        )
    MaskedLMConfig(rate=rate, masked=masked, random=random)
    shown = 1 - rate + rate * (1 - masked - random)
    return shown * table_vd + rate * masked * mask_d + rate * random * table_vd.mean(0)
