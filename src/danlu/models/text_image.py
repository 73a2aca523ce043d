"""Decoder over text and images in one sequence: patches are input positions like words, and outputs like words.

A word enters through its embedding, a patch through a linear map of its pixels; a linear head gives the next word,
another the next patch. Where the two stand is the rotary scheme of `danlu.nn.grid_coordinates`.

Shape suffixes: b batch, t time, d model size, p values of a patch, g grid (see `danlu.nn.text_image_grid`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from danlu._validate import choice, integer
from danlu.models.transformer import Transformer, TransformerConfig
from danlu.nn import Linear, grid_coordinates
from danlu.nn.rotary import SCHEMES, Scheme
from danlu.protocols import Cache


@dataclass(frozen=True, kw_only=True)
class TextImageConfig(TransformerConfig):
    """Sizes of a `TextImage`, and where its patches stand."""

    patch_values: int = 16
    """numbers that a patch consists of: its pixels times its channels"""
    scheme: Scheme = "tie"
    """rotary coordinates of patches: tie, tie-wh, tv, unscaled (square steps of one) or flat (as text)"""

    def build(self, **others: Any) -> "TextImage":
        """Make the network with fresh weights."""
        return TextImage(self)


class TextImage(Transformer):
    """A `Transformer` that reads and predicts image patches among its words.

    Raises:
        ValueError: sizes that do not fit together, or an unknown scheme.

    >>> from danlu.nn import text_image_grid
    >>> model = TextImage(TextImageConfig(vocab_size=7, dim=16, layers=1, hidden=8, patch_values=4))
    >>> grid = text_image_grid([2, (1, 2)])[None]
    >>> model.read(torch.tensor([[5, 6, 0, 0]]), torch.rand(1, 4, 4), grid).shape
    torch.Size([1, 4, 16])
    """

    def __init__(self, config: TextImageConfig) -> None:
        integer("patch_values", config.patch_values)
        choice("scheme", config.scheme, SCHEMES)
        super().__init__(config)
        self.scheme: Scheme = config.scheme
        self.patch_in = Linear(config.patch_values, config.dim)
        self.patch_out = Linear(config.dim, config.patch_values, std=0.5 * config.dim**-0.5, role="head")

    def read(
        self,
        tokens_bt: Tensor,
        patches_btp: Tensor,
        grid_btg: Tensor,
        *,
        cache: Sequence[Cache] | None = None,
        real: Tensor | None = None,
    ) -> Tensor:
        """Normalised hidden states ``(batch, time, dim)``, for ``head_weight`` and for ``patch_out``.

        Args:
            tokens_bt: word numbers, int64; anything where a patch stands.
            patches_btp: patches, anything where a word stands.
            grid_btg: integers of `danlu.nn.text_image_grid` for every position so far, those of ``tokens_bt`` last.
            cache: from `new_cache`; the tokens continue those stored in it.
            real: booleans ``(batch, time)``, False for positions that are padding; None: there is none.

        Raises:
            ValueError: shapes that do not fit together.
        """
        time = tokens_bt.shape[-1]
        if patches_btp.shape != (*tokens_bt.shape, self.patch_in.in_features):
            expected = (*tokens_bt.shape, self.patch_in.in_features)
            raise ValueError(f"patches must be {expected} (patch_values last), got {tuple(patches_btp.shape)}")
        if grid_btg.shape[:-2] != tokens_bt.shape[:-1] or grid_btg.shape[-2] < time:
            raise ValueError(f"grid must be (batch, at least {time}, 4), got shape {tuple(grid_btg.shape)}")
        positions = grid_coordinates(grid_btg, self.scheme)[:, -time:]
        words = F.embedding(tokens_bt, self.embedding)
        seen = self.patch_in(patches_btp.to(words.dtype))
        x_btd = torch.where(grid_btg[:, -time:, -1:] > 0, seen, words)
        return self.hidden(x_btd, positions=positions, cache=cache, real=real)
