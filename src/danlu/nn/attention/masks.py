"""Boolean attention masks: True where a query may look."""

import torch
from torch import Tensor


def causal_mask(queries: int, keys: int, *, device: torch.device | None = None) -> Tensor:
    """``(queries, keys)``: the last query sees every key, each earlier one a key less.

    >>> causal_mask(2, 3).int().tolist()
    [[1, 1, 0], [1, 1, 1]]
    """
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def document_mask(documents_bt: Tensor) -> Tensor:
    """Causal mask ``(batch, 1, time, time)`` that also keeps packed documents apart.

    Args:
        documents_bt: integer document number of each token, ``(batch, time)``.

    >>> document_mask(torch.tensor([[0, 0, 1]]))[0, 0].int().tolist()
    [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
    """
    if documents_bt.dim() != 2:
        raise ValueError(f"documents must be (batch, time), got shape {tuple(documents_bt.shape)}")
    time = documents_bt.shape[1]
    same = documents_bt[:, None, :, None] == documents_bt[:, None, None, :]
    return same & causal_mask(time, time, device=documents_bt.device)
