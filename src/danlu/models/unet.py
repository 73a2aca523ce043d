r"""A lean U-Net for images of 8x8 to 64x64 pixels (Ronneberger et al., arXiv 1505.04597; Ho et al., arXiv 2006.11239).

What keeps it lean, against the usual one: pixels are gathered in patches before the first convolution and released
after the last (Hoogeboom et al., arXiv 2301.11093, section 3.3: down-sample right after the first layer); sides are
halved and doubled by linear maps of 2x2 patches; a level's blocks have one norm, over the channels of a pixel, and one
activation; skips are added, not concatenated; attention stands at the lowest resolution only.

A block is ``x + conv2(silu(conv1(norm(x) * (1 + scale) + shift)))`` with scale and shift from time and class.
``conv2``, the last map and the maps to scale and shift begin at zero: at the start a block is the identity and the
output 0.

Where to down-sample for large images: choose ``patch`` so that the first level is at most 64 pixels wide, and put
additional ``blocks`` and ``dropout`` at the last level (about 16x16); dropout acts there only.

Activations are held as (b, h, w, c), the memory order in which this convolution is fastest on a CPU.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from danlu._validate import integer, number
from danlu.models.conditioning import Condition, check_image, patchify, unpatchify
from danlu.nn import FullAttention, Linear


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """Sizes of a `UNet`."""

    renamed: ClassVar[dict[str, str]] = {"heads": "num_heads"}

    channels: int = 1
    """colour channels of an image; a run sets this to the data's"""
    image_size: int = 28
    """height and width; a run sets this to the data's"""
    num_classes: int = 0
    """classes to tell apart, 0 for none; a run whose number is not 0 sets this to the data's"""
    widths: tuple[int, ...] = (64, 128)
    """channels of each level; from one to the next the sides are halved"""
    blocks: tuple[int, ...] = (1, 3)
    """blocks of each level: on the way down and again on the way up; of the last level, once"""
    patch: int = 2
    """side of the squares of pixels that the first map gathers"""
    num_heads: int = 4
    """attention heads at the last level; 0: no attention"""
    condition: int = 128
    """size of the embedding of time and class"""
    dropout: float = 0.0
    """share of the activations dropped in the blocks of the last level"""
    two_times: bool = False
    """take a second time (`MeanFlow`)"""

    def build(self, **others: Any) -> "UNet":
        """Make the network with fresh weights."""
        return UNet(self)


class Convolution(nn.Conv2d):
    """A 3x3 convolution of ``(b, h, w, c)`` with padding, in the dtype of its input."""

    def __init__(self, channels: int, *, zero: bool = False) -> None:
        self.zero = zero
        super().__init__(channels, channels, 3, padding=1)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def reset_parameters(self) -> None:
        """Draw the weight from ``N(0, 1 / fan_in)``, or set it to zero."""
        nn.init.normal_(self.weight, std=0.0 if self.zero else (9 * self.in_channels) ** -0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x_bhwc: Tensor) -> Tensor:
        """Convolve; the permutations move no memory, they tell the convolution the order it finds."""
        assert self.bias is not None
        weight, bias = self.weight.to(x_bhwc.dtype), self.bias.to(x_bhwc.dtype)
        x_bchw = x_bhwc.permute(0, 3, 1, 2)
        primal, tangent = forward_ad.unpack_dual(x_bchw)
        if tangent is None or forward_ad.unpack_dual(weight).tangent is not None:
            y_bchw = F.conv2d(x_bchw, weight, bias, padding=1)
        else:
            # torch's own rule also convolves with the tangents of weight and bias, zeros: a third of the work.
            y_bchw = forward_ad.make_dual(
                F.conv2d(primal, weight, bias, padding=1), F.conv2d(tangent, weight, padding=1)
            )
        return y_bchw.permute(0, 2, 3, 1)


class Modulation(nn.Module):
    """LayerNorm over channels, scaled and shifted by the condition (the "adaLN" of Peebles and Xie, 2212.09748)."""

    def __init__(self, dim: int, condition: int) -> None:
        super().__init__()
        self.dim = dim
        self.map = Linear(condition, 2 * dim, std=0.0, split=(dim, dim))

    def forward(self, x_bhwc: Tensor, c_bd: Tensor) -> Tensor:
        """Normalise ``(b, h, w, dim)`` and modulate it by ``silu(c)``, ``(b, condition)``."""
        shift, scale = self.map(c_bd)[:, None, None].chunk(2, dim=-1)
        return torch.addcmul(shift, F.layer_norm(x_bhwc, (self.dim,)), 1 + scale)


class ConvBlock(nn.Module):
    """Two convolutions beside the residual stream; see the module."""

    def __init__(self, dim: int, condition: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.modulation = Modulation(dim, condition)
        self.conv1, self.conv2 = Convolution(dim), Convolution(dim, zero=True)
        self.dropout = dropout

    def forward(self, x_bhwc: Tensor, c_bd: Tensor) -> Tensor:
        """``(b, h, w, dim)`` to the same."""
        h_bhwc = F.silu(self.conv1(self.modulation(x_bhwc, c_bd)))
        if self.dropout and self.training:
            h_bhwc = F.dropout(h_bhwc, self.dropout)
        y: Tensor = x_bhwc + self.conv2(h_bhwc)
        return y


class PixelAttention(nn.Module):
    """Attention among all pixels, beside the residual stream; its output map begins at zero."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.attention = FullAttention(dim, heads, out_std=0.0)

    def forward(self, x_bhwc: Tensor) -> Tensor:
        """``(b, h, w, dim)`` to the same."""
        normed = F.layer_norm(x_bhwc, x_bhwc.shape[-1:])
        y: Tensor = x_bhwc + self.attention(normed.flatten(1, 2)).view_as(x_bhwc)
        return y


class UNet(nn.Module):
    """U-Net ``net(x, t, classes, r)`` of images, differentiable in forward and in reverse mode.

    ``compute_dtype`` is the dtype of the activations (None: that of the weights); weights keep their own.

    Raises:
        ValueError: sizes that do not fit together, naming the field.

    >>> net = UNet(UNetConfig(widths=(8, 16), blocks=(1, 1), image_size=12, num_classes=3, two_times=True))
    >>> x, t = torch.randn(2, 1, 12, 12), torch.tensor([0.3, 1.0])
    >>> net(x, t, classes_b=torch.tensor([0, 3]), r_b=torch.zeros(2)).shape
    torch.Size([2, 1, 12, 12])
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        c = config
        for name in ("channels", "image_size", "patch", "condition"):
            integer(name, getattr(c, name))
        integer("num_heads", c.num_heads, low=0)
        number("dropout", c.dropout, low=0, high=1, high_open=True)
        if not c.widths or len(c.widths) != len(c.blocks):
            raise ValueError(f"widths and blocks must have one entry a level, got {c.widths} and {c.blocks}")
        for name in ("widths", "blocks"):
            for value in getattr(c, name):
                integer(name, value)
        integer("num_classes", c.num_classes, low=0)
        self.config = config
        self.num_classes = c.num_classes
        self.compute_dtype: torch.dtype | None = None
        self.multiple = c.patch * 2 ** (len(c.widths) - 1)
        if c.image_size % self.multiple:
            raise ValueError(f"patch and widths need an image_size that {self.multiple} divides, got {c.image_size}")
        self.condition = Condition(c.condition, num_classes=c.num_classes, two_times=c.two_times)
        self.first = Linear(c.patch**2 * c.channels, c.widths[0])

        def level(index: int) -> nn.ModuleList:
            dropout = c.dropout if index == len(c.widths) - 1 else 0.0
            return nn.ModuleList(
                ConvBlock(c.widths[index], c.condition, dropout=dropout) for _ in range(c.blocks[index])
            )

        pairs = list(zip(c.widths, c.widths[1:]))
        self.down = nn.ModuleList(level(index) for index in range(len(pairs)))
        self.halving = nn.ModuleList(Linear(4 * wide, narrow) for wide, narrow in pairs)
        self.middle = level(len(pairs))
        self.attention = PixelAttention(c.widths[-1], c.num_heads) if c.num_heads else None
        self.doubling = nn.ModuleList(Linear(narrow, 4 * wide) for wide, narrow in pairs)
        self.up = nn.ModuleList(level(index) for index in range(len(pairs)))
        self.last_modulation = Modulation(c.widths[0], c.condition)
        self.last = Linear(c.widths[0], c.patch**2 * c.channels, std=0.0, role="head")

    @property
    def blocks(self) -> list[nn.Module]:
        """The convolutional blocks of all levels, in the order in which they are called."""
        levels = (*self.down, self.middle, *reversed(self.up))
        return [block for level in levels for block in level.children()]

    def forward(
        self, x_bchw: Tensor, t_b: Tensor, classes_b: Tensor | None = None, r_b: Tensor | None = None
    ) -> Tensor:
        """Return a tensor of the images' shape and dtype.

        Args:
            x_bchw: images, sides multiples of ``patch * 2**(levels - 1)``.
            t_b: times of order one, float ``(b,)``.
            classes_b: class numbers, int64 ``(b,)``, with ``num_classes`` for "no class"; None: no class for all.
            r_b: second times of a network with ``two_times``; None takes r = t.

        Raises:
            ValueError: another shape, or a class or second time that the network was not made for.
        """
        check_image(x_bchw, self.config.channels, self.multiple)
        dtype = self.compute_dtype or self.first.weight.dtype
        c_bd = F.silu(self.condition(t_b, classes_b, r_b)).to(dtype)
        x = self.first(patchify(x_bchw.permute(0, 2, 3, 1).to(dtype), self.config.patch))
        skips = []
        for blocks, halve in zip(self.down, self.halving):
            for block in blocks:  # type: ignore[attr-defined]
                x = block(x, c_bd)
            skips.append(x)
            x = halve(patchify(x, 2))
        for index, block in enumerate(self.middle):
            x = block(x, c_bd)
            if index == 0 and self.attention is not None:
                x = self.attention(x)
        for blocks, double, skip in zip(reversed(self.up), reversed(self.doubling), reversed(skips)):
            x = skip + unpatchify(double(x), 2)
            for block in blocks:  # type: ignore[attr-defined]
                x = block(x, c_bd)
        y = unpatchify(self.last(self.last_modulation(x, c_bd)), self.config.patch)
        return y.permute(0, 3, 1, 2).to(x_bchw.dtype)

    def training_flops(self, length: int | None = None) -> float:
        """Floating-point operations of training one image: the backward pass is two more of the forward one."""
        return 3.0 * self.flops

    @property
    def flops(self) -> float:
        """Floating-point operations of a forward pass of one image in convolutions, linear maps and attention."""
        c = self.config
        total = 0.0
        for index, (width, blocks) in enumerate(zip(c.widths, c.blocks)):
            pixels = (c.image_size // (c.patch * 2**index)) ** 2
            inner = index < len(c.widths) - 1
            total += (1 + inner) * blocks * (2 * 2 * 9 * width**2 * pixels + 2 * c.condition * 2 * width)
            if index == 0:
                total += 2 * 2 * c.patch**2 * c.channels * width * pixels + 2 * c.condition * 2 * width
            if inner:
                total += 2 * 2 * width * c.widths[index + 1] * pixels
            elif self.attention is not None:
                total += self.attention.attention.flops(pixels)
        return total + sum(2 * p.numel() for n, p in self.condition.named_parameters() if n != "classes")
