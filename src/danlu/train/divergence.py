"""Whether a run has diverged for good: a weight that is not finite never becomes finite again."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from danlu.train.distributed import sum_over_ranks

__all__ = ["check_finite"]


def check_finite(weights: Iterable[tuple[str, nn.Parameter]], step: int) -> None:
    """Raise FloatingPointError if any weight is not finite; on several processes all of them have to call it.

    Args:
        weights: parameters by name, of which each process may hold a part.
        step: optimizer steps done, for the message.

    >>> check_finite([("scale", nn.Parameter(torch.tensor([1.0, float("nan")])))], 7)
    Traceback (most recent call last):
    ...
    FloatingPointError: the run has diverged: after step 7 scale is not finite; a lower learning rate often helps
    """
    named = list(weights)
    if not named:
        return
    wrong = torch.stack([_held(weight).isfinite().logical_not().any() for _, weight in named])
    wrong = sum_over_ranks(wrong.to(torch.float64))
    if not bool(wrong.any()):
        return
    names = [name for (name, _), count in zip(named, wrong.tolist(), strict=True) if count]
    more = f" and {len(names) - 1} more weights are" if len(names) > 1 else " is"
    raise FloatingPointError(
        f"the run has diverged: after step {step} {names[0]}{more} not finite; a lower learning rate often helps"
    )


def _held(weight: Tensor) -> Tensor:
    """The part of a weight that this process holds."""
    value = weight.detach()
    return value.to_local() if isinstance(value, DTensor) else value
