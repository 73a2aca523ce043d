"""Linear map whose weight keeps its own precision while the product follows the activations."""

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from danlu._roles import Role, declaration, declare, normal_split
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


class Linear(nn.Linear):
    r"""``y = x W^T`` without bias, computed in the dtype of ``x``.

    It is a ``torch.nn.Linear``, so that what looks for those finds it: PEFT, torchao, ``parallelize_module``. For tools
    that ask for that very class there is `as_torch_linear`.

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
        nn.Module.__init__(self)  # that of torch.nn.Linear would draw another weight
        integer("in_features", in_features)
        integer("out_features", out_features)
        if std is not None:
            number("std", std, low=0)
        self.in_features, self.out_features = in_features, out_features
        self.std = 1 / math.sqrt(in_features) if std is None else std
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.register_parameter("bias", None)
        declare(self, "weight", role, split)
        self.reset_parameters()

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter, but no weight of several matrices whose rows were shared out to processes.

        Raises:
            ValueError: tensor parallelism cuts a fused weight by rows (``ColwiseParallel``), which would give a process
                rows of one part and none of another.
        """
        cut = any(getattr(placement, "dim", None) == 0 for placement in getattr(param, "placements", ()))
        split = normal_split(declaration(self, name).split) if cut and name in self._parameters else None
        if split is not None:
            parts = f"{split} equal parts" if isinstance(split, int) else f"parts of {split} rows"
            raise ValueError(
                f"this weight of {self.out_features} rows is fused of {parts}, which a cut by rows (ColwiseParallel) "
                "would mix: leave it whole (the layer that reads it may still be cut by RowwiseParallel after a "
                "redistribution), or shard it by fully_shard, which puts it together before it is used"
            )
        super().register_parameter(name, param)

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


def as_torch_linear(model: nn.Module) -> nn.Module:
    """Put a ``torch.nn.Linear`` with the same weight in the place of every `Linear`.

    That is for tools which take no class but that very one, such as ``torch.ao.quantization.quantize_dynamic``. The
    product then needs activations of the weight's dtype.

    Args:
        model: what holds the layers, changed in place; it is none itself.

    Returns:
        ``model``.

    >>> model = as_torch_linear(nn.Sequential(Linear(3, 5)))
    >>> type(model[0]) is nn.Linear
    True
    """
    plain: dict[nn.Module, nn.Linear] = {}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is not Linear:
                continue
            if child not in plain:
                made = nn.Linear(child.in_features, child.out_features, bias=False, device="meta")
                made.weight = child.weight
                said = declaration(child, "weight")
                declare(made, "weight", cast(Role, said.role), said.split)
                plain[child] = made.train(child.training)
            setattr(parent, name, plain[child])
    return model
