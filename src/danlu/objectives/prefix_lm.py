r"""Prefix language modelling: a known beginning that is read from both sides, and the loss of what follows it.

UniLM (Dong et al., arXiv 1905.03197) and the prefix language model of T5 (Raffel et al., 1910.10683): under the mask
"prefix" the first ``m`` tokens of a row see one another, the others what is before them. Next to a model with the mask
"causal" and the same loss it is the controlled comparison of kexue.fm 9529: what is trained, read and asked for is the
same, and the mask alone differs.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from danlu._draws import mixed64, shifted
from danlu.models import GPT, Transformer
from danlu.objectives.causal_lm import CausalLM, CausalLMConfig, byte_lengths_of
from danlu.protocols import IGNORE, Batch, Data

__all__ = ["PrefixLM", "PrefixLMConfig", "prefix_lengths"]


@dataclass(frozen=True, kw_only=True)
class PrefixLMConfig(CausalLMConfig):
    """How the loss of what follows a prefix is computed."""

    def build(self, model: Transformer | GPT, *, data: Data | None = None, **others: Any) -> "PrefixLM":
        """Make the objective around a network that has ``hidden`` and ``head_weight``.

        Raises:
            TypeError: ``data`` has no attribute ``byte_lengths``.
        """
        return PrefixLM(model, self, byte_lengths=byte_lengths_of(data))


class PrefixLM(CausalLM):
    """Cross-entropy of the next token, summed over the tokens behind a prefix.

    The length of a row's prefix is `prefix_lengths` of its tokens, in training and in evaluation: a model with the mask
    "prefix" and one with the mask "causal" are asked for the same tokens, whatever trained them. The last token of the
    prefix predicts the first one behind it; targets before are ignored, for a prefix shows them to itself. Documents
    that begin behind the prefix are read as by a causal model.

    Arguments, batches and measures are those of `CausalLM`; ``val_loss`` and ``val_bpb`` are of the text behind the
    prefixes.

    Raises:
        ValueError: a layer's mask shows the token to be predicted.

    >>> from danlu.models import TransformerConfig
    >>> from danlu.nn import GQAConfig
    >>> attention = GQAConfig(num_heads=2, mask="prefix")
    >>> objective = PrefixLM(TransformerConfig(vocab_size=7, dim=16, layers=1, hidden=8, attention=attention).build())
    >>> text = torch.tensor([[3, 4, 5, 6, 0, 1]])
    >>> batch = {"tokens": text[:, :-1], "targets": text[:, 1:]}
    >>> prefix_lengths(batch["tokens"]).item(), objective.asked(batch)["targets"].tolist()
    (3, [[-100, -100, 6, 0, 1]])
    """

    masks: ClassVar[tuple[str, ...]] = ("prefix", "causal")

    def asked(self, batch: Batch) -> Batch:
        """Return the batch with targets behind the prefix only and, for a model that takes it, the ``prefix``."""
        tokens_bt = batch["tokens"]
        known_bt = torch.arange(tokens_bt.shape[1], device=tokens_bt.device) < prefix_lengths(tokens_bt)[:, None]
        # A token whose successor is in the prefix as well has seen it.
        shown_bt = torch.cat((known_bt[:, 1:], torch.zeros_like(known_bt[:, :1])), dim=1)
        asked = {**batch, "targets": batch["targets"].masked_fill(shown_bt, IGNORE)}
        if any(mixer.mask == "prefix" for mixer in self.model.mixers):
            asked["prefix"] = known_bt
        return asked


def prefix_lengths(tokens_bt: Tensor) -> Tensor:
    """Return how many first tokens of each row are its prefix, int64 ``(batch,)``, uniform from 1 to ``time``.

    A hash of the row itself: the same row has the same prefix in every process, micro-batch, resumed run and
    evaluation, and there is no generator whose state could differ. Which rows a run reads follows from its seed.

    Args:
        tokens_bt: token numbers, int64 ``(batch, time)``.

    >>> rows = torch.arange(12).view(2, 6)
    >>> torch.equal(prefix_lengths(rows)[1:], prefix_lengths(rows[1:]))
    True
    """
    time = tokens_bt.shape[1]
    places_t = mixed64(torch.arange(1, time + 1, device=tokens_bt.device))
    words_b = mixed64(mixed64(tokens_bt + places_t).sum(1))
    return 1 + (shifted(words_b, 33) * time >> 31)
