"""Root-mean-square normalisation (Zhang and Sennrich, arXiv 1910.07467)."""

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from danlu._roles import declare
from danlu._validate import integer, positive


def _normalised(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``x / rms(x)`` and ``1 / rms(x)``, in float32 for 16-bit dtypes."""
    wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    norm: Tensor = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return wide * scale, scale


@lru_cache(maxsize=64)
def _constants(dim: int, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Zero and ``sqrt(dim eps)`` as tensors: a Python number would be made into one at every call."""
    with torch.inference_mode(False):
        return torch.zeros((), dtype=dtype), torch.tensor(math.sqrt(dim * eps), dtype=dtype)


def _normalised_few(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """The whole norm in four operations, for a CPU and a few tokens: there the calls count, not the arithmetic."""
    dim = x.shape[-1]
    wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    zero, floor = _constants(dim, eps, wide.dtype)
    size = torch.hypot(torch.linalg.vector_norm(wide, dim=-1, keepdim=True), floor)
    y = torch.addcdiv(zero, wide, size, value=math.sqrt(dim)).mul_(gain)
    return y if y.dtype == x.dtype else y.to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    """``x / rms(x) * gain`` with a backward that reads each tensor once instead of once an operation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        normed, scale = _normalised(x, eps)
        ctx.save_for_backward(normed, scale, gain)
        y = normed * gain
        return y.to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        normed, scale, gain = ctx.saved_tensors
        wide = grad.to(normed.dtype)
        product = wide * normed
        grad_gain = product.flatten(0, -2).sum(0) if product.dim() > 1 else product
        mean = (product @ gain).div_(gain.shape[0]).unsqueeze(-1)
        grad_x = (wide * gain).addcmul_(normed, mean, value=-1).mul_(scale)
        return grad_x.to(grad.dtype), grad_gain, None


class RMSNorm(nn.Module):
    r"""``y = x / sqrt(mean(x^2) + eps) * gain`` over the last dimension.

    Sums in float32 when ``x`` is bfloat16 or float16; the gain stays in its own dtype, the result has the dtype
    of ``x``. First derivatives only (the backward is a hand-fused one).

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
        compiling, grad = torch.compiler.is_compiling(), torch.is_grad_enabled()
        if not compiling and not grad and x.device.type == "cpu":
            return _normalised_few(x, self.weight, self.eps)
        if compiling or not grad:
            # Inductor fuses the plain formula itself, and inference needs no saved tensors.
            return nn.functional.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)
        y: Tensor = _RMSNorm.apply(x, self.weight, self.eps)
        return y
