"""The check that every function of a matrix makes on its argument, and the dtype in which it computes."""

import functools
import math
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from danlu._autograd import ordinary, readable

P = ParamSpec("P")
R = TypeVar("R")


def in_own_dtype(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function compute in the dtype that it states, also where ``torch.autocast`` would round its products.

    >>> product = in_own_dtype(lambda A: A @ A)
    >>> with torch.autocast("cpu", torch.bfloat16):
    ...     product(torch.eye(2)).dtype, (torch.eye(2) @ torch.eye(2)).dtype
    (torch.float32, torch.bfloat16)
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                with torch.autocast(device, enabled=False):
                    return call(*args, **kwargs)
        return function(*args, **kwargs)

    return call


def check_matrix(name: str, M: Tensor, *, finite: bool = True) -> None:
    """Raise unless ``M`` is a real floating tensor ``(…, m, n)``, with finite entries if ``finite``.

    The entries are not read where they cannot be: in transforms, in traces and on the meta device.

    >>> check_matrix("W", torch.ones(3))
    Traceback (most recent call last):
    ...
    ValueError: W must have at least 2 dimensions (…, m, n), got shape (3,)
    """
    if not isinstance(M, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(M).__name__}")
    if not M.is_floating_point():
        raise TypeError(f"{name} must have a real floating dtype, got {M.dtype}")
    if M.ndim < 2:
        raise ValueError(f"{name} must have at least 2 dimensions (…, m, n), got shape {tuple(M.shape)}")
    if finite and ordinary(M) and M.numel() and not is_finite(M):
        raise ValueError(f"{name} must be finite, got NaN or infinity in a tensor of shape {tuple(M.shape)}")


def is_finite(X: Tensor) -> bool:
    """Say whether every entry of a tensor with numbers is finite, at the cost of a product with itself on a CPU.

    >>> is_finite(torch.tensor([1e30, 0.0])), is_finite(torch.tensor([1.0, float("nan")]))
    (True, False)
    """
    if not X.is_cpu:
        return bool(torch.isfinite(X).all())
    # Where the sum of squares is finite, all entries are; else it may have overflowed.
    if X.is_contiguous():
        flat = X.detach().view(-1)
        total = torch.dot(flat, flat)
    else:
        total = X.sum()
    return math.isfinite(total.item()) or bool(torch.isfinite(X).all())


def holds(flags: Tensor, *, unknown: bool) -> bool:
    """Whether all flags are true, or ``unknown`` where they cannot be looked at.

    >>> holds(torch.tensor([True, False]), unknown=True), holds(torch.ones(2, device="meta"), unknown=True)
    (False, True)
    """
    return bool(flags.all()) if readable(flags) else unknown


def check_readable(what: str, M: Tensor) -> None:
    """Raise where ``what`` would have to look at numbers that cannot be looked at.

    >>> check_readable("this", torch.ones(2, 2, device="meta"))
    Traceback (most recent call last):
    ...
    NotImplementedError: this looks at the numbers of the matrix, which compilers, torch.func.vmap, fake tensors and ...
    """
    if not readable(M):
        raise NotImplementedError(
            f"{what} looks at the numbers of the matrix, which compilers, torch.func.vmap, fake tensors and the meta "
            "device do not show: call it outside, and give the indices that it chose"
        )
