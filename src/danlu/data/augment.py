"""Random changes of training images, by kornia, each a function of the image's number in the run."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from danlu._draws import bernoulli, uniform
from danlu._validate import choice

Augmentation = Literal["flip", "shift", "rotate", "zoom", "color", "erase"]
NAMES: tuple[Augmentation, ...] = ("flip", "shift", "rotate", "zoom", "color", "erase")


class Augmenter:
    """Apply augmentations to a batch, drawn anew for every image.

    ========  ===========================================================
    name      what it does
    ========  ===========================================================
    flip      left and right are exchanged in half of the images
    shift     up to a tenth of the side in each direction
    rotate    up to 10 degrees
    zoom      sides scaled by 0.85 to 1.15
    color     brightness, contrast and saturation by up to a fifth
    erase     a rectangle of 2 to 20 % of half of the images turns gray
    ========  ===========================================================

    Args:
        names: which; they act in this order.

    Raises:
        ValueError: an unknown name.
        ImportError: kornia is not installed.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        for name in names:
            choice("augment", name, NAMES)
        try:
            import kornia
        except ImportError:
            raise ImportError("augmentations are kornia's: pip install 'danlu[images]'") from None
        border: dict[str, Any] = {"padding_mode": "border", "align_corners": False}
        moved, seen = kornia.geometry.transform, kornia.enhance

        def zoom(x: Tensor, keys: Tensor) -> Tensor:
            found: Tensor = moved.scale(x, _between(keys, "zoom", 0.85, 1.15)[:, None].repeat(1, 2), **border)
            return found

        def color(x: Tensor, keys: Tensor) -> Tensor:
            x = seen.adjust_brightness(x, _between(keys, "brightness", -0.2, 0.2))
            x = seen.adjust_contrast(x, _between(keys, "contrast", 0.8, 1.2))
            found: Tensor = seen.adjust_saturation(x, _between(keys, "saturation", 0.8, 1.2))
            return found

        made: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "flip": lambda x, keys: torch.where(_half(keys, "flip"), moved.hflip(x), x),
            "shift": lambda x, keys: moved.translate(x, _shift(x, keys), **border),
            "rotate": lambda x, keys: moved.rotate(x, _between(keys, "rotate", -10, 10), **border),
            "zoom": zoom,
            "color": color,
            "erase": lambda x, keys: torch.where(_half(keys, "erase") & _rectangle(x, keys), 0.5, x),
        }
        self._layers = [made[name] for name in names]

    def __call__(self, images_bchw: Tensor, keys: Tensor) -> Tensor:
        """Return changed images ``(b, c, h, w)``, from 0 to 1 like those given: functions of ``keys``, int64 ``(b,)``.

        No random generator is used.
        """
        for layer in self._layers:
            images_bchw = layer(images_bchw, keys)
        return images_bchw.clamp(0, 1)


def _between(keys: Tensor, name: str, low: float, high: float, *shape: int) -> Tensor:
    return low + (high - low) * uniform(keys, name, *shape)


def _half(keys: Tensor, name: str) -> Tensor:
    return bernoulli(keys, name, 0.5, 1, 1, 1)


def _shift(x: Tensor, keys: Tensor) -> Tensor:
    height, width = x.shape[-2:]
    return _between(keys, "shift", -0.1, 0.1, 2) * torch.tensor([width, height])


def _rectangle(x: Tensor, keys: Tensor) -> Tensor:
    """Return which pixels are in an image's own rectangle, of sides as 3 to 10 up to 10 to 3, ``(b, 1, h, w)``."""
    sides = torch.tensor(x.shape[-2:])
    area = _between(keys, "area", 0.02, 0.2) * sides.prod()
    ratio = (_between(keys, "ratio", -1, 1) * 1.2).exp()
    size = torch.stack([area * ratio, area / ratio], 1).sqrt().round().clamp_min(1).minimum(sides)
    first = (uniform(keys, "place", 2) * (sides - size + 1)).floor()
    inside = [
        (torch.arange(side) >= first[:, axis, None]) & (torch.arange(side) < (first + size)[:, axis, None])
        for axis, side in enumerate(x.shape[-2:])
    ]
    return (inside[0][:, :, None] & inside[1][:, None, :])[:, None]
