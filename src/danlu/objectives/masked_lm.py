r"""Masked language modelling, seen as a dropout of the embeddings (Devlin et al., arXiv 1810.04805; kexue.fm 8770).

A token's embedding ``e`` is randomly replaced by the mask embedding ``m``: ``eps e + (1 - eps) m``. When dropout is
switched off, its mean ``p e + (1 - p) m`` takes the place of the noise; a masked language model used without masks gets
``e`` instead. `expected_embedding` returns the embedding table that corrects the difference.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from danlu._draws import integers, uniform
from danlu._validate import integer, number
from danlu.models import Transformer
from danlu.nn import declare
from danlu.nn.balance import expert_load, has_experts
from danlu.nn.cross_entropy import linear_cross_entropy
from danlu.objectives.causal_lm import check_drops, check_language_model
from danlu.objectives.draws import keys_of, numbered
from danlu.objectives.drop_token import drop_tokens
from danlu.protocols import IGNORE, Batch, Measure


@dataclass(frozen=True, kw_only=True)
class MaskedLMConfig:
    """Which tokens are predicted, and what the network reads in their place."""

    rate: float = 0.15
    """share of the tokens of a sequence that are predicted"""
    masked: float = 0.8
    """share of these that are replaced by the mask"""
    random: float = 0.1
    """share of these that are replaced by a random token; the rest are left unchanged"""
    chunk: int = 512
    """number of tokens whose logits are in memory at a time"""
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
    """Cross-entropy of masked tokens, summed over them.

    A share ``rate`` of the tokens of each sequence is predicted: the same number every time, at least one, and never
    the first token, which opens the sequence. The mask embedding is the objective's own parameter ``mask_token``, so
    the vocabulary needs no mask token; random tokens are drawn uniformly from the vocabulary.

    Args:
        model: the network, usually with ``mask="bidirectional"`` in its attention; held as ``self.model``.
        config: see `MaskedLMConfig`.

    A batch is that of `CausalLM`: ``tokens``, ``targets`` (which mark padding) and, for packed documents that must not
    attend to each other, ``documents``. A model with experts leaves padding out of their balance: tokens that ``real``
    says are none, or that are no target of their predecessors.

    Raises:
        ValueError: ``drop_tokens`` with a model with state spaces.

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
    scores = ("val_accuracy",)

    def __init__(self, model: Transformer, config: MaskedLMConfig | None = None) -> None:
        super().__init__()
        check_language_model(self, model)
        self.model, self.config = model, MaskedLMConfig() if config is None else config
        if self.config.drop_tokens:
            check_drops(model)
        self._experts = has_experts(model)
        self.mask_token = nn.Parameter(torch.empty(model.config.dim))
        declare(self, "mask_token", "embedding")
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the mask embedding as a row of the embedding table is."""
        nn.init.normal_(self.mask_token, std=self.model.config.dim**-0.5 if self.model.config.tied else 1.0)

    def forward(self, batch: Batch) -> Tensor:
        """Summed loss in nats, float32."""
        if not (self.training and self.config.drop_tokens):
            x_nd, wanted_n = self._predict(batch)
            return linear_cross_entropy(x_nd, self.model.head_weight, wanted_n, chunk=self.config.chunk)
        # The targets are chosen among the tokens that are kept; a target has the same weight at every drop rate.
        whole = {**batch, "asked": askable(batch), "real": _real(batch)}
        short = drop_tokens(whole, self.config.drop_tokens)
        x_nd, wanted_n = self._predict(short)
        loss = linear_cross_entropy(x_nd, self.model.head_weight, wanted_n, chunk=self.config.chunk)
        return loss * (self.denominator(batch) / self.denominator(short).clamp_min(1))

    def denominator(self, batch: Batch) -> Tensor:
        """Number of target tokens, int64."""
        return self._share(askable(batch)).sum()

    def _share(self, askable_bt: Tensor) -> Tensor:
        """Return how many tokens of each sequence are predicted, ``(b,)``."""
        there = askable_bt.sum(1)
        return torch.where(there > 0, (self.config.rate * there).round().long().clamp_min(1), 0)

    def _predict(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return hidden states at the target tokens, ``(n, dim)``, and these tokens, -100 where a row has fewer."""
        tokens_bt, askable_bt, config = batch["tokens"], askable(batch), self.config
        device, table = tokens_bt.device, self.model.embedding
        keys_b = keys_of(batch, tokens_bt)
        draw_bt = uniform(keys_b, "asked", tokens_bt.shape[1]).masked_fill(~askable_bt, 2.0)
        most = max(1, round(config.rate * (tokens_bt.shape[1] - 1)))
        asked_bk = draw_bt.topk(min(most, tokens_bt.shape[1]), dim=1, largest=False).indices
        beyond_bk = torch.arange(asked_bk.shape[1], device=device) >= self._share(askable_bt)[:, None]
        wanted_bk = tokens_bt.gather(1, asked_bk)
        fate_bk = uniform(keys_b, "fate", asked_bk.shape[1]).masked_fill(beyond_bk, 2.0)
        other_bk = integers(keys_b, "other", table.shape[0], asked_bk.shape[1])
        swapped_bk = (fate_bk >= config.masked) & (fate_bk < config.masked + config.random)
        shown_bt = tokens_bt.scatter(1, asked_bk, torch.where(swapped_bk, other_bk, wanted_bk))
        masked_bt = torch.zeros_like(askable_bt).scatter(1, asked_bk, fate_bk < config.masked)
        x_btd = torch.where(masked_bt[..., None], self.mask_token, F.embedding(shown_bt, table))
        padded: dict[str, Any] = {"real": _real(batch)} if self._experts else {}
        x_btd = self.model.hidden(x_btd, documents=batch.get("documents"), positions=batch.get("positions"), **padded)
        x_bkd = x_btd.gather(1, asked_bk[..., None].expand(-1, -1, x_btd.shape[-1]))
        return x_bkd.flatten(0, 1), wanted_bk.masked_fill(beyond_bk, IGNORE).flatten()

    def evaluate(self, batches: Iterable[Batch]) -> dict[str, Measure]:
        """Measure with the same masks for a row every time: ``val_loss`` in nats per target token, and
        ``val_accuracy``, the share of the targets whose most likely token is right.
        """
        device = self.model.embedding.device
        nats, right, asked = torch.zeros(3, dtype=torch.float64, device=device).unbind()
        for batch in numbered(batches):
            x_nd, wanted_n = self._predict(batch)
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
    """Return booleans ``(batch, time)``: tokens that may be targets, all but the first of a sequence and padding.

    >>> askable({"tokens": torch.tensor([[0, 5, 6, 1]]), "targets": torch.tensor([[5, 6, -100, -100]])}).int().tolist()
    [[0, 1, 1, 0]]
    """
    if "asked" in batch:
        return batch["asked"]
    return F.pad(batch["targets"][:, :-1] != IGNORE, (1, 0), value=False)


def _real(batch: Batch) -> Tensor:
    """Return booleans ``(batch, time)``: tokens that are no padding."""
    if "real" in batch:
        return batch["real"]
    asked_bt = batch["targets"] != IGNORE
    return torch.cat((asked_bt[:, :1], asked_bt[:, :-1]), dim=1)


def expected_embedding(
    table_vd: Tensor, mask_d: Tensor, *, rate: float = 0.15, masked: float = 0.8, random: float = 0.1
) -> Tensor:
    r"""Return the mean embedding that a masked language model reads for each token in training, ``(vocab, dim)``.

    ``(1 - r + r b) E_i + r a m + r c mean(E)`` with rate ``r``, shares ``a`` masked, ``c`` random and ``b = 1 - a - c``
    unchanged: for BERT ``0.865 E_i + 0.12 m + 0.015 mean(E)``. Replace the embedding table by it once, before
    fine-tuning without masks; a head that is tied to the table changes too. Source: kexue.fm 8770, which reports no
    significant change on CLUE for BERT and RoBERTa.

    Args:
        table_vd: embeddings E; if the mask is one of the tokens, its row is changed like the others.
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
