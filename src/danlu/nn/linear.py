"""Linear map whose weight keeps its own precision while the product follows the activations."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from danlu._roles import Role, declare
from danlu._validate import integer, number

_SPLIT = 1 << 17
"""Weights of a matrix from which on two threads are quicker than one."""


def matrix_vector(weight: Tensor, x: Tensor) -> Tensor:
    """``W x`` for one vector, ``(out, in) (in,) -> (out,)``; with several threads if columns are contiguous, on a CPU.

    BLAS multiplies a matrix with a vector on one thread. Here each thread sums the columns of its own part of ``x``.

    >>> W = torch.arange(6.0).view(3, 2).T  # columns of two, each in one piece
    >>> matrix_vector(W, torch.ones(3)).tolist()
    [6.0, 9.0]
    """
    threads = torch.get_num_threads()
    if weight.stride(0) == 1 and threads > 1 and weight.numel() >= _SPLIT and len(x) % threads == 0:
        parts = weight.T.unflatten(0, (threads, -1))
        return torch.bmm(x.view(threads, 1, -1), parts).sum(0)[0]
    return torch.mv(weight, x)


class Linear(nn.Module):
    r"""``y = x W^T`` without bias, computed in the dtype of ``x``.

    The weight stays in the dtype it was made in (float32 in training) and is cast to the activation's dtype for the
    product, so that a bfloat16 network trains float32 weights without ``torch.autocast``.

    Args:
        in_features: size of the last dimension of ``x``.
        out_features: size of the last dimension of ``y``.
        std: standard deviation of the normal initialisation; None means ``1 / sqrt(in_features)``, which keeps the
            RMS of the activations.
        role: what an optimizer should take the weight for (see `declare`).
        split: rows of the matrices fused in this weight (see `declare`).

    Shapes: ``x`` is ``(..., in_features)``, the result ``(..., out_features)``, the weight ``(out, in)``.

    >>> layer = Linear(3, 5)
    >>> layer(torch.zeros(2, 3, dtype=torch.bfloat16)).dtype, layer.weight.dtype
    (torch.bfloat16, torch.float32)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        std: float | None = None,
        role: Role = "matrix",
        split: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        integer("in_features", in_features)
        integer("out_features", out_features)
        if std is not None:
            number("std", std, low=0)
        self.in_features, self.out_features = in_features, out_features
        self.std = 1 / math.sqrt(in_features) if std is None else std
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        declare(self, "weight", role, split)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight anew from ``N(0, std^2)``."""
        nn.init.normal_(self.weight, std=self.std)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., in_features)`` to ``(..., out_features)``."""
        weight: Tensor = self.weight
        if weight.dtype != x.dtype:
            weight = weight.to(x.dtype)
        if x.numel() == self.in_features and not torch.is_grad_enabled() and x.device.type == "cpu":
            # One token: the calls around the product count, and a matrix times a vector has the fewest.
            return matrix_vector(weight, x.view(-1)).view(*x.shape[:-1], -1)
        return F.linear(x, weight)

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        return f"in_features={self.in_features}, out_features={self.out_features}"
