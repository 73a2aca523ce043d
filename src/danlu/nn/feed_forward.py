"""Gated feed-forward layer (Shazeer, arXiv 2002.05202), with SiLU or SquarePlus in its gate."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from danlu._autograd import Fused
from danlu.nn.linear import Linear
from danlu.protocols import ActivationConfig


class _SwiGLU(Fused):
    """``silu(gate) * up`` that keeps its input alone: the activations are formed again in the backward pass."""

    @staticmethod
    def plain(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    @staticmethod
    def fast(_: Any, gate_up: Tensor) -> tuple[Tensor]:
        gate, up = gate_up.chunk(2, dim=-1)
        return (F.silu(gate).mul_(up),)

    @staticmethod
    def derivative(_: Any, grad: Tensor, inputs: Sequence[Any], kept: Sequence[Tensor]) -> tuple[Tensor]:
        return (swiglu_backward(grad, inputs[0]),)


def swiglu_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    """Gradient of `swiglu` with respect to ``gate_up``, written into one buffer."""
    gate, up = gate_up.chunk(2, dim=-1)
    result = torch.empty_like(gate_up)
    grad_gate, grad_up = result.chunk(2, dim=-1)
    torch.mul(grad, F.silu(gate), out=grad_up)
    torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
    return result


def swiglu(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` for ``gate_up = [gate, up]`` along the last dimension: ``(..., 2h) -> (..., h)``.

    >>> swiglu(torch.tensor([[1.0, 2.0]])).round(decimals=4)
    tensor([[1.4621]])
    """
    return _SwiGLU.of(gate_up, by_hand=torch.is_grad_enabled())


class FeedForward(nn.Module):
    """``W_down (silu(W_gate x) * (W_up x))``, or another activation than SiLU; gate and up share one fused weight.

    Args:
        dim: size of input and output.
        hidden: width of the gated layer.
        out_std: standard deviation of ``W_down``; None means ``1 / sqrt(hidden)``.
        activation: of the gate; None is SiLU.

    Shapes: ``(..., dim)`` to ``(..., dim)``.

    >>> FeedForward(4, 6)(torch.zeros(2, 4)).shape
    torch.Size([2, 4])
    """

    def __init__(
        self, dim: int, hidden: int, *, out_std: float | None = None, activation: ActivationConfig | None = None
    ) -> None:
        super().__init__()
        self.gate_up = Linear(dim, 2 * hidden, split=(hidden, hidden))
        self.activation = None if activation is None else activation.build()
        self.down = Linear(hidden, dim, std=out_std)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to ``(..., dim)``."""
        gate_up = self.gate_up(x)
        if self.activation is None:
            hidden = swiglu(gate_up)
        else:
            gate, up = gate_up.chunk(2, dim=-1)
            hidden = self.activation(gate) * up
        y: Tensor = self.down(hidden)
        return y
