"""Masked autoencoding: predict the pixels of hidden patches from the visible ones."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from danlu._validate import number
from danlu.models.mae import MAE
from danlu.objectives._images import ImageObjective
from danlu.objectives.drop_token import kept_tokens
from danlu.protocols import Batch


@dataclass(frozen=True, kw_only=True)
class MaskedImageConfig:
    """Which patches are hidden, and what is predicted for them."""

    mask: float = 0.75
    """share of the patches that are hidden"""
    normalise: bool = True
    """predict each patch normalised by its own mean and standard deviation"""

    def __post_init__(self) -> None:
        number("mask", self.mask, low=0, high=1, low_open=True, high_open=True)

    def build(self, model: MAE, **others: Any) -> "MaskedImage":
        """Make the objective around a network; see :class:`MaskedImage` for its arguments."""
        return MaskedImage(model, self)


class MaskedImage(ImageObjective):
    """Mean squared error of the pixels of the hidden patches, summed over images.

    Patches are hidden at random, the same number in each image; visible patches do not enter the loss. With
    ``normalise`` the target of a patch is ``(pixels - mean) / sqrt(variance + 1e-6)``: then predicting zero costs 1 per
    image without blank patches (the target of a blank patch is zero). Source: He et al., arXiv 2111.06377, sections 3
    and 4.1.

    Args:
        model: the network; held as ``self.model``.
        config: see `MaskedImageConfig`.

    A batch is a mapping with ``images`` ``(b, c, h, w)``.

    >>> from danlu.models import MAEConfig
    >>> model = MAE(MAEConfig(image_size=8, dim=16, layers=1, num_heads=2, decoder_dim=8, decoder_num_heads=1))
    >>> objective = MaskedImage(model)
    >>> batch = {"images": torch.randn(3, 1, 8, 8)}
    >>> objective(batch).shape, objective.denominator(batch).item()
    (torch.Size([]), 3)
    """

    model: MAE

    def __init__(self, model: MAE, config: MaskedImageConfig | None = None) -> None:
        super().__init__(model)
        self.config = MaskedImageConfig() if config is None else config

    def _loss(self, batch: Batch, keys: Tensor) -> Tensor:
        images = batch["images"]
        wanted_btp = self.targets(images)
        b, t = wanted_btp.shape[:2]
        if round(self.config.mask * t) in (0, t):
            raise ValueError(f"mask must hide some of an image's {t} patches and leave some, got {self.config.mask}")
        visible_bk = kept_tokens(b, t, self.config.mask, keys=keys)
        found_btp = self.model(images, visible_bk)
        squares_bt = (found_btp.to(wanted_btp.dtype) - wanted_btp).square().mean(-1)
        loss: Tensor = squares_bt.scatter(1, visible_bk, 0.0).sum() / (t - visible_bk.shape[1])
        return loss

    def targets(self, images: Tensor) -> Tensor:
        """Return the targets of all patches, ``(b, tokens, values)``, float32 or wider."""
        x = self.model.patches(images)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if not self.config.normalise:
            return x
        variance, mean = torch.var_mean(x, dim=-1, correction=0, keepdim=True)
        return (x - mean) / (variance + 1e-6).sqrt()
