"""Lion: the sign of a momentum that looks at the present gradient more than at the past.

    u <- sign(b1 m + (1 - b1) g)
    W <- W - lr (u + weight_decay W)
    m <- b2 m + (1 - b2) g                 (after u, which takes the old m)

Source: Chen et al., "Symbolic Discovery of Optimization Algorithms", arXiv:2302.06675, program 1.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from danlu._validate import choice, number
from danlu.linalg._matrix import is_finite
from danlu.optim._base import MomentumOptimizer
from danlu.optim._common import check_rate, descend_, finite_or_zero, on_cpu, pieces
from danlu.optim._config import by_role, check_by_role, dtype_of, probe
from danlu.optim._sharded import check_placement, local
from danlu.optim.groups import param_groups
from danlu.optim.rounding import check_rounding


class Lion(MomentumOptimizer):
    """Sign descent with two decays: every coordinate moves by exactly ``lr``, and one state buffer a parameter is kept.

    Coming from AdamW, divide the learning rate by 3 to 10 and multiply the decay by the same, so that their product
    stays; keep schedule and clipping. The weights end in a box of half-width ``1 / weight_decay``. A coordinate whose
    gradient has become zero keeps moving until its momentum has died out, which for rarely used rows of an embedding
    can take thousands of steps.

    An entry of a gradient that is not finite counts as zero, since a NaN would stay in the momentum and its weight
    never move again: the weight follows its momentum. :class:`danlu.optim.NonFiniteGuard` leaves out the whole step.

    Args:
        params: parameters, named parameters or groups; a group may carry every option below but ``momentum_dtype``.
        lr: learning rate, a number or a one-element tensor.
        betas: weight of the momentum inside the sign, and decay of the momentum. Language models take (0.95, 0.98).
        weight_decay: decoupled decay; the weights shrink by ``lr * weight_decay`` each step.
        maximize: climb instead of descending.
        momentum_dtype: dtype of the momentum; None for the parameter's own. The paper keeps bfloat16.
        foreach: update by fused multi-tensor calls. None: not on a CPU, where a loop that stays in cache is faster.
        rounding: of bfloat16 parameters, ``nearest``, ``stochastic`` or ``compensated``: see docs/optim/rounding.md.
        rounding_seed: of ``stochastic``.

    Raises:
        ValueError, TypeError: naming the argument, or the group and the parameter.

    >>> weight = torch.nn.Parameter(torch.tensor([1.0, 1.0, 1.0]))
    >>> optimizer = Lion([weight], lr=0.5)
    >>> weight.grad = torch.tensor([1e-3, -7.0, 0.0])
    >>> optimizer.step()
    >>> weight.tolist()
    [0.5, 1.5, 1.0]
    """

    slot = "exp_avg"
    exchanges = False
    own = ("momentum_dtype", "foreach")

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-4,
        *,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        maximize: bool = False,
        momentum_dtype: torch.dtype | None = None,
        foreach: bool | None = None,
        rounding: str = "nearest",
        rounding_seed: int = 0,
    ) -> None:
        if momentum_dtype is not None:
            choice("momentum_dtype", momentum_dtype, (torch.float32, torch.float64, torch.bfloat16))
        self.momentum_dtype, self.foreach = momentum_dtype, foreach
        defaults: dict[str, Any] = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        defaults |= {"rounding": rounding, "rounding_seed": rounding_seed}
        check_rounding("", defaults)
        self.check_options("", defaults)
        super().__init__(params, defaults)

    def check_options(self, where: str, options: Mapping[str, Any]) -> None:
        """Raise unless every option of a group is in its range; ``where`` begins the message."""
        check_rate(where, options["lr"])
        betas = options["betas"]
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise ValueError(f"{where}betas must be two numbers, got {betas!r}")
        number(f"{where}betas[0]", betas[0], low=0, high=1, high_open=True)
        number(f"{where}betas[1]", betas[1], low=0, high=1, high_open=True)
        number(f"{where}weight_decay", options["weight_decay"], low=0)

    def check_parameter(self, name: str, parameter: Tensor, options: Mapping[str, Any]) -> None:
        """Raise if no process holds entries of the parameter itself."""
        check_placement(name, parameter)

    def update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], *slots: list[Tensor]) -> None:
        """Update parameters and momenta of a group in place, each process its own entries."""
        if not params:
            return
        grads = [local(grad, parameter) for grad, parameter in zip(grads, params)]
        params, momenta = [[local(tensor) for tensor in tensors] for tensors in (params, *slots)]
        if group["maximize"]:
            grads = [-grad for grad in grads]
        foreach = self.foreach if self.foreach is not None else params[0].device.type != "cpu"
        rule = _foreach if foreach else _loop
        rule(params, grads, momenta, lr=group["lr"], betas=group["betas"], weight_decay=group["weight_decay"])


def _loop(
    P: list[Tensor],
    G: list[Tensor],
    M: list[Tensor],
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    weight_decay: float,
) -> None:
    for tensors in zip(P, G, M):
        for parameter, grad, momentum in pieces(*tensors):
            grad, direction = _finite(momentum, grad, betas[0])
            direction.sign_()
            if momentum.dtype == grad.dtype:
                momentum.lerp_(grad, 1.0 - betas[1])
            else:
                momentum.mul_(betas[1]).add_(grad, alpha=1.0 - betas[1])
            descend_(parameter, direction, lr, weight_decay)


def _foreach(
    P: list[Tensor],
    G: list[Tensor],
    M: list[Tensor],
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    weight_decay: float,
) -> None:
    G = [finite_or_zero(grad) for grad in G]
    U = list(torch._foreach_mul(M, betas[0]))
    torch._foreach_add_(U, G, alpha=1.0 - betas[0])
    torch._foreach_sign_(U)
    if weight_decay:
        torch._foreach_mul_(P, 1.0 - lr * weight_decay)
    if isinstance(lr, Tensor):
        torch._foreach_mul_(U, lr)
        torch._foreach_sub_(P, U)
    else:
        torch._foreach_add_(P, U, alpha=-lr)
    torch._foreach_mul_(M, betas[1])
    torch._foreach_add_(M, G, alpha=1.0 - betas[1])


def _finite(momentum: Tensor, grad: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Return the gradient with zeros for entries that are not finite, and the mixture of momentum and it."""
    if on_cpu(grad):
        direction = _mixed(momentum, grad, beta)
        # The mixture is in the cache: to read the gradient for this question alone costs a sixth of the step.
        if is_finite(direction):
            return grad, direction
    grad = finite_or_zero(grad)
    return grad, _mixed(momentum, grad, beta)


def _mixed(momentum: Tensor, grad: Tensor, beta: float) -> Tensor:
    """Return ``beta * momentum + (1 - beta) * grad`` in a new tensor, in the wider dtype of the two."""
    if momentum.dtype == grad.dtype:
        return torch.lerp(momentum, grad, 1.0 - beta)
    wide = torch.promote_types(momentum.dtype, grad.dtype)
    # A copy also where the momentum is the wider one already: what is returned is written on.
    return momentum.to(wide, copy=True).mul_(beta).add_(grad, alpha=1.0 - beta)


@dataclass(frozen=True, kw_only=True)
class LionConfig:
    """Lion for every parameter.

    Attributes:
        lr: learning rate, AdamW's divided by 3 to 10.
        betas: weight of the momentum inside the sign, and decay of the momentum.
        weight_decay: decoupled decay, AdamW's times what the learning rate was divided by.
        momentum_dtype: dtype of the momentum; ``auto`` is the parameter's own.
        embedding_lr: learning rate of the embeddings; None for lr.
        no_decay: roles without decay.
        rounding: of bfloat16 weights: ``nearest``, ``stochastic`` or ``compensated``; wider ones are left as they are.
        rounding_seed: of ``stochastic``.
    """

    lr: float = 3e-4
    betas: tuple[float, float] = (0.95, 0.98)
    weight_decay: float = 0.3
    momentum_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    embedding_lr: float | None = None
    no_decay: tuple[str, ...] = ("gain", "bias")
    rounding: Literal["nearest", "stochastic", "compensated"] = "nearest"
    rounding_seed: int = 0

    def __post_init__(self) -> None:
        Lion(probe(), **self.options())
        check_by_role(self.embedding_lr, self.no_decay)

    def options(self) -> dict[str, Any]:
        """Return the arguments of :class:`Lion`."""
        return {
            "lr": self.lr,
            "betas": self.betas,
            "weight_decay": self.weight_decay,
            "momentum_dtype": dtype_of("momentum_dtype", self.momentum_dtype),
            "rounding": self.rounding,
            "rounding_seed": self.rounding_seed,
        }

    def build(self, model: nn.Module, **others: Any) -> Lion:
        """Return the optimizer of all parameters of ``model`` that require a gradient, grouped by role.

        >>> LionConfig(lr=0.1).build(nn.Linear(2, 3)).param_groups[1]["weight_decay"]
        0.0
        """
        groups = by_role(param_groups(model), embedding_lr=self.embedding_lr, no_decay=self.no_decay)
        return Lion(groups, **self.options())
