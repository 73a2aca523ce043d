r"""DropToken: train on a random part of each sequence, its tokens standing where they stood (kexue.fm 8770).

Leaving token ``j`` out and keeping the others' positions is to zero column ``j`` of every attention matrix in every
layer and to renormalise the rows: a dropout of attention with one mask for all layers. The mean of that mask is a
constant ``p``, and renormalising ``p A`` gives ``A``, so nothing is rescaled when the dropping ends. This holds to
first order only: the mean over masks of the renormalised matrix is flatter than ``A``.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from danlu._validate import integer, number


def kept_tokens(
    batch: int,
    tokens: int,
    rate: float,
    *,
    protected: Tensor | None = None,
    device: torch.device | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw which tokens of each sequence stay: numbers in rising order, int64 ``(batch, kept)``.

    Every sequence keeps ``tokens - round(rate * tokens)`` tokens, at least one, so that a batch stays rectangular.

    Args:
        batch: sequences.
        tokens: tokens of a sequence.
        rate: share to leave out, in [0, 1).
        protected: True for tokens that go last, ``(batch, tokens)``.
        device: of the result.
        generator: on that device.

    Raises:
        ValueError: a rate out of range, or ``protected`` of another shape.

    >>> kept_tokens(2, 8, 0.75).shape
    torch.Size([2, 2])
    """
    integer("batch", batch)
    integer("tokens", tokens)
    number("rate", rate, low=0, high=1, high_open=True)
    if protected is not None and protected.shape != (batch, tokens):
        raise ValueError(f"protected must be {(batch, tokens)}, got shape {tuple(protected.shape)}")
    order_bt = torch.rand(batch, tokens, device=device, generator=generator)
    if protected is not None:
        order_bt = order_bt.masked_fill(protected, -1.0)
    kept = max(1, tokens - round(rate * tokens))
    return order_bt.topk(kept, dim=1, largest=False).indices.sort(dim=1).values


def drop_tokens(
    batch: Mapping[str, Tensor], rate: float, *, generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    """Leave a share of the tokens of a batch out; the others bring their ``positions``, ``(batch, kept, 1)``.

    Everything of the shape of ``batch["tokens"]`` is cut with it: targets, document numbers. The first token of a
    document (the separator that opens it) stays.

    Args:
        batch: ``tokens`` ``(batch, time)`` and what goes with them.
        rate: share to leave out, in [0, 1); 0 keeps all.
        generator: on the batch's device.

    >>> tokens = torch.arange(12).view(2, 6)
    >>> short = drop_tokens({"tokens": tokens, "targets": tokens + 1}, 0.5)
    >>> short["tokens"].shape, torch.equal(short["targets"], short["tokens"] + 1)
    (torch.Size([2, 3]), True)
    """
    tokens_bt = batch["tokens"]
    rows, time = tokens_bt.shape
    opens = torch.zeros(tokens_bt.shape, dtype=torch.bool, device=tokens_bt.device)
    opens[:, 0] = True
    if "documents" in batch:
        opens[:, 1:] = batch["documents"].diff(dim=1) != 0
    kept_bk = kept_tokens(rows, time, rate, protected=opens, device=tokens_bt.device, generator=generator)
    cut = {name: value.gather(1, kept_bk) if value.shape == tokens_bt.shape else value for name, value in batch.items()}
    return {**cut, "positions": kept_bk[..., None]}
