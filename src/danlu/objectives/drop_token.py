r"""DropToken: train on a random part of each sequence, whose tokens keep their positions (kexue.fm 8770).

Leaving token ``j`` out while the others keep their positions is the same as setting column ``j`` of every attention
matrix in every layer to zero and renormalising the rows: attention dropout with one mask for all layers. The mean of
that mask is a constant ``p``, and renormalising ``p A`` gives ``A``, so nothing is rescaled when all tokens are used
again. This holds to first order only: the mean over masks of the renormalised matrix is flatter than ``A``.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from danlu._draws import fresh, uniform
from danlu._validate import integer, number
from danlu.objectives.draws import keys_of


def kept_tokens(
    batch: int,
    tokens: int,
    rate: float,
    *,
    protected: Tensor | None = None,
    device: torch.device | None = None,
    generator: torch.Generator | None = None,
    keys: Tensor | None = None,
) -> Tensor:
    """Draw which tokens of each sequence are kept: ascending indices, int64 ``(batch, kept)``.

    Every sequence keeps ``tokens - round(rate * tokens)`` tokens, at least one, so that a batch stays rectangular.

    Args:
        batch: number of sequences.
        tokens: number of tokens of a sequence.
        rate: share to leave out, in [0, 1).
        protected: ``(batch, tokens)``, True for tokens that are dropped only if no others are left to drop.
        device: of the result.
        generator: on that device.
        keys: one for each sequence, int64 ``(batch,)``, of which its tokens are a function; None draws them by
            ``generator``.

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
    keys = fresh(batch, device=device, generator=generator) if keys is None else keys
    order_bt = uniform(keys, "kept tokens", tokens)
    if protected is not None:
        order_bt = order_bt.masked_fill(protected, -1.0)
    kept = max(1, tokens - round(rate * tokens))
    return order_bt.topk(kept, dim=1, largest=False).indices.sort(dim=1).values


def drop_tokens(
    batch: Mapping[str, Tensor], rate: float, *, generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    """Return a batch without a share of its tokens and with the ``positions`` of the others, ``(batch, kept, 1)``.

    All tensors of the shape of ``batch["tokens"]``, such as targets and document numbers, lose the same tokens. The
    first token of a document (the separator that opens it) is kept.

    Args:
        batch: ``tokens`` ``(batch, time)`` and the other tensors of the batch.
        rate: share to leave out, in [0, 1); 0 keeps all.
        generator: on the batch's device, for a batch without ``position``.

    >>> tokens = torch.arange(12).view(2, 6)
    >>> short = drop_tokens({"tokens": tokens, "targets": tokens + 1}, 0.5)
    >>> short["tokens"].shape, torch.equal(short["targets"], short["tokens"] + 1)
    (torch.Size([2, 3]), True)
    """
    tokens_bt = batch["tokens"]
    keys = keys_of(batch, tokens_bt, generator=generator)
    rows, time = tokens_bt.shape
    opens = torch.zeros(tokens_bt.shape, dtype=torch.bool, device=tokens_bt.device)
    opens[:, 0] = True
    if "documents" in batch:
        opens[:, 1:] = batch["documents"].diff(dim=1) != 0
    kept_bk = kept_tokens(rows, time, rate, protected=opens, keys=keys)
    cut = {name: value.gather(1, kept_bk) if value.shape == tokens_bt.shape else value for name, value in batch.items()}
    return {**cut, "positions": kept_bk[..., None]}
