r"""Auxiliary load-balancing loss by straight-through (kexue.fm 10735; Switch 2101.03961, GShard 2006.16668).

``F_i`` is the share of all choices that fell on expert ``i``, ``P_i`` the mean of the normalised score. What one wants
to minimise is a distance of ``F`` from a target ``Q``; ``F`` comes from counting and has no derivative, so it is given
that of ``P``:

.. math:: L(F) \to L(P + \mathrm{sg}[F - P]), \qquad \partial L / \partial P_i = L'_i(F).

With ``L = n/2 |F - Q|^2`` and uniform ``Q`` this is the gradient of the usual ``n sum F_i P_i`` (``sum P`` is 1); with
``sum F log(F/Q)`` that of ``sum P_i log(F_i / Q_i)``. The value of ``n F.P`` itself measures nothing.

The gradient is linear in ``P``, so micro-batches add up to the loss of the whole batch as long as ``F`` is counted over
all of it: `danlu.nn.balance` counts over micro-batches and ranks, and the layer adds the gradient in its own backward
pass. ``F`` holds the micro-batches of a step up to the present one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from danlu._validate import literals, number
from danlu.protocols import BalanceConfig


@dataclass(frozen=True, kw_only=True)
class AuxiliaryLossConfig(BalanceConfig):
    """Weight, form and target of an auxiliary balancing loss."""

    auxiliary: ClassVar[bool] = True

    weight: float = 1e-2
    """factor on the loss, which is an average over tokens: 1e-2 with softmax gates in Switch"""
    form: Literal["square", "entropy"] = "square"
    """``n / 2 * |F - Q|^2``, or ``sum F log(F / Q)``"""
    target: tuple[float, ...] | None = None
    """load Q wanted of each expert, in any unit; None: the same of all"""

    def __post_init__(self) -> None:
        number("weight", self.weight, low=0)
        literals(self)
        for share in self.target or ():
            number("target", share, low=0, low_open=True)

    def check(self, num_experts: int, top_k: int, *, gate: str, select_by: str, num_groups: int) -> None:
        """Raise ValueError unless ``target`` names a load for every expert."""
        if self.target is not None and len(self.target) != num_experts:
            raise ValueError(f"target must name a load for each of {num_experts} experts, got {len(self.target)}")

    def load_gradient(self, counts_e: Tensor) -> Tensor:
        """Derivative of the loss by the load, see the function `load_gradient`."""
        return load_gradient(counts_e, self)


def square(load_e: Tensor, target_e: Tensor) -> Tensor:
    """``n/2 |F - Q|^2``."""
    return load_e.shape[-1] / 2 * (load_e - target_e).square().sum()


def entropy(load_e: Tensor, target_e: Tensor) -> Tensor:
    """``sum F log(F / Q)``, the Kullback-Leibler divergence of the load from its target."""
    return (load_e * (load_e / target_e).log()).sum()


FORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"square": square, "entropy": entropy}


def straight_through(share_ne: Tensor, selected_ne: Tensor) -> Tensor:
    """The load ``F`` of the experts, ``(E,)``, with the derivative of the mean share ``P``.

    Write any loss in it and differentiate: target, form and normalisation are free.

    Args:
        share_ne: scores of tokens for experts, ``(N, E)``, as they are or divided by their sum.
        selected_ne: 1 / K where expert and token were matched, 0 elsewhere.

    >>> share = torch.tensor([[0.75, 0.25], [0.5, 0.5]], requires_grad=True)
    >>> load = straight_through(share, torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    >>> load.detach(), torch.autograd.grad(load.square().sum() / 2, share)[0]
    (tensor([1., 0.]), tensor([[0.5000, 0.0000], [0.5000, 0.0000]]))
    """
    mean = share_ne.mean(0)
    return mean + (selected_ne.mean(0) - mean).detach()


def load_gradient(counts_e: Tensor, config: AuxiliaryLossConfig) -> Tensor:
    """Derivative of the weighted loss by the load, at the load of the choices counted: ``(E,)``.

    An expert without a choice counts half a one: the logarithm of nothing is not finite.

    >>> load_gradient(torch.tensor([3.0, 1.0]), AuxiliaryLossConfig(weight=1.0))
    tensor([ 0.5000, -0.5000])
    """
    total = counts_e.sum().clamp_min(1)
    counts_e = counts_e.clamp_min(0.5) if config.form == "entropy" else counts_e
    if config.target is None:
        target = torch.full_like(counts_e, 1 / counts_e.shape[-1])
    else:
        target = torch.tensor(config.target, dtype=counts_e.dtype, device=counts_e.device)
        target = target / target.sum()
    with torch.enable_grad():
        load = (counts_e / total).detach().requires_grad_()
        (gradient,) = torch.autograd.grad(config.weight * FORMS[config.form](load, target), load)
    return gradient
