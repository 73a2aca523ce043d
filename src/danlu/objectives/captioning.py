"""Next word and next patch of sequences of text and images."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from danlu._validate import number
from danlu.models.text_image import TextImage
from danlu.nn.cross_entropy import linear_cross_entropy
from danlu.protocols import IGNORE


@dataclass(frozen=True, kw_only=True)
class CaptioningConfig:
    """How words and patches are weighed."""

    patch_weight: float = 10.0
    """a patch's mean squared error counts so many times what a nat of a word does"""


class Captioning(nn.Module):
    """Cross-entropy of the next word plus squared error of the next patch, summed over where they are asked for.

    A batch is what `danlu.data.captions` yields: ``tokens``, ``patches``, ``grid``, ``targets``, ``draws``.

    Args:
        model: the network; held as ``self.model``.
        config: see `CaptioningConfig`.

    Raises:
        ValueError: a negative weight.
    """

    def __init__(self, model: TextImage, config: CaptioningConfig | None = None) -> None:
        super().__init__()
        self.model, self.config = model, CaptioningConfig() if config is None else config
        number("patch_weight", self.config.patch_weight, low=0)

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Summed loss, float32."""
        x_btd = self.model.read(batch["tokens"], batch["patches"], batch["grid"])
        words = linear_cross_entropy(x_btd, self.model.head_weight, batch["targets"])
        return words + self.config.patch_weight * self._squares(x_btd, batch).mean(-1).sum()

    def _squares(self, x_btd: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Squared errors of the next patches, zero where none is asked for, ``(batch, time, values)``."""
        wanted = batch["patches"].roll(-1, 1)
        found: Tensor = self.model.patch_out(x_btd)
        return (found.float() - wanted).square() * batch["draws"][..., None]

    def count(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Number of words and patches that are asked for, int64."""
        return (batch["targets"] != IGNORE).sum() + batch["draws"].sum()

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Mapping[str, Tensor]]) -> dict[str, float]:
        """Measures over ``batches``.

        ``val_loss`` is the loss a unit; ``val_caption_accuracy`` the share of captions whose every word is the
        likeliest one, which is what greedy decoding writes; ``val_word_accuracy`` the share of their words;
        ``val_patch_error`` the squared error of patches over that of predicting each pixel's mean: 1 is to know nothing
        of the image. What the batches have no example of is left out.

        Raises:
            ValueError: nothing is asked for.
        """
        was_training = self.training
        self.eval()
        device = self.model.embedding.device
        # loss, units, captions, whole captions, words, right words, squared error
        sums = torch.zeros(7, dtype=torch.float64, device=device)
        moments = torch.zeros(3, self.model.patch_out.out_features, dtype=torch.float64, device=device)
        try:
            for batch in batches:
                x_btd = self.model.read(batch["tokens"], batch["patches"], batch["grid"])
                targets, draws, squares = batch["targets"], batch["draws"], self._squares(x_btd, batch)
                words = linear_cross_entropy(x_btd, self.model.head_weight, targets)
                logits = x_btd @ self.model.head_weight.to(x_btd.dtype).T
                asked = (targets != IGNORE) & ~draws.any(-1, keepdim=True)
                right = (logits.argmax(-1) == targets) & asked
                captions = asked.any(-1)
                sums += torch.stack(
                    [
                        (words + self.config.patch_weight * squares.mean(-1).sum()).double(),
                        self.count(batch).double(),
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
        finally:
            self.train(was_training)
        loss, units, captions_seen, whole, words_asked, words_right, error = sums.tolist()
        if not units:
            raise ValueError("batches must ask for at least one word or patch, got none")
        found = {"val_loss": loss / units}
        if captions_seen:
            found |= {"val_caption_accuracy": whole / captions_seen, "val_word_accuracy": words_right / words_asked}
        spread = (moments[2] - moments[1].square() / moments[0].clamp_min(1)).sum().item()
        if spread > 0:
            found["val_patch_error"] = error / spread
        return found

    def metrics(self) -> dict[str, float]:
        """Nothing beside the loss."""
        return {}
