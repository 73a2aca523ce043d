"""Whether a run has diverged for good: a weight that is not finite never becomes finite again."""

from collections.abc import Iterable

import torch
from torch import nn

from danlu.optim._sharded import local
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
    held = [local(weight.detach()) for _, weight in named]
    # A sum is finite only if all its terms are, and takes a tenth of the time that looking at each one does.
    sums = torch.stack([weight.sum(dtype=torch.promote_types(weight.dtype, torch.float32)) for weight in held])
    if not bool(sum_over_ranks(sums.isfinite().logical_not().double()).any()):
        return
    wrong = sum_over_ranks(torch.stack([weight.isfinite().logical_not().any() for weight in held]).double())
    if not bool(wrong.any()):  # the sums were too large, not what they are of
        return
    names = [name for (name, _), count in zip(named, wrong.tolist(), strict=True) if count]
    more = f" and {len(names) - 1} more weights are" if len(names) > 1 else " is"
    raise FloatingPointError(
        f"the run has diverged: after step {step} {names[0]}{more} not finite; a lower learning rate often helps"
    )
