r"""SquarePlus, the algebraic cousin of softplus (Barron, arXiv 2112.11687; kexue.fm 8833).

.. math:: \mathrm{sq}(x) = \frac{x + \sqrt{x^2 + b}}{2}
    = \max(x, 0) + \frac{b/2}{\sqrt{x^2 + b} + |x|}, \qquad
    \mathrm{sq}'(x) = \frac{\mathrm{sq}(x)}{\sqrt{x^2 + b}}

The first form loses every digit to cancellation where ``x`` is far below zero (in float32 it is 0 at -10000, where the
value is 1e-4). The second is a sum and quotient of positive numbers: it is accurate to the last digits for every ``x``,
and is what is computed here, the derivative as well. Where ``x^2`` overflows it still gives ``max(x, 0)``.

The choice of ``b`` (0 is ReLU) decides how near to softplus it lies; the named values are exact to float64.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from danlu._autograd import Fused
from danlu._roles import declare
from danlu._validate import number

EQUAL_AT_ZERO = 4 * math.log(2) ** 2
"""``b`` at which squareplus(0) is softplus(0) = log 2."""

DOMINANT = EQUAL_AT_ZERO
"""Smallest ``b`` at which squareplus is nowhere below softplus: the same, since the log of softplus is concave."""

MINIMAX = 1.52382103251875066
"""``b`` whose largest distance from softplus, 0.0759314499, is smallest; reached at 0 and at +-3.5646 in turn."""

EQUAL_CURVATURE = 4.0
"""``b`` at which the second derivatives at 0 agree, both 1/4."""

_BLOCK = 1 << 16
"""Elements worked on at a time on a CPU: the intermediate results then stay in its second-level cache."""


def _with_root(x: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Value and root in operations that torch differentiates rightly, to any order and at 0 as well."""
    root = torch.sqrt(x * x + b)
    # Unlike relu and abs, these have the one-sided slope 1 at 0: the kinks of the two terms cancel there.
    y = x.clamp_min(0) + b / 2 / (root + torch.where(x >= 0, x, -x))
    return y, root


def _blocks(b: Tensor, *tensors: Tensor) -> bool:
    """Whether the work can go through the cache block by block: one number ``b``, contiguous tensors on a CPU."""
    first = tensors[0]
    return first.device.type == "cpu" and b.dim() == 0 and first.numel() > 0 and all(t.is_contiguous() for t in tensors)


def _blockwise(x: Tensor, b: Tensor) -> Tensor:
    """Value, block by block."""
    sum_, y = x.new_empty(min(_BLOCK, x.numel())), torch.empty_like(x)
    half = b / 2
    for x_s, y_s in zip(*(t.view(-1).split(_BLOCK) for t in (x, y))):
        root, sum_ = y_s, sum_[: len(x_s)]
        torch.addcmul(b, x_s, x_s, out=root).sqrt_()
        torch.abs(x_s, out=sum_).add_(root)
        torch.clamp_min(x_s, 0, out=y_s).addcdiv_(half, sum_)
    return y


def _blockwise_backward(grad: Tensor, y: Tensor, b: Tensor) -> Tensor:
    """``grad / (1 + (sqrt(b) / (2 y))^2)``, block by block."""
    result, root, one = torch.empty_like(y), b.sqrt() / 2, torch.ones_like(b)
    for grad_s, y_s, to in zip(*(t.view(-1).split(_BLOCK) for t in (grad, y, result))):
        torch.div(root, y_s, out=to)
        torch.addcmul(one, to, to, out=to)
        torch.div(grad_s, to, out=to)
    return result


class _SquarePlus(Fused):
    """Keeps its output, from which the slope follows without a root: ``y^2 / (y^2 + b/4)``.

    It is formed as ``1 / (1 + (sqrt(b) / (2 y))^2)``, where no ``y`` is too large or too small.
    """

    @staticmethod
    def plain(x: Tensor, b: Tensor) -> Tensor:
        return _with_root(x, b)[0]

    @staticmethod
    def fast(_: Any, x: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        y = _blockwise(x, b) if _blocks(b, x) else _with_root(x, b)[0]
        return y, y

    @staticmethod
    def derivative(
        ctx: Any, grad: Tensor, inputs: Sequence[Any], kept: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        x, b = inputs
        (y,) = kept
        grad_b = None
        if ctx.needs[1]:
            grad_b = (grad / (4 * torch.addcmul(b, x, x).sqrt())).sum_to_size(b.shape)
        if _blocks(b, y, grad):
            return _blockwise_backward(grad, y, b), grad_b
        return grad / (1 + (b.sqrt() / (2 * y)).square()), grad_b


def _number_or_tensor(b: float | Tensor, x: Tensor) -> Tensor:
    """``b`` in the dtype of the computation, kept above zero: at b = 0 the root has no derivative at 0."""
    if not isinstance(b, Tensor):
        number("b", b, low=0)
        b = torch.tensor(b, dtype=x.dtype, device=x.device)
    return b.to(x.dtype).clamp_min(torch.finfo(x.dtype).tiny)


def _wide(x: Tensor) -> Tensor:
    """``x`` in float32 or float64: in half precision the square of 256 already overflows."""
    if not x.is_floating_point():
        raise TypeError(f"x must be a floating-point tensor, got {x.dtype}")
    return x.to(torch.promote_types(x.dtype, torch.float32))


def squareplus(x: Tensor, b: float | Tensor = EQUAL_CURVATURE) -> Tensor:
    """``(x + sqrt(x^2 + b)) / 2``, elementwise, in the dtype of ``x`` (half precision is computed in float32).

    Args:
        x: any shape, floating point.
        b: a number, or a tensor that broadcasts to ``x`` and may want a gradient; not negative. 0 is ReLU, with
            derivative 0 at 0 as in torch for the number 0, 1/2 for a tensor.

    Raises:
        ValueError: the number ``b`` is negative or not finite.

    >>> [f"{y:.5g}" for y in squareplus(torch.tensor([-1.0, 0.0, 1.0, -1e4]))]
    ['0.61803', '1', '1.618', '0.0001']
    """
    if not isinstance(b, Tensor) and b == 0:
        return F.relu(x)
    wide = _wide(x)
    b = _number_or_tensor(b, wide)
    by_hand = torch.is_grad_enabled() and (wide.requires_grad or b.requires_grad)
    return _SquarePlus.of(wide, b, by_hand=by_hand).to(x.dtype)


def squareplus_derivative(x: Tensor, b: float | Tensor = EQUAL_CURVATURE) -> Tensor:
    """``squareplus(x) / sqrt(x^2 + b)``, between 0 and 1, accurate in both tails; arguments as in `squareplus`.

    >>> [f"{slope:.5g}" for slope in squareplus_derivative(torch.tensor([-1e4, 0.0, 1e4]))]
    ['1e-08', '0.5', '1']
    """
    wide = _wide(x)
    b = _number_or_tensor(b, wide)
    y, root = _with_root(wide, b)
    return (y / root).to(x.dtype)


def squareplus_inverse(y: Tensor, b: float | Tensor = EQUAL_CURVATURE) -> Tensor:
    """``x = y - b / (4 y)``, the number whose `squareplus` is ``y > 0``; NaN for a ``y`` that none has.

    >>> squareplus_inverse(torch.tensor([0.5, 1.0])).tolist()
    [-1.5, 0.0]
    """
    wide = _wide(y)
    b = _number_or_tensor(b, wide)
    x = torch.where(wide > 0, wide - b / (4 * wide), torch.nan)
    return x.to(y.dtype)


@dataclass(frozen=True, kw_only=True)
class SquarePlusConfig:
    """Shape of a `SquarePlus`."""

    b: float = EQUAL_CURVATURE
    """how round the corner of ReLU is; 0 is ReLU"""
    learnable: bool = False
    """train b from there, one number a layer"""

    def __post_init__(self) -> None:
        number("b", self.b, low=0, low_open=self.learnable)

    def build(self, **others: Any) -> "SquarePlus":
        """Make the activation."""
        return SquarePlus(self)


class SquarePlus(nn.Module):
    """`squareplus` as a layer. A learnable ``b`` is the square of the parameter ``root``, so it stays positive.

    >>> SquarePlus(SquarePlusConfig(b=MINIMAX))(torch.zeros(1)).round(decimals=4)
    tensor([0.6172])
    """

    def __init__(self, config: SquarePlusConfig | None = None) -> None:
        super().__init__()
        self.config = SquarePlusConfig() if config is None else config
        self.root: nn.Parameter | None = None
        if self.config.learnable:
            self.root = nn.Parameter(torch.empty(()))
            declare(self, "root", "gain")
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Go back to the configured ``b``."""
        if self.root is not None:
            nn.init.constant_(self.root, math.sqrt(self.config.b))

    def forward(self, x: Tensor) -> Tensor:
        """Apply elementwise."""
        return squareplus(x, self.config.b if self.root is None else self.root.square())

    def extra_repr(self) -> str:
        """The constant, for ``print(model)``."""
        return f"b={self.config.b:g}" + (", learnable" if self.root is not None else "")
