"""Grids of images: a still picture, or the sampling steps as an animated GIF or WebP."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from danlu._validate import integer, positive
from danlu.data import to_bytes
from danlu.data.pictures import to_pillow

_MARGIN = 2
_SHOWN = 56  # smaller images are enlarged to about this many pixels, so that they can be seen
_STILL = ".png", ".webp", ".jpg"
_MOVING = ".gif", ".webp"


def grid(images_bchw: Tensor, *, columns: int | None = None) -> Any:
    """Return a picture (``PIL.Image``) of images ``(b, 1 or 3, h, w)`` from -1 to 1, row by row with white margins.

    Args:
        images_bchw: values outside -1 to 1 are clipped.
        columns: images per row; None for a square grid.

    Raises:
        ValueError: another shape.

    >>> grid(torch.zeros(5, 1, 8, 8)).size
    (176, 118)
    """
    if images_bchw.dim() != 4 or images_bchw.shape[1] not in (1, 3) or not len(images_bchw):
        raise ValueError(f"images must be (b, 1 or 3, height, width), got shape {tuple(images_bchw.shape)}")
    count, channels, height, width = images_bchw.shape
    columns = math.ceil(math.sqrt(count)) if columns is None else columns
    integer("columns", columns)
    rows = -(-count // columns)
    scale = max(1, round(_SHOWN / max(height, width)))
    pixels = to_bytes(images_bchw.cpu()).repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    height, width = height * scale + _MARGIN, width * scale + _MARGIN
    sheet = torch.full((channels, rows * height + _MARGIN, columns * width + _MARGIN), 255, dtype=torch.uint8)
    for index, image in enumerate(pixels):
        top, left = index // columns * height + _MARGIN, index % columns * width + _MARGIN
        sheet[:, top : top + image.shape[1], left : left + image.shape[2]] = image
    return to_pillow(sheet)


def write_images(path: Path | str, images: Tensor, *, columns: int | None = None, seconds: float = 3.0) -> Path:
    """Write images ``(b, c, h, w)`` as a grid, or their states ``(steps, b, c, h, w)`` as an animated grid.

    Args:
        path: ``.png``, ``.jpg`` or ``.webp`` for images, ``.gif`` or ``.webp`` for an animation.
        images: from -1 to 1.
        columns: as in :func:`grid`.
        seconds: length of an animation; its last state is then shown for the same time again.

    Raises:
        ValueError: another suffix or shape.
    """
    path = Path(path)
    positive("seconds", seconds)
    accepted = _MOVING if images.dim() == 5 else _STILL
    if path.suffix.lower() not in accepted:
        kind = "an animation" if images.dim() == 5 else "a picture"
        raise ValueError(f"{kind} is written as {' or '.join(accepted)}, got {path.name!r}")
    if images.dim() == 4:
        grid(images, columns=columns).save(path)
        return path
    frames = [grid(state, columns=columns) for state in images]
    each = max(20, round(1000 * seconds / max(len(frames) - 1, 1)))
    durations = [*[each] * (len(frames) - 1), round(1000 * seconds)]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0)
    return path
