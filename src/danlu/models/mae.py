r"""Masked autoencoder of images (He et al., arXiv 2111.06377), with rotary positions in two dimensions.

The encoder reads the visible patches alone; a smaller decoder gets what it made of them, a learnt vector at every
hidden place, and gives the pixels of all patches. Positions are rotary (half of a head's pairs turn by the row, half by
the column), so a patch carries its place wherever it comes in the shortened sequence, there are no tables, and an
encoder trained on a quarter of the patches reads whole images of any size.

Blocks are pre-norm: ``x += attention(norm(x)); x += feed_forward(norm(x))``; the maps that write to the residual stream
begin at ``1 / sqrt(fan_in * 2 * blocks)``.

Shape suffixes: b batch, t all tokens, k visible tokens, d model size, e the decoder's, c channels, h w pixels.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from danlu._validate import integer, positive
from danlu.models.conditioning import check_image, patchify
from danlu.nn import FeedForward, FullAttention, Linear, RMSNorm, declare, rotary_angles_nd

Rope = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class MAEConfig:
    """Sizes of an `MAE`."""

    renamed: ClassVar[dict[str, str]] = {"heads": "num_heads", "decoder_heads": "decoder_num_heads"}

    channels: int = 1
    """colour channels of an image; a run sets this to the data's"""
    image_size: int = 28
    """height and width; a run sets this to the data's"""
    patch: int = 4
    """side of the squares of pixels that are one token"""
    dim: int = 128
    """size of the encoder"""
    layers: int = 4
    """blocks of the encoder"""
    num_heads: int = 4
    """attention heads of the encoder; a head's size must be a multiple of 4"""
    decoder_dim: int = 64
    """size of the decoder"""
    decoder_layers: int = 1
    """blocks of the decoder"""
    decoder_num_heads: int = 2
    """attention heads of the decoder; a head's size must be a multiple of 4"""
    rope_base: float = 100.0
    """period scale of the rotary positions"""

    def build(self, **others: Any) -> "MAE":
        """Make the network with fresh weights."""
        return MAE(self)


class MAEBlock(nn.Module):
    """Attention over the tokens that it is given, and a gated network of 8/3 their size (the work of 4 ungated)."""

    def __init__(self, dim: int, heads: int, layers: int) -> None:
        super().__init__()
        hidden = round(8 * dim / 3)
        depth = (2 * layers) ** -0.5
        self.attention_norm, self.feed_forward_norm = RMSNorm(dim), RMSNorm(dim)
        self.attention = FullAttention(dim, heads, out_std=depth / math.sqrt(dim))
        self.feed_forward = FeedForward(dim, hidden, out_std=depth / math.sqrt(hidden))

    def forward(self, x_btd: Tensor, rope: Rope) -> Tensor:
        """``(b, tokens, dim)`` to the same."""
        x_btd = x_btd + self.attention(self.attention_norm(x_btd), rope)
        y: Tensor = x_btd + self.feed_forward(self.feed_forward_norm(x_btd))
        return y

    def flops(self, tokens: int) -> float:
        """Floating-point operations of a forward pass over one sequence."""
        linear = sum(p.numel() for p in self.feed_forward.parameters())
        return self.attention.flops(tokens) + 2.0 * tokens * linear


class MAE(nn.Module):
    """Encoder of visible patches and decoder of all; ``mae(x, visible)`` gives the pixels of every patch.

    ``compute_dtype`` is the dtype of the activations (None: that of the weights); weights keep their own.

    Raises:
        ValueError: sizes that do not fit together, naming the field.

    >>> mae = MAE(MAEConfig(image_size=8, dim=16, layers=1, num_heads=2, decoder_dim=8, decoder_num_heads=1))
    >>> x, visible = torch.randn(2, 1, 8, 8), torch.tensor([[0, 3], [1, 2]])
    >>> mae(x, visible).shape, mae.encode(x, visible).shape, mae.encode(x).shape
    (torch.Size([2, 4, 16]), torch.Size([2, 2, 16]), torch.Size([2, 4, 16]))
    """

    def __init__(self, config: MAEConfig) -> None:
        super().__init__()
        c = config
        for name in (
            "channels",
            "image_size",
            "patch",
            "dim",
            "layers",
            "num_heads",
            "decoder_dim",
            "decoder_layers",
            "decoder_num_heads",
        ):
            integer(name, getattr(c, name))
        positive("rope_base", c.rope_base)
        if c.image_size % c.patch:
            raise ValueError(f"patch must divide image_size = {c.image_size}, got {c.patch}")
        for prefix in ("", "decoder_"):
            dim, heads = getattr(c, prefix + "dim"), getattr(c, prefix + "num_heads")
            if dim % (4 * heads):
                raise ValueError(
                    f"{prefix}dim must be a multiple of 4 * {prefix}num_heads (rows and columns turn pairs), got {dim}"
                )
        self.config = config
        self.compute_dtype: torch.dtype | None = None
        values = c.patch**2 * c.channels
        self.first = Linear(values, c.dim)
        self.blocks = nn.ModuleList(MAEBlock(c.dim, c.num_heads, c.layers) for _ in range(c.layers))
        self.norm = RMSNorm(c.dim)
        self.bridge = Linear(c.dim, c.decoder_dim)
        self.mask_token = nn.Parameter(torch.empty(c.decoder_dim))
        declare(self, "mask_token", "embedding")
        self.decoder = nn.ModuleList(
            MAEBlock(c.decoder_dim, c.decoder_num_heads, c.decoder_layers) for _ in range(c.decoder_layers)
        )
        self.decoder_norm = RMSNorm(c.decoder_dim)
        self.last = Linear(c.decoder_dim, values, std=0.0, role="head")
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the mask token anew (every layer has its own method)."""
        nn.init.normal_(self.mask_token)

    def patches(self, x_bchw: Tensor) -> Tensor:
        """Pixels of the patches, row by row, ``(b, tokens, patch * patch * channels)``."""
        check_image(x_bchw, self.config.channels, self.config.patch)
        return patchify(x_bchw.permute(0, 2, 3, 1), self.config.patch).flatten(1, 2)

    def encode(self, x_bchw: Tensor, visible_bk: Tensor | None = None) -> Tensor:
        """Normalised features of the visible patches, ``(b, visible, dim)``; hidden ones are not computed with.

        Args:
            x_bchw: images.
            visible_bk: numbers of the patches to read, row by row, int64 ``(b, visible)``; None reads all.
        """
        dtype = self.compute_dtype or self.first.weight.dtype
        patches_btp = self.patches(x_bchw).to(dtype)
        rope = self._rope(x_bchw, self.config.dim // self.config.num_heads, dtype)
        if visible_bk is not None:
            _check_visible(visible_bk, patches_btp)
            patches_btp = _take(patches_btp, visible_bk)
            rope = (rope[0][visible_bk], rope[1][visible_bk])
        x_bkd = self.first(patches_btp)
        for block in self.blocks:
            x_bkd = block(x_bkd, rope)
        y: Tensor = self.norm(x_bkd)
        return y

    def forward(self, x_bchw: Tensor, visible_bk: Tensor) -> Tensor:
        """Predicted pixels of all patches ``(b, tokens, patch * patch * channels)``, in the dtype of ``x``."""
        z_bke = self.bridge(self.encode(x_bchw, visible_bk))
        c = self.config
        rope = self._rope(x_bchw, c.decoder_dim // c.decoder_num_heads, z_bke.dtype)
        tokens = rope[0].shape[0]
        hidden_bte = self.mask_token.to(z_bke.dtype).expand(z_bke.shape[0], tokens, -1)
        x_bte = hidden_bte.scatter(1, visible_bk[..., None].expand_as(z_bke), z_bke)
        for block in self.decoder:
            x_bte = block(x_bte, rope)
        y: Tensor = self.last(self.decoder_norm(x_bte))
        return y.to(x_bchw.dtype)

    def _rope(self, x_bchw: Tensor, size: int, dtype: torch.dtype) -> Rope:
        """Cosines and sines ``(tokens, size)`` of all patches, row by row."""
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        sides = (side // self.config.patch for side in x_bchw.shape[2:])
        grid = torch.cartesian_prod(*(torch.arange(side, device=x_bchw.device, dtype=exact) for side in sides))
        cos, sin = rotary_angles_nd(grid, size, base=self.config.rope_base, layout="halves")
        return cos.to(dtype), sin.to(dtype)

    def encoder_flops(self, tokens: int) -> float:
        """Floating-point operations of the encoder's blocks over one sequence of ``tokens`` visible patches."""
        return float(sum(block.flops(tokens) for block in self.blocks))  # type: ignore[operator]


def _take(x_btd: Tensor, index_bk: Tensor) -> Tensor:
    """Rows of each sequence: ``(b, t, d)`` and ``(b, k)`` to ``(b, k, d)``."""
    return x_btd.gather(1, index_bk[..., None].expand(-1, -1, x_btd.shape[-1]))


def _check_visible(visible_bk: Tensor, patches_btp: Tensor) -> None:
    if visible_bk.dim() != 2 or visible_bk.shape[0] != patches_btp.shape[0] or visible_bk.dtype != torch.int64:
        raise ValueError(
            f"visible must be int64 ({patches_btp.shape[0]}, visible patches), "
            f"got {visible_bk.dtype} {tuple(visible_bk.shape)}"
        )
