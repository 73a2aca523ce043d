"""The contexts of a model's layers: rotary tables and masks, each made once and shared by the layers that need it."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from danlu.nn.attention.masks import Mask, document_mask
from danlu.nn.rotary import rotary_angles_nd, rotary_span
from danlu.protocols import Cache, Context, Mixer


def layer_contexts(
    mixers: Sequence[Mixer],
    x_btd: Tensor,
    *,
    base: float = 10000.0,
    documents: Tensor | None = None,
    positions: Tensor | None = None,
    prefix: int | Tensor | None = None,
    cache: Sequence[Cache] | None = None,
    starts: Tensor | None = None,
    real: Tensor | None = None,
) -> list[Context[Any]]:
    """Return the context of each layer of a model for one forward pass.

    Args:
        mixers: the layers that mix tokens.
        x_btd: the model's embedded tokens, whose sizes, dtype and device count.
        base: period scale of the rotary positions.
        documents: document number of each token, ``(batch, time)``; None: each row is one document.
        positions: rotary coordinates, ``(time, axes)`` or ``(batch, time, axes)``; None: the tokens are counted.
        prefix: for the mask "prefix", how many first tokens all see, or booleans ``(batch, time)``.
        cache: one a layer; the tokens continue those stored there.
        starts: for a cache of rows of unequal length (`danlu.nn.LayerCache.joined`), the place in it where each row
            begins, int64 ``(batch,)``; None: the first.
        real: booleans ``(batch, time)``, False for tokens that are padding; None: there is none.

    Raises:
        ValueError: positions or a prefix where no layer takes any, booleans together with a cache, or starts without
            one or together with a prefix.

    >>> from danlu.nn.attention.gqa import GQA, GQAConfig
    >>> layers = [GQA(8, GQAConfig(num_heads=2)) for _ in range(2)]
    >>> first, second = layer_contexts(layers, torch.zeros(1, 3, 8), documents=torch.tensor([[0, 0, 1]]))
    >>> first.rope[0].shape, first.mask.shape, first.mask is second.mask
    (torch.Size([3, 4]), torch.Size([1, 1, 3, 3]), True)
    """
    start = 0 if cache is None else cache[0].length
    sizes = {mixer.rope_dim for mixer in mixers}
    if starts is not None:
        if cache is None or prefix is not None or starts.shape != x_btd.shape[:1]:
            raise ValueError("starts must be one number a row, with a cache and without a prefix")
        places = start + torch.arange(x_btd.shape[1], device=x_btd.device)
        if positions is None and any(sizes):
            positions = (places - starts[:, None]).unsqueeze(-1)
    ropes = rotary_tables(sizes, x_btd, start=start, positions=positions, base=base)
    masks: list[Tensor | None]
    if starts is not None:
        keys = torch.arange(start + x_btd.shape[1], device=x_btd.device)
        begun = keys >= starts[:, None, None, None]
        visible = begun & (keys <= places[:, None])
        masks = [None if mixer.mask is None else visible for mixer in mixers]
    else:
        masks = _masks(mixers, x_btd, documents, prefix, cached=cache is not None)
    number = None if isinstance(prefix, Tensor) else prefix
    return [
        Context(
            rope=ropes[mixer.rope_dim],
            mask=mask,
            documents=documents,
            positions=positions,
            prefix=number if mixer.mask == "prefix" else None,
            cache=None if cache is None else cache[index],
            real=real,
        )
        for index, (mixer, mask) in enumerate(zip(mixers, masks))
    ]


def rotary_tables(
    sizes: set[int], x_btd: Tensor, *, start: int = 0, positions: Tensor | None = None, base: float = 10000.0
) -> dict[int, tuple[Tensor, Tensor]]:
    """Return cosines and sines for each number of rotated coordinates, in the dtype of ``x``.

    Args:
        sizes: numbers of coordinates; layers of different kinds rotate different ones, a state space none.
        x_btd: ``(batch, time, dim)``.
        start: position of the first token.
        positions: coordinates in place of the count, ``(time, axes)`` or ``(batch, time, axes)``.
        base: period scale.

    Raises:
        ValueError: positions, and nothing to rotate.
    """
    if positions is not None and not any(sizes):
        raise ValueError("positions were given, and no layer of this model takes any")
    tables = {}
    for size in sizes:
        if positions is None or size == 0:
            tables[size] = rotary_span(start, start + x_btd.shape[1], size, base=base, like=x_btd)
        else:
            cos, sin = rotary_angles_nd(positions.double(), size, base=base)
            tables[size] = (cos.to(x_btd.dtype), sin.to(x_btd.dtype))
    return tables


def _masks(
    mixers: Sequence[Mixer], x_btd: Tensor, documents: Tensor | None, prefix: int | Tensor | None, *, cached: bool
) -> list[Tensor | None]:
    """The mask of each layer, made once for each kind; None where the kernels need none."""
    if prefix is not None and all(mixer.mask != "prefix" for mixer in mixers):
        raise ValueError("prefix was given, and no layer of this model has the mask 'prefix'")
    if isinstance(prefix, Tensor) and cached:
        raise ValueError("prefix must be a number of tokens when there is a cache")
    if documents is None and not isinstance(prefix, Tensor):
        return [None] * len(mixers)
    if documents is None:
        documents = torch.zeros(x_btd.shape[:2], dtype=torch.int64, device=x_btd.device)
    made: dict[tuple[str, int], Tensor] = {}
    found: list[Tensor | None] = []
    for mixer in mixers:
        if mixer.mask is None:
            found.append(None)
            continue
        heads = mixer.num_heads if mixer.mask == "mixed-heads" else 0
        key = (mixer.mask, heads)
        if key not in made:
            own = prefix if mixer.mask == "prefix" else None
            made[key] = document_mask(documents, cast(Mask, mixer.mask), num_heads=heads, prefix=own)
        found.append(made[key])
    return found
