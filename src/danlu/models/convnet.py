"""A small convolutional classifier of images, whose features measure generated ones.

Each level gathers patches of 2x2 and adds one 3x3 convolution of the normalised result; the mean over pixels, mapped to
``features`` numbers, is what `danlu.evaluation.frechet_distance` is taken of.

Shape suffixes: b batch, h w pixels, c channels, f features.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from danlu._validate import integer
from danlu.models.conditioning import check_image, patchify
from danlu.models.unet import Convolution
from danlu.nn import Linear


@dataclass(frozen=True, kw_only=True)
class ConvNetConfig:
    """Sizes of a `ConvNet`."""

    channels: int = 1
    """colour channels of an image; a run sets this to the data's"""
    image_size: int = 28
    """height and width; a run sets this to the data's"""
    num_classes: int = 10
    """classes; a run sets this to the data's"""
    widths: tuple[int, ...] = (32, 64)
    """channels of each level; before each the sides are halved"""
    features: int = 64
    """size of the vector that is classified"""

    def build(self, **others: Any) -> "ConvNet":
        """Make the network with fresh weights."""
        return ConvNet(self)


class ConvNet(nn.Module):
    """Classifier of images; see the module.

    Raises:
        ValueError: sizes that do not fit together.

    >>> net = ConvNet(ConvNetConfig(widths=(4, 8), features=6))
    >>> x = torch.randn(2, 1, 28, 28)
    >>> net(x).shape, net.features(x).shape
    (torch.Size([2, 10]), torch.Size([2, 6]))
    """

    def __init__(self, config: ConvNetConfig) -> None:
        super().__init__()
        c = config
        for name in ("channels", "image_size", "num_classes", "features"):
            integer(name, getattr(c, name))
        if not c.widths:
            raise ValueError("widths must name at least one level, got none")
        self.multiple = 2 ** len(c.widths)
        if c.image_size % self.multiple:
            raise ValueError(f"widths need an image_size that {self.multiple} divides, got {c.image_size}")
        self.config = config
        self.compute_dtype: torch.dtype | None = None
        inputs = (c.channels, *c.widths)
        self.halving = nn.ModuleList(Linear(4 * wide, narrow) for wide, narrow in zip(inputs, c.widths))
        self.convolutions = nn.ModuleList(Convolution(width) for width in c.widths)
        self.project = Linear(c.widths[-1], c.features)
        self.head = Linear(c.features, c.num_classes, role="head")

    def features(self, x_bchw: Tensor) -> Tensor:
        """Return the vectors that are classified, ``(b, features)``, in the dtype of the images."""
        check_image(x_bchw, self.config.channels, self.multiple)
        x = x_bchw.permute(0, 2, 3, 1).to(self.compute_dtype or self.head.weight.dtype)
        for halving, convolution in zip(self.halving, self.convolutions):
            x = halving(patchify(x, 2))
            x = x + F.silu(convolution(F.layer_norm(x, x.shape[-1:])))
        return self.project(F.layer_norm(x, x.shape[-1:]).mean((1, 2))).to(x_bchw.dtype)  # type: ignore[no-any-return]

    def forward(self, x_bchw: Tensor) -> Tensor:
        """Logits ``(b, num_classes)`` of images ``(b, c, h, w)``, float32 or wider."""
        y: Tensor = self.head(F.silu(self.features(x_bchw)))
        return y

    def training_flops(self, length: int | None = None) -> float:
        """Floating-point operations of training one image: the backward pass is two more of the forward one."""
        return 3.0 * self.flops

    @property
    def flops(self) -> float:
        """Floating-point operations of a forward pass of one image in convolutions and linear maps."""
        c, total = self.config, 0.0
        for index, (before, width) in enumerate(zip((c.channels, *c.widths), c.widths)):
            total += 2 * (4 * before * width + 9 * width**2) * (c.image_size // 2 ** (index + 1)) ** 2
        return total + 2 * c.features * (c.widths[-1] + c.num_classes)
