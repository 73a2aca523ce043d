"""Prediction of the next word and the next patch of sequences of text and images."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from danlu._validate import number
from danlu.models.text_image import TextImage
from danlu.nn.balance import has_experts
from danlu.nn.cross_entropy import linear_cross_entropy
from danlu.protocols import IGNORE, Batch, Measure


@dataclass(frozen=True, kw_only=True)
class CaptioningConfig:
    """How words and patches are weighted."""

    patch_weight: float = 10.0
    """weight of a patch's mean squared error relative to a word's cross-entropy in nats"""

    def build(self, model: TextImage, **others: Any) -> "Captioning":
        """Make the objective around a network of text and images."""
        return Captioning(model, self)


class Captioning(nn.Module):
    """Cross-entropy of the next word plus weighted squared error of the next patch, summed over the targets.

    A batch is what `danlu.data.captions` yields: ``tokens``, ``patches``, ``grid``, ``targets``, ``draws`` and, for the
    balance of experts, ``real``.

    Args:
        model: the network; held as ``self.model``.
        config: see `CaptioningConfig`.

    Raises:
        ValueError: a negative weight.
    """

    unit = "words and patches"
    labels = {"val_caption_accuracy": "captions right"}  # noqa: RUF012
    scores = ("val_caption_accuracy", "val_word_accuracy")

    def __init__(self, model: TextImage, config: CaptioningConfig | None = None) -> None:
        super().__init__()
        self.model, self.config = model, CaptioningConfig() if config is None else config
        self._experts = has_experts(model)
        number("patch_weight", self.config.patch_weight, low=0)

    def forward(self, batch: Batch) -> Tensor:
        """Summed loss, float32."""
        x_btd = self._hidden(batch)
        words = linear_cross_entropy(x_btd, self.model.head_weight, batch["targets"])
        return words + self.config.patch_weight * self._squares(x_btd, batch).mean(-1).sum()

    def _hidden(self, batch: Batch) -> Tensor:
        real = batch.get("real") if self._experts else None
        return self.model.read(batch["tokens"], batch["patches"], batch["grid"], real=real)

    def _squares(self, x_btd: Tensor, batch: Batch) -> Tensor:
        """Return squared errors of the next patches ``(batch, time, values)``, zero where there is no patch target."""
        wanted = batch["patches"].roll(-1, 1)
        found: Tensor = self.model.patch_out(x_btd)
        return (found.float() - wanted).square() * batch["draws"][..., None]

    def denominator(self, batch: Batch) -> Tensor:
        """Number of target words and patches, int64."""
        return (batch["targets"] != IGNORE).sum() + batch["draws"].sum()

    def evaluate(self, batches: Iterable[Batch]) -> dict[str, Measure]:
        """Measure the loss and accuracies; a measure without examples in the batches is left out.

        ``val_loss`` is the loss per target word or patch; ``val_caption_accuracy`` the share of captions in which every
        word is the most likely one, as in greedy decoding; ``val_word_accuracy`` the share of their words that are;
        ``val_patch_error`` the squared error of patches over that of predicting each pixel's mean: 1 means that
        nothing about the image is predicted.
        """
        device = self.model.embedding.device
        sums = torch.zeros(7, dtype=torch.float64, device=device)
        moments = torch.zeros(3, self.model.patch_out.out_features, dtype=torch.float64, device=device)
        for batch in batches:
            x_btd = self._hidden(batch)
            targets, draws, squares = batch["targets"], batch["draws"], self._squares(x_btd, batch)
            words = linear_cross_entropy(x_btd, self.model.head_weight, targets)
            logits = x_btd @ self.model.head_weight.to(x_btd.dtype).T
            asked = (targets != IGNORE) & ~draws.any(-1, keepdim=True)
            right = (logits.argmax(-1) == targets) & asked
            captions = asked.any(-1)
            sums += torch.stack(
                [
                    (words + self.config.patch_weight * squares.mean(-1).sum()).double(),
                    self.denominator(batch).double(),
                    captions.sum().double(),
                    (captions & (right == asked).all(-1)).sum().double(),
                    asked.sum().double(),
                    right.sum().double(),
                    squares.sum().double(),
                ]
            )
            wanted = batch["patches"].roll(-1, 1).double() * draws[..., None]
            moments[0] += draws.sum()
            moments[1] += wanted.sum((0, 1))
            moments[2] += wanted.square().sum((0, 1))
        loss, targets, captions, complete, words, right, error = sums.unbind()
        return {
            "val_loss": Measure(loss, targets),
            "val_caption_accuracy": Measure(complete, captions),
            "val_word_accuracy": Measure(right, words),
            "val_patch_error": Measure(error, moments, _over_spread),
        }

    def metrics(self) -> dict[str, float]:
        """Return further metrics of the last batch: none."""
        return {}


def _over_spread(error: Tensor, moments_3p: Tensor) -> Tensor | None:
    """Return the squared error over that of predicting each value's mean; None if all values are equal."""
    count, first, second = moments_3p
    spread = (second - first.square() / count.clamp_min(1)).sum()
    return error / spread if spread > 0 else None
