"""The check that every function of a matrix makes on its argument."""

import torch
from torch import Tensor


def check_matrix(name: str, M: Tensor, *, finite: bool = True) -> None:
    """Raise unless ``M`` is a real floating tensor ``(…, m, n)``, with finite entries if ``finite``.

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
    if finite and M.numel() and not bool(torch.isfinite(M).all()):
        raise ValueError(f"{name} must be finite, got NaN or infinity in a tensor of shape {tuple(M.shape)}")
