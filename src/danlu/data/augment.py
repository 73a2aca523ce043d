"""Random changes of training images, by kornia, that a run repeats exactly when it is resumed."""

from typing import Any, Literal

import torch
from torch import Tensor

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
            from kornia import augmentation as k
        except ImportError:
            raise ImportError("augmentations are kornia's: pip install 'danlu[images]'") from None
        border: dict[str, Any] = {"p": 1.0, "padding_mode": "border"}
        made = {
            "flip": lambda: k.RandomHorizontalFlip(p=0.5),
            "shift": lambda: k.RandomAffine(0.0, translate=(0.1, 0.1), **border),
            "rotate": lambda: k.RandomAffine(10.0, **border),
            "zoom": lambda: k.RandomAffine(0.0, scale=(0.85, 1.15), **border),
            "color": lambda: k.ColorJiggle(0.2, 0.2, 0.2, 0.0, p=1.0),
            "erase": lambda: k.RandomErasing(scale=(0.02, 0.2), value=0.5, p=0.5),
        }
        self._layers = [made[name]() for name in names]

    def __call__(self, images_bchw: Tensor, seed: int) -> Tensor:
        """Return changed images ``(b, c, h, w)``, from 0 to 1 like those given; the same for the same ``seed``.

        torch's global generator is used by kornia, and left as it was.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for layer in self._layers:
                images_bchw = layer(images_bchw)
        return images_bchw.clamp(0, 1)
