r"""Diffusion Transformer with adaLN-Zero (Peebles and Xie, arXiv 2212.09748) and rotary positions in two dimensions.

An image is cut into patches of ``patch x patch`` pixels, one token each. A block is

    x += gate_1 * attention(norm(x) * (1 + scale_1) + shift_1)
    x += gate_2 * feed_forward(norm(x) * (1 + scale_2) + shift_2)

with the six vectors a linear map, zero at the start, of the embedding of time and class: at the start every block is
the identity. Half of a head's coordinate pairs turn by the row and half by the column of the token (base 100, since a
side has tens of tokens and not thousands), so the network has no table of positions and runs at any resolution.

Shape suffixes: b batch, t tokens, d model size, c channels, h w pixels.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from danlu._validate import integer, positive
from danlu.models.conditioning import Condition, check_image, patchify, unpatchify
from danlu.nn import FullAttention, Linear, rotary_angles_nd


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """Sizes of a `DiT`."""

    renamed: ClassVar[dict[str, str]] = {"heads": "num_heads"}

    channels: int = 1
    """colour channels of an image; a run sets this to the data's"""
    image_size: int = 28
    """height and width; a run sets this to the data's"""
    num_classes: int = 0
    """classes to tell apart, 0 for none; a run whose number is not 0 sets this to the data's"""
    patch: int = 4
    """side of the squares of pixels that are one token"""
    dim: int = 128
    """model size"""
    layers: int = 4
    """blocks"""
    num_heads: int = 4
    """attention heads; a head's size must be a multiple of 4"""
    ratio: int = 4
    """width of the feed-forward layers over dim"""
    rope_base: float = 100.0
    """period scale of the rotary positions"""
    two_times: bool = False
    """take a second time (`MeanFlow`)"""

    def build(self, **others: Any) -> "DiT":
        """Make the network with fresh weights."""
        return DiT(self)


class DiTBlock(nn.Module):
    """Attention and a GELU network, each modulated and gated by the condition."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        c = config
        self.modulation = Linear(c.dim, 6 * c.dim, std=0.0, split=(c.dim,) * 6)
        self.attention = FullAttention(c.dim, c.num_heads)
        self.expand = Linear(c.dim, c.ratio * c.dim)
        self.contract = Linear(c.ratio * c.dim, c.dim)

    def forward(self, x_btd: Tensor, c_bd: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """``(b, tokens, dim)`` to the same; ``c`` is ``(b, dim)``."""
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulation(c_bd)[:, None].chunk(6, dim=-1)
        h_btd = torch.addcmul(shift_1, F.layer_norm(x_btd, x_btd.shape[-1:]), 1 + scale_1)
        x_btd = torch.addcmul(x_btd, gate_1, self.attention(h_btd, rope))
        h_btd = torch.addcmul(shift_2, F.layer_norm(x_btd, x_btd.shape[-1:]), 1 + scale_2)
        h_btd = self.contract(F.gelu(self.expand(h_btd), approximate="tanh"))
        return torch.addcmul(x_btd, gate_2, h_btd)


class DiT(nn.Module):
    """Transformer ``net(x, t, classes, r)`` of images, differentiable in forward and in reverse mode.

    ``compute_dtype`` is the dtype of the activations (None: that of the weights); weights keep their own.

    Raises:
        ValueError: sizes that do not fit together, naming the field.

    >>> net = DiT(DiTConfig(dim=16, layers=1, num_heads=2, image_size=12, num_classes=3))
    >>> net(torch.randn(2, 1, 12, 12), torch.tensor([0.3, 1.0]), classes_b=torch.tensor([0, 3])).shape
    torch.Size([2, 1, 12, 12])
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        c = config
        for name in ("channels", "image_size", "patch", "dim", "layers", "num_heads", "ratio"):
            integer(name, getattr(c, name))
        positive("rope_base", c.rope_base)
        if c.image_size % c.patch:
            raise ValueError(f"patch must divide image_size = {c.image_size}, got {c.patch}")
        if c.dim % (4 * c.num_heads):
            raise ValueError(f"dim must be a multiple of 4 * num_heads (rows and columns turn pairs), got {c.dim}")
        integer("num_classes", c.num_classes, low=0)
        self.config = config
        self.num_classes = c.num_classes
        self.compute_dtype: torch.dtype | None = None
        self.condition = Condition(c.dim, num_classes=c.num_classes, two_times=c.two_times)
        self.first = Linear(c.patch**2 * c.channels, c.dim)
        self.blocks = nn.ModuleList(DiTBlock(c) for _ in range(c.layers))
        self.last_modulation = Linear(c.dim, 2 * c.dim, std=0.0, split=(c.dim, c.dim))
        self.last = Linear(c.dim, c.patch**2 * c.channels, std=0.0, role="head")

    def forward(
        self, x_bchw: Tensor, t_b: Tensor, classes_b: Tensor | None = None, r_b: Tensor | None = None
    ) -> Tensor:
        """Return a tensor of the images' shape and dtype; arguments as in `UNet.forward`."""
        check_image(x_bchw, self.config.channels, self.config.patch)
        dtype = self.compute_dtype or self.first.weight.dtype
        c_bd = F.silu(self.condition(t_b, classes_b, r_b)).to(dtype)
        x_bhwd = self.first(patchify(x_bchw.permute(0, 2, 3, 1).to(dtype), self.config.patch))
        rope = self.rope(*x_bhwd.shape[1:3], device=x_bchw.device, dtype=dtype)
        x_btd = x_bhwd.flatten(1, 2)
        for block in self.blocks:
            x_btd = block(x_btd, c_bd, rope)
        shift, scale = self.last_modulation(c_bd)[:, None].chunk(2, dim=-1)
        x_btd = torch.addcmul(shift, F.layer_norm(x_btd, x_btd.shape[-1:]), 1 + scale)
        y = unpatchify(self.last(x_btd).unflatten(1, x_bhwd.shape[1:3]), self.config.patch)
        return y.permute(0, 3, 1, 2).to(x_bchw.dtype)

    def rope(self, rows: int, columns: int, *, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``(rows * columns, head size)`` of the tokens, row by row."""
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        grid = torch.cartesian_prod(*(torch.arange(size, device=device, dtype=exact) for size in (rows, columns)))
        size = self.config.dim // self.config.num_heads
        cos, sin = rotary_angles_nd(grid, size, base=self.config.rope_base, layout="halves")
        return cos.to(dtype), sin.to(dtype)

    def training_flops(self, length: int | None = None) -> float:
        """Floating-point operations of training one image: the backward pass is two more of the forward one."""
        return 3.0 * self.flops

    @property
    def flops(self) -> float:
        """Floating-point operations of a forward pass of one image in linear maps and attention."""
        c = self.config
        tokens = (c.image_size // c.patch) ** 2
        block = sum(b.attention.flops(tokens) for b in self.blocks)  # type: ignore[union-attr, operator]
        feed_forward = c.layers * 2 * 2 * c.ratio * c.dim**2 * tokens
        ends = 2 * 2 * c.patch**2 * c.channels * c.dim * tokens
        modulations = (6 * c.layers + 2) * 2 * c.dim**2
        embeddings = sum(2 * p.numel() for n, p in self.condition.named_parameters() if n != "classes")
        return float(block) + feed_forward + ends + modulations + embeddings
