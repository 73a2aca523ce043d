"""Where each position of a sequence of text and images is, in integers: from data to rotary positions."""

from collections.abc import Sequence

import torch
from torch import Tensor

from danlu._validate import integer


def text_image_grid(segments: Sequence[int | Sequence[int]]) -> Tensor:
    """Say of each position of a sequence of text and images where in its image it is.

    Args:
        segments: in order, the number of tokens of a text span or the size of an image in patches, (rows, columns),
            whose patches follow one another row by row. Where there are videos, (frames, rows, columns) throughout.

    Returns:
        int64 ``(n, 2 * axes)``: index along each axis, counted from one, and the image's size along each axis; zeros
        for text. It is what `danlu.nn.grid_coordinates` takes.

    Raises:
        ValueError: an empty image, a negative span, or images of different numbers of axes.

    >>> text_image_grid([1, (1, 2)]).tolist()
    [[0, 0, 0, 0], [1, 1, 1, 2], [1, 2, 1, 2]]
    """
    axes = {len(segment) for segment in segments if not isinstance(segment, int)} or {2}
    if len(axes) > 1 or min(axes) == 0:
        raise ValueError(f"segments must be images of one number of axes, got {sorted(axes)}")
    count = axes.pop()
    rows = []
    for index, segment in enumerate(segments):
        if isinstance(segment, int):
            integer(f"segments[{index}]", segment, low=0)
            rows.append(torch.zeros(segment, 2 * count, dtype=torch.int64))
            continue
        for size in segment:
            integer(f"segments[{index}]", size)
        sizes = torch.tensor(tuple(segment))
        where = torch.cartesian_prod(*(torch.arange(1, size + 1) for size in segment)).reshape(-1, count)
        rows.append(torch.cat((where, sizes.expand_as(where)), dim=-1))
    return torch.cat(rows) if rows else torch.zeros(0, 2 * count, dtype=torch.int64)
