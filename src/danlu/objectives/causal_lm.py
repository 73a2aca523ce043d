"""Next-token prediction."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from danlu._validate import integer, number
from danlu.models import GPT, Transformer
from danlu.nn.balance import expert_load, has_experts, max_violation, watching
from danlu.nn.cross_entropy import linear_cross_entropy
from danlu.objectives.drop_token import drop_tokens
from danlu.protocols import IGNORE, Batch, Data, LanguageModel, Measure, TokenData


@dataclass(frozen=True, kw_only=True)
class CausalLMConfig:
    """How the next-token loss is computed."""

    chunk: int = 512
    """number of tokens whose logits are in memory at a time"""
    drop_tokens: float = 0.0
    """share of each sequence left out of a training step, see `danlu.objectives.drop_token`"""
    z_loss: float = 0.0
    """factor of ``log^2 Z``, added in training to keep logits from drifting (PaLM, arXiv 2204.02311, uses 1e-4)"""

    def __post_init__(self) -> None:
        integer("chunk", self.chunk)
        number("drop_tokens", self.drop_tokens, low=0, high=1, high_open=True)
        number("z_loss", self.z_loss, low=0)

    def build(self, model: Transformer | GPT, *, data: Data | None = None, **others: Any) -> "CausalLM":
        """Make the objective around a network that has ``hidden`` and ``head_weight``.

        Raises:
            TypeError: ``data`` has no attribute ``byte_lengths``.
        """
        return CausalLM(model, self, byte_lengths=byte_lengths_of(data))


class CausalLM(nn.Module):
    """Cross-entropy of the next token, summed over the tokens that have a target.

    Args:
        model: the network; held as ``self.model``.
        config: see `CausalLMConfig`.
        byte_lengths: int64 ``(vocab,)``, bytes of text each token stands for; with it `evaluate` gives bits per byte.

    A batch is a mapping with ``tokens`` and ``targets`` ``(batch, time)`` int64 and, for packed documents that must not
    attend to each other, ``documents``. A model with experts is given booleans ``real`` ``(batch, time)``, too, if a
    batch has them: what is False is padding, and no part of their balance. A target of -100 alone does not say so:
    tokens of a prompt have none either. Where tokens are dropped, the loss of the remaining targets is multiplied by
    tokens over remaining tokens, so that a target has the same weight at every drop rate.

    Raises:
        ValueError: a layer's mask shows the token to be predicted, or ``drop_tokens`` is asked of a model with layers
            whose time is the number of tokens read.

    >>> from danlu.models import TransformerConfig
    >>> objective = CausalLM(Transformer(TransformerConfig(vocab_size=7, dim=16, layers=1, hidden=8)))
    >>> batch = {"tokens": torch.tensor([[1, 2, 3]]), "targets": torch.tensor([[2, 3, -100]])}
    >>> objective(batch).shape, objective.denominator(batch).item()
    (torch.Size([]), 2)
    """

    unit = "tokens"
    labels: Mapping[str, str] = {"val_bpb": "bits/byte", "max_vio": "imbalance"}

    masks: ClassVar[tuple[str, ...]] = ("causal",)
    """masks of attention under which nothing shows the tokens that the loss asks for"""

    byte_lengths: Tensor | None

    def __init__(
        self, model: Transformer | GPT, config: CausalLMConfig | None = None, *, byte_lengths: Tensor | None = None
    ) -> None:
        super().__init__()
        config = CausalLMConfig() if config is None else config
        check_language_model(self, model)
        _check_masks(model, self.masks)
        if config.drop_tokens:
            check_drops(model)
        self.model, self.config = model, config
        self._read = ("documents", "positions", "prefix", *(("real",) if has_experts(model) else ()))
        # A property of the tokenizer, not of the training: it is not saved with the weights.
        self.register_buffer("byte_lengths", byte_lengths, persistent=False)

    def forward(self, batch: Batch) -> Tensor:
        """Summed loss in nats, float32."""
        batch = self.asked(batch)
        if not (self.training and self.config.drop_tokens):
            return self._loss(batch)
        short = drop_tokens(batch, self.config.drop_tokens)
        return self._loss(short) * (batch["tokens"].shape[1] / short["tokens"].shape[1])

    def asked(self, batch: Batch) -> Batch:
        """Return the batch with the targets that count: here all of them."""
        return batch

    def _loss(self, batch: Batch) -> Tensor:
        # What a batch does not have is not an argument either: not every model knows prefixes.
        read: dict[str, Any] = {name: batch[name] for name in self._read if name in batch}
        x_btd = self.model.hidden(batch["tokens"], **read)
        z_loss = self.config.z_loss if self.training else 0.0  # evaluation measures the cross-entropy alone
        return linear_cross_entropy(
            x_btd, self.model.head_weight, batch["targets"], chunk=self.config.chunk, z_loss=z_loss
        )

    def denominator(self, batch: Batch) -> Tensor:
        """Number of tokens with a target, int64."""
        return _count(self.asked(batch)["targets"])

    def evaluate(self, batches: Iterable[Batch]) -> dict[str, Measure]:
        """Measure the loss over ``batches``.

        ``val_loss`` is in nats per token, ``val_bpb`` in bits per byte of text, and ``val_max_vio`` of a model with
        experts is the MaxVio of the load over all of ``batches``, averaged over layers.
        """
        device = self.model.embedding.device
        nats, tokens, size = torch.zeros(3, dtype=torch.float64, device=device).unbind()
        with watching(self.model) as loads:
            for batch in batches:
                nats += self(batch)
                targets = self.asked(batch)["targets"]
                tokens += _count(targets)
                if self.byte_lengths is not None:
                    size += self.byte_lengths[targets[targets != IGNORE]].sum()
        found = {"val_loss": Measure(nats, tokens), "val_bpb": Measure(nats, size, _bits)}
        if loads:
            found["val_max_vio"] = Measure(torch.stack(loads), tokens, _mean_violation)
        return found

    def metrics(self) -> dict[str, float]:
        """Expert balance at the last optimizer step; empty for a dense model."""
        return expert_load(self.model)


def byte_lengths_of(data: Data | None) -> Tensor | None:
    """Return the bytes that each token of ``data`` stands for, int64 ``(vocab,)``; None without data or text.

    Raises:
        TypeError: ``data`` has no attribute ``byte_lengths``.
    """
    if data is None:
        return None
    if not isinstance(data, TokenData):
        kind = type(data).__name__
        raise TypeError(f"data must have byte_lengths (None for tokens that are not text), and {kind} has none")
    return data.byte_lengths


def _count(targets_bt: Tensor) -> Tensor:
    return (targets_bt != IGNORE).sum()


def _bits(nats: Tensor, size: Tensor) -> Tensor:
    return nats / size / math.log(2)


def _mean_violation(loads_le: Tensor, tokens: Tensor) -> Tensor:
    return max_violation(loads_le).mean()


def check_language_model(objective: nn.Module, model: object) -> None:
    """Raise TypeError unless ``model`` gives hidden states of tokens."""
    if not isinstance(model, LanguageModel):
        kind, found = type(objective).__name__, type(model).__name__
        raise TypeError(f"model must be a language model (hidden, head_weight, embedding) for {kind}, got {found}")


def _check_masks(model: Transformer | GPT, masks: tuple[str, ...]) -> None:
    """Raise unless no layer shows a token the one after it: a loss of next tokens would then be near zero for nothing.

    With the mask "prefix" and no prefix a model is causal: that is refused as well, for nobody asks for it.
    """
    for index, mixer in enumerate(model.mixers):
        if mixer.mask is None or mixer.mask in masks:
            continue
        wanted = " or ".join(map(repr, masks))
        why = "shows the token to be predicted" if mixer.mask != "prefix" else "PrefixLMConfig (prefix-lm) trains"
        raise ValueError(
            f"mask must be {wanted} for next-token prediction, got {mixer.mask!r} in block {index}, which {why}"
        )


def check_drops(model: Transformer | GPT) -> None:
    """Raise unless leaving a token out of ``model``'s input is the same as masking its column in every layer."""
    for mixer in model.mixers:
        if mixer.mask is None:
            kind = type(mixer).__name__
            raise ValueError(f"drop_tokens must be 0 for a model with {kind}, whose time is the number of tokens read")
