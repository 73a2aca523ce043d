"""Next-token prediction."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from danlu._validate import integer, number
from danlu.models import GPT, Transformer
from danlu.nn import SSM
from danlu.nn.balance import expert_load, max_violation, watching
from danlu.nn.cross_entropy import linear_cross_entropy
from danlu.objectives.drop_token import drop_tokens
from danlu.protocols import IGNORE


@dataclass(frozen=True, kw_only=True)
class CausalLMConfig:
    """How the next-token loss is computed."""

    chunk: int = 512
    """tokens whose logits are held at one time"""
    drop_tokens: float = 0.0
    """share of each sequence left out of a training step, see `danlu.objectives.drop_token`"""
    z_loss: float = 0.0
    """factor on ``log^2 Z``, added in training to keep logits from drifting (PaLM, arXiv 2204.02311, has 1e-4)"""

    def __post_init__(self) -> None:
        integer("chunk", self.chunk)
        number("drop_tokens", self.drop_tokens, low=0, high=1, high_open=True)
        number("z_loss", self.z_loss, low=0)


class CausalLM(nn.Module):
    """Cross-entropy of the next token, summed over the tokens that have a target.

    Args:
        model: the network; held as ``self.model``.
        config: see `CausalLMConfig`.
        byte_lengths: int64 ``(vocab,)``, bytes of text each token stands for; with it `evaluate` gives bits per byte.

    A batch is a mapping with ``tokens`` and ``targets`` ``(batch, time)`` int64 and, where packed documents are to be
    masked apart, ``documents``. Where tokens are dropped, the mean over the targets that stay stands for all: the sum
    is scaled by how many there were, so that a unit weighs the same at every rate.

    Raises:
        ValueError: tokens are to be dropped from a model with state spaces, which count time by the tokens they read.

    >>> from danlu.models import TransformerConfig
    >>> objective = CausalLM(Transformer(TransformerConfig(vocab_size=7, dim=16, layers=1, hidden=8)))
    >>> batch = {"tokens": torch.tensor([[1, 2, 3]]), "targets": torch.tensor([[2, 3, -100]])}
    >>> objective(batch).shape, objective.count(batch).item()
    (torch.Size([]), 2)
    """

    byte_lengths: Tensor | None

    def __init__(
        self, model: Transformer | GPT, config: CausalLMConfig | None = None, *, byte_lengths: Tensor | None = None
    ) -> None:
        super().__init__()
        config = CausalLMConfig() if config is None else config
        if config.drop_tokens:
            check_drops(model)
        self.model, self.config = model, config
        # A property of the tokenizer, not of the training: it is not saved with the weights.
        self.register_buffer("byte_lengths", byte_lengths, persistent=False)

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Summed loss in nats, float32."""
        if not (self.training and self.config.drop_tokens):
            return self._loss(batch)
        short = drop_tokens(batch, self.config.drop_tokens)
        return self._loss(short) * (self.count(batch) / self.count(short).clamp_min(1))

    def _loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        x_btd = self.model.hidden(batch["tokens"], documents=batch.get("documents"), positions=batch.get("positions"))
        z_loss = self.config.z_loss if self.training else 0.0  # what is evaluated stays the loss alone
        return linear_cross_entropy(
            x_btd, self.model.head_weight, batch["targets"], chunk=self.config.chunk, z_loss=z_loss
        )

    def count(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Number of tokens with a target, int64."""
        return (batch["targets"] != IGNORE).sum()

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Mapping[str, Tensor]]) -> dict[str, float]:
        """Mean loss over ``batches``: ``val_loss`` in nats a token, ``val_bpb`` in bits a byte of text, and for
        experts ``val_max_vio``, the MaxVio of the load over all of ``batches``, averaged over layers.

        With several processes each brings its own batches, and all get the mean over those of all.

        Raises:
            ValueError: no token has a target.
        """
        was_training = self.training
        self.eval()
        device = self.model.embedding.device
        sums = torch.zeros(3, dtype=torch.float64, device=device)  # nats, tokens, bytes
        try:
            with watching(self.model) as loads:
                for batch in batches:
                    sums[0] += self(batch)
                    sums[1] += self.count(batch)
                    if self.byte_lengths is not None:
                        targets = batch["targets"]
                        sums[2] += self.byte_lengths[targets[targets != IGNORE]].sum()
        finally:
            self.train(was_training)
        if dist.is_available() and dist.is_initialized():
            for total in (sums, *loads):
                dist.all_reduce(total)
        nats, tokens, size = sums.tolist()
        if not tokens:
            raise ValueError("batches must hold at least one token with a target, got none")
        result = {"val_loss": nats / tokens}
        if size:
            result["val_bpb"] = nats / size / math.log(2)
        if loads:
            result["val_max_vio"] = torch.stack([max_violation(load) for load in loads]).mean().item()
        return result

    def metrics(self) -> dict[str, float]:
        """Expert balance at the last optimizer step; empty for a dense model."""
        return expert_load(self.model)


def check_drops(model: nn.Module) -> None:
    """Raise unless leaving a token out of ``model``'s input is masking its column in every layer."""
    if any(isinstance(module, SSM) for module in model.modules()):
        raise ValueError("drop_tokens must be 0 for a model with state spaces: they count time by the tokens they read")
