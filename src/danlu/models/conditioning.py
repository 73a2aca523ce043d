"""What an image network is told beside the image: the time, the second time of an average velocity, and the class.

Shape suffixes: b batch, d size of the condition, h w pixels, c channels, p patch size.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from danlu._validate import integer
from danlu.nn import Linear, declare

_FEATURES = 64
# Angular frequencies reach 32 for times of order one. The usual 1000 t would make the time derivative that MeanFlow
# learns from a thousand times as steep, and resolves nothing that a schedule needs.
_HIGHEST = 32.0


class TimeEmbedding(nn.Module):
    """Sines and cosines of a time of order one, through a two-layer network.

    Angular frequencies are 1 to 32 in geometric steps.

    Args:
        dim: size of the result.
        smooth: divide each feature by its frequency, so that all have the same derivative: what a network learns of
            smooth features it does not learn by ripples in time, which an objective with a time derivative in its
            target would feed on (docs/objectives/meanflow.md has the measurement).

    Shapes: ``(b,)`` to ``(b, dim)``.

    >>> TimeEmbedding(12)(torch.tensor([0.0, 1.0])).shape
    torch.Size([2, 12])
    """

    def __init__(self, dim: int, *, smooth: bool = False) -> None:
        super().__init__()
        self.smooth = smooth
        self.expand = Linear(_FEATURES, dim)
        self.project = Linear(dim, dim)

    def forward(self, t_b: Tensor) -> Tensor:
        """Embed times ``(b,)``; the result has the dtype of the weights."""
        features = time_features(t_b.to(self.expand.weight.dtype), smooth=self.smooth)
        y: Tensor = self.project(F.silu(self.expand(features)))
        return y


def time_features(t_b: Tensor, *, smooth: bool) -> Tensor:
    """Return sines and cosines of times, ``(b, 64)``, of mean square 1; see :class:`TimeEmbedding`."""
    half = _FEATURES // 2
    frequencies = _HIGHEST ** (torch.arange(half, device=t_b.device, dtype=torch.float64) / (half - 1))
    amplitudes = 1 / frequencies if smooth else torch.ones_like(frequencies)
    amplitudes = math.sqrt(2) * amplitudes / amplitudes.square().mean().sqrt()
    angles = t_b[:, None] * frequencies.to(t_b.dtype)
    return torch.cat((angles.cos(), angles.sin()), dim=-1) * amplitudes.repeat(2).to(t_b.dtype)


class Condition(nn.Module):
    """One vector a sample from time, second time and class: the sum of their embeddings.

    Args:
        dim: size of the vector.
        num_classes: number of classes, whose numbers are followed by one for "no class"; 0: no classes at all.
        two_times: embed ``t - r`` too (Geng et al., arXiv 2505.13447, embed t and t - r rather than t and r), both of
            them smoothly.

    >>> condition = Condition(8, num_classes=3, two_times=True)
    >>> condition(torch.tensor([0.5, 1.0]), torch.tensor([2, 3]), torch.tensor([0.5, 0.0])).shape
    torch.Size([2, 8])
    """

    def __init__(self, dim: int, *, num_classes: int, two_times: bool) -> None:
        super().__init__()
        integer("dim", dim)
        integer("num_classes", num_classes, low=0)
        self.time = TimeEmbedding(dim, smooth=two_times)
        self.span = TimeEmbedding(dim, smooth=True) if two_times else None
        self.classes: nn.Parameter | None = None
        if num_classes:
            self.classes = nn.Parameter(torch.empty(num_classes + 1, dim))
            declare(self, "classes", "embedding")
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the class embeddings anew (every layer has its own method)."""
        if self.classes is not None:
            nn.init.normal_(self.classes)

    def forward(self, t_b: Tensor, classes_b: Tensor | None = None, r_b: Tensor | None = None) -> Tensor:
        """Return ``(b, dim)``.

        Args:
            t_b: times, ``(b,)``.
            classes_b: class numbers, int64 ``(b,)``, with ``num_classes`` for "no class"; None: no class for all.
            r_b: second times; None takes r = t.

        Raises:
            ValueError: a class or a second time for a network made without.
        """
        if classes_b is not None and self.classes is None:
            raise ValueError("this network has no classes (num_classes is 0), and classes_b was given")
        if r_b is not None and self.span is None:
            raise ValueError("this network takes one time, and r_b was given; make it with two_times=True")
        c_bd: Tensor = self.time(t_b)
        if self.span is not None:
            c_bd = c_bd + self.span(torch.zeros_like(t_b) if r_b is None else t_b - r_b)
        if self.classes is not None:
            last = self.classes.shape[0] - 1
            c_bd = c_bd + (self.classes[last] if classes_b is None else F.embedding(classes_b, self.classes))
        return c_bd


def patchify(x_bhwc: Tensor, patch: int) -> Tensor:
    """Gather squares of ``patch x patch`` pixels into channels: ``(b, h, w, c)`` to ``(b, h/p, w/p, p * p * c)``.

    >>> x = torch.arange(24.0).view(1, 2, 4, 3)
    >>> patchify(x, 2).shape, torch.equal(unpatchify(patchify(x, 2), 2), x)
    (torch.Size([1, 1, 2, 12]), True)
    """
    b, h, w, c = x_bhwc.shape
    if patch == 1:
        return x_bhwc
    split = x_bhwc.reshape(b, h // patch, patch, w // patch, patch, c)
    return split.transpose(2, 3).reshape(b, h // patch, w // patch, patch * patch * c)


def unpatchify(x_bhwc: Tensor, patch: int) -> Tensor:
    """Undo `patchify`: ``(b, h, w, p * p * c)`` to ``(b, h * p, w * p, c)``."""
    b, h, w, c = x_bhwc.shape
    if patch == 1:
        return x_bhwc
    split = x_bhwc.reshape(b, h, w, patch, patch, c // patch**2)
    return split.transpose(2, 3).reshape(b, h * patch, w * patch, c // patch**2)


def check_image(x_bchw: Tensor, channels: int, multiple: int) -> None:
    """Raise unless ``x`` is ``(b, channels, h, w)`` with sides that ``multiple`` divides."""
    if x_bchw.dim() != 4 or x_bchw.shape[1] != channels:
        raise ValueError(f"images must be (batch, {channels}, height, width), got shape {tuple(x_bchw.shape)}")
    if x_bchw.shape[2] % multiple or x_bchw.shape[3] % multiple:
        raise ValueError(
            f"this network halves the sides of an image until {multiple} pixels are one: height and width must be "
            f"multiples of {multiple}, got {x_bchw.shape[2]} x {x_bchw.shape[3]}"
        )
