"""Tiger: Lion with one decay, steps that know the size of what they move, and accumulation without a second buffer.

    m <- [beta at the first of k micro-steps, else 1] m + (1 - beta) / k g
    W <- W - lr s(W) (sign(m) + weight_decay W)           (at the last of k micro-steps)

s(W) is the root mean square of W, one for each row of an embedding, and 1/2 for gains and biases, which do not decay.

Source: Su, "Tiger: A Tight-fisted Optimizer" (kexue.fm 9512, 2023).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from danlu._roles import ROLES, declared
from danlu._validate import choice, integer, number
from danlu.optim._common import MomentumOptimizer, check_rate, descend_, is_dtensor, on_cpu, pieces, row_pieces
from danlu.optim._config import probe
from danlu.optim._sharded import check_placement, local, sum_shards_
from danlu.optim.groups import param_groups

SCALES = ("rms", "none")
_SMALL = ("gain", "bias")  # roles whose s(W) is 1/2, and which do not decay


class Tiger(MomentumOptimizer):
    """Sign momentum with relative steps, gradient accumulation in its one slot, and a rule for NaN.

    Call ``step`` and ``zero_grad`` after every micro-batch: with ``accumulate=k`` every k-th call moves the weights, by
    the mean gradient of the k, and no buffer beside the momentum is needed.

    **NaN rule.** A parameter whose gradient is not finite keeps its momentum and shrinks by ``shrink`` towards its
    neutral value, 1 for gains and 0 otherwise: what overflowed was too large.

    Args:
        params: parameters, named parameters or groups. A group may carry ``role``
            (:data:`danlu.optim.ROLES`; :func:`danlu.optim.param_groups` sets it) besides every option below. Without
            one, a parameter's ``danlu_role`` holds, then its shape: one dimension is a gain or bias.
        lr: relative learning rate; 0.001 to 0.002 at its peak.
        beta: decay of the momentum: 0.945 for images, 0.965 for language.
        weight_decay: decoupled decay, not for gains and biases.
        accumulate: micro-steps a step.
        scale: ``rms`` for s(W) above; ``none`` for 1 and decay everywhere, which makes Tiger Lion with equal betas.
        shrink: factor of the NaN rule.
        maximize: climb instead of descending.

    Raises:
        ValueError, TypeError: naming the argument, or the group and the parameter.

    >>> weight = torch.nn.Parameter(torch.tensor([[2.0, -2.0]]))
    >>> optimizer = Tiger([weight], lr=0.1, weight_decay=0.0)
    >>> weight.grad = torch.tensor([[1e-3, 5.0]])
    >>> optimizer.step()
    >>> weight.data
    tensor([[ 1.8000, -2.2000]])
    """

    slot = "exp_avg"

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        *,
        beta: float = 0.965,
        weight_decay: float = 0.01,
        accumulate: int = 1,
        scale: str = "rms",
        shrink: float = 0.99,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "beta": beta,
            "weight_decay": weight_decay,
            "accumulate": accumulate,
            "scale": scale,
            "shrink": shrink,
            "maximize": maximize,
            "role": None,
            "micro_step": 0,
        }
        self.check_options("", defaults)
        super().__init__(params, defaults)

    def check_options(self, where: str, options: Mapping[str, Any]) -> None:
        """Raise unless every option of a group is in its range; ``where`` begins the message."""
        check_rate(where, options["lr"])
        number(f"{where}beta", options["beta"], low=0, high=1, high_open=True)
        number(f"{where}weight_decay", options["weight_decay"], low=0)
        integer(f"{where}accumulate", options["accumulate"])
        choice(f"{where}scale", options["scale"], SCALES)
        number(f"{where}shrink", options["shrink"], low=0, high=1, low_open=True)
        if options["role"] is not None:
            choice(f"{where}role", options["role"], ROLES)

    def check_parameter(self, name: str, parameter: Tensor, options: Mapping[str, Any]) -> None:
        """Raise if no process holds entries of the parameter itself."""
        check_placement(name, parameter)

    def update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], *slots: list[Tensor]) -> None:
        """Take one micro-step for the parameters and momenta of a group, in place, each process its own entries."""
        first, last = group["micro_step"] == 0, group["micro_step"] == group["accumulate"] - 1
        if group["accumulate"] > 1:  # torch.compile takes any write to a group for a change of the program
            group["micro_step"] = (group["micro_step"] + 1) % group["accumulate"]
        roles = [_role(f"parameter {index}", parameter, group) for index, parameter in enumerate(params)]
        grads = [local(grad, parameter) for grad, parameter in zip(grads, params)]
        relative = group["scale"] == "rms"
        shards = _of_shards(params, grads, roles, sized=relative and last) if any(map(is_dtensor, params)) else []
        for index, (parameter, grad, momentum, role) in enumerate(zip(params, grads, *slots, roles)):
            here, grad = local(parameter), -grad if group["maximize"] else grad
            finite = shards[index][0] if shards else _finite(grad)
            size: Tensor | float = 1.0
            if relative and last:
                size = 0.5 if role in _SMALL else shards[index][1] if shards else _size(parameter, role)
            decay = 0.0 if relative and role in _SMALL else group["weight_decay"]
            neutral = 1.0 if role == "gain" else 0.0
            rule = _update_on_cpu if on_cpu(here) else _update
            rule(here, grad, local(momentum), group, finite, size, decay, neutral, first=first, last=last)


def _role(name: str, parameter: Tensor, options: Mapping[str, Any]) -> str:
    """Return the role that holds for a parameter: its group's, its own, or what its shape suggests."""
    role: str | None = options["role"] or declared(name, parameter)[0]
    return role or ("gain" if parameter.ndim <= 1 else "matrix")


def _kept(role: str, ndim: int) -> int:
    """Return how many of a parameter's dimensions s(W) has: it is a mean over the others."""
    return ndim - 1 if role == "embedding" and ndim >= 2 else 0


def _size(parameter: Tensor, role: str) -> Tensor:
    """Return s(W): what one unit of the relative learning rate is for a parameter."""
    kept, wide = _kept(role, parameter.ndim), torch.promote_types(parameter.dtype, torch.float32)
    axes = tuple(range(kept, parameter.ndim))
    norm: Tensor = torch.linalg.vector_norm(parameter, dim=axes, keepdim=kept > 0, dtype=wide)
    scale: Tensor = norm / max(1, math.prod(parameter.shape[kept:])) ** 0.5
    return scale


def _finite(grad: Tensor) -> Any:
    """Say whether every entry of a gradient is finite, on a device by a tensor, without waiting for it."""
    if on_cpu(grad):  # if the sum is finite, all are; else it may have overflowed
        return math.isfinite(float(grad.sum())) or bool(torch.isfinite(grad).all())
    # The largest entry is not finite as soon as one is; a sum could overflow by itself.
    return torch.isfinite(torch.linalg.vector_norm(grad, float("inf"))) if grad.numel() else torch.tensor(True)


def _of_shards(
    params: list[Tensor], grads: list[Tensor], roles: list[str], *, sized: bool
) -> list[tuple[Tensor, Tensor | float]]:
    """Return, for parameters cut over processes, whether the gradient is finite and s(W): one all-reduce for all.

    The size is 1 unless ``sized``.
    """
    kept = [_kept(role, parameter.ndim) for role, parameter in zip(roles, params)]
    wide = [torch.promote_types(parameter.dtype, torch.float32) for parameter in params]
    bad = [torch.isfinite(grad).logical_not_().sum().to(dtype) for grad, dtype in zip(grads, wide)]
    squares = [
        torch.linalg.vector_norm(local(p), dim=tuple(range(k, p.ndim)), keepdim=k > 0, dtype=dtype).square_()
        for p, k, dtype in zip(params if sized else (), kept, wide)
    ]
    sum_shards_([*bad, *squares], [*params, *params], [*len(params) * [0], *kept])
    sizes = [(s / max(1, math.prod(p.shape[k:]))).sqrt_() for s, p, k in zip(squares, params, kept)]
    return list(zip([count == 0 for count in bad], sizes or len(params) * [1.0]))


def _update_on_cpu(
    parameter: Tensor,
    grad: Tensor,
    momentum: Tensor,
    group: dict[str, Any],
    finite: Any,
    size: Tensor | float,
    decay: float,
    neutral: float,
    *,
    first: bool,
    last: bool,
) -> None:
    """Take one micro-step for one parameter in memory that the host may look at."""
    if not finite:
        parameter.sub_(neutral).mul_(group["shrink"]).add_(neutral)
        return
    kept, weight = group["beta"] if first else 1.0, (1.0 - group["beta"]) / group["accumulate"]
    averaging = group["accumulate"] == 1
    if isinstance(size, Tensor) and size.ndim:  # one for each row
        _accumulate(momentum, grad, kept, weight, averaging=averaging)
        for p, m, rate in row_pieces(parameter, momentum, group["lr"] * size):
            p.mul_(1.0 - rate * decay).sub_(m.sign().mul_(rate))
        return
    rate = group["lr"] * (size if isinstance(group["lr"], Tensor) else float(size))
    for p, g, m in pieces(parameter, grad, momentum):
        _accumulate(m, g, kept, weight, averaging=averaging)
        if last:
            descend_(p, m.sign(), rate, decay)


def _accumulate(momentum: Tensor, grad: Tensor, kept: float, weight: float, *, averaging: bool) -> None:
    """Set the momentum to ``kept * momentum + weight * grad``; ``averaging`` says that the two sum to one."""
    if averaging:
        momentum.lerp_(grad, weight)
    else:
        momentum.mul_(kept).add_(grad, alpha=weight)


def _update(
    parameter: Tensor,
    grad: Tensor,
    momentum: Tensor,
    group: dict[str, Any],
    finite: Any,
    size: Tensor | float,
    decay: float,
    neutral: float,
    *,
    first: bool,
    last: bool,
) -> None:
    """Take one micro-step for one parameter, without waiting for the device."""
    weight = (1.0 - group["beta"]) / group["accumulate"]
    kept = momentum.mul(group["beta"]) if first else momentum
    momentum.copy_(torch.where(finite, kept.add(grad, alpha=weight), momentum))
    moved = parameter
    if last:
        rate = group["lr"] * size
        moved = parameter * (1.0 - rate * decay) - momentum.sign() * rate
    shrunk = (parameter - neutral).mul_(group["shrink"]).add_(neutral)
    parameter.copy_(torch.where(finite, moved, shrunk))


@dataclass(frozen=True, kw_only=True)
class TigerConfig:
    """Tiger for every parameter, each by the size that its role gives it.

    Attributes:
        lr: relative learning rate.
        beta: decay of the momentum.
        weight_decay: decoupled decay, not for gains and biases.
    """

    lr: float = 2e-3
    beta: float = 0.965
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        Tiger(probe(), **self.options())

    def options(self) -> dict[str, Any]:
        """Return the arguments of :class:`Tiger`."""
        return {"lr": self.lr, "beta": self.beta, "weight_decay": self.weight_decay}

    def build(self, model: nn.Module, **others: Any) -> Tiger:
        """Return the optimizer of all parameters of ``model`` that require a gradient, grouped by role.

        >>> [group["role"] for group in TigerConfig().build(nn.Linear(2, 3)).param_groups]
        ['matrix', 'bias']
        """
        return Tiger(param_groups(model), **self.options())
