"""Root-mean-square normalisation (Zhang and Sennrich, arXiv 1910.07467)."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from danlu._autograd import Fused, kept, ordinary
from danlu._roles import declare
from danlu._validate import integer, positive


def _wide(x: Tensor) -> Tensor:
    """``x`` in what the norm is computed in: float32 for 16-bit dtypes."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _scale(wide: Tensor, eps: float) -> Tensor:
    """``1 / rms(x)``."""
    norm: Tensor = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return norm.square_().div_(wide.shape[-1]).add_(eps).rsqrt_()


@kept
def _constants(dim: int, eps: float, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Zero and ``sqrt(dim eps)`` as tensors: a Python number would be made into one at every call."""
    zero = torch.zeros((), dtype=dtype, device=device)
    return zero, torch.full_like(zero, math.sqrt(dim * eps))


def _normalised_few(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """The whole norm in four operations, for a CPU and a few tokens: there the calls count, not the arithmetic."""
    dim = x.shape[-1]
    wide = _wide(x)
    zero, floor = _constants(dim, eps, wide.dtype, x.device)
    size = torch.hypot(torch.linalg.vector_norm(wide, dim=-1, keepdim=True), floor)
    y = torch.addcdiv(zero, wide, size, value=math.sqrt(dim)).mul_(gain)
    return y if y.dtype == x.dtype else y.to(x.dtype)


class _RMSNorm(Fused):
    """``x / rms(x) * gain`` with a backward that reads each tensor once instead of once an operation."""

    @staticmethod
    def plain(x: Tensor, gain: Tensor, eps: float) -> Tensor:
        wide = _wide(x)
        return nn.functional.rms_norm(wide, gain.shape, gain.to(wide.dtype), eps).to(x.dtype)

    @staticmethod
    def fast(_: Any, x: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        wide = _wide(x)
        scale = _scale(wide, eps)
        return (wide * scale).mul_(gain).to(x.dtype), scale

    @staticmethod
    def derivative(_: Any, grad: Tensor, inputs: Sequence[Any], kept: Sequence[Tensor]) -> tuple[Tensor, Tensor, None]:
        x, gain, _ = inputs
        (scale,) = kept
        normed, wide, gain = _wide(x) * scale, _wide(grad), gain.to(scale.dtype)
        product = wide * normed
        grad_gain = product.flatten(0, -2).sum(0) if product.dim() > 1 else product
        mean = (product @ gain).div_(gain.shape[0]).unsqueeze(-1)
        return (wide * gain).addcmul_(normed, mean, value=-1).mul_(scale), grad_gain, None


class RMSNorm(nn.Module):
    r"""``y = x / sqrt(mean(x^2) + eps) * gain`` over the last dimension.

    Sums in float32 when ``x`` is bfloat16 or float16; the gain stays in its own dtype, the result has the dtype
    of ``x``. Differentiable any number of times; first derivatives are computed by hand.

    Args:
        dim: size of the last dimension.
        eps: added to the mean square; 1e-6.

    >>> norm = RMSNorm(4)
    >>> norm(torch.tensor([2.0, -2.0, 2.0, -2.0])).round(decimals=4)
    tensor([ 1., -1.,  1., -1.], grad_fn=<RoundBackward1>)
    """

    def __init__(self, dim: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        integer("dim", dim)
        positive("eps", eps)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        declare(self, "weight", "gain")

    def reset_parameters(self) -> None:
        """Set every gain to one."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``(..., dim)``."""
        if torch.is_grad_enabled() or not ordinary(x):
            return _RMSNorm.of(x, self.weight, self.eps)
        if x.device.type == "cpu":
            return _normalised_few(x, self.weight, self.eps)
        return nn.functional.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)
