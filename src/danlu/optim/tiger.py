"""Tiger: Lion with one decay, steps that know the size of what they move, and accumulation without a second buffer.

    m <- [beta at the first of k micro-steps, else 1] m + (1 - beta) / k g
    W <- W - lr s(W) (sign(m) + weight_decay W)           (at the last of k micro-steps)

s(W) is the root mean square of W, one for each row of an embedding, and 1/2 for gains and biases, which do not decay.

Source: Su, "Tiger: A Tight-fisted Optimizer" (kexue.fm 9512, 2023).
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from danlu._validate import choice, integer, number
from danlu.optim._common import MomentumOptimizer, check_rate, descend_, on_cpu, pieces, row_pieces
from danlu.optim.groups import ROLES, declared

SCALES = ("rms", "none")


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

    def update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], *slots: list[Tensor]) -> None:
        """Take one micro-step for the parameters and momenta of a group, in place."""
        first, last = group["micro_step"] == 0, group["micro_step"] == group["accumulate"] - 1
        if group["accumulate"] > 1:  # torch.compile takes any write to a group for a change of the program
            group["micro_step"] = (group["micro_step"] + 1) % group["accumulate"]
        for index, (parameter, grad, momentum) in enumerate(zip(params, grads, *slots)):
            role = group["role"] or declared(f"parameter {index}", parameter)[0]
            role = role or ("gain" if parameter.ndim <= 1 else "matrix")
            grad = -grad if group["maximize"] else grad
            rule = _update_on_cpu if on_cpu(parameter) else _update
            rule(parameter, grad, momentum, group, role, first=first, last=last)


def _size(parameter: Tensor, role: str) -> Tensor | float:
    """Return s(W): what one unit of the relative learning rate is for a parameter."""
    if role in ("gain", "bias"):
        return 0.5
    wide = torch.promote_types(parameter.dtype, torch.float32)
    axes = -1 if role == "embedding" and parameter.ndim >= 2 else tuple(range(parameter.ndim))
    count = parameter.shape[-1] if axes == -1 else parameter.numel()
    norm: Tensor = torch.linalg.vector_norm(parameter, dim=axes, keepdim=axes == -1, dtype=wide)
    scale: Tensor = norm / max(1, count) ** 0.5
    return scale


def _all_finite(tensor: Tensor) -> bool:
    """Say whether every entry of a tensor on a CPU is finite: if the sum is, all are; else it may have overflowed."""
    return math.isfinite(float(tensor.sum())) or bool(torch.isfinite(tensor).all())


def _update_on_cpu(
    parameter: Tensor, grad: Tensor, momentum: Tensor, group: dict[str, Any], role: str, *, first: bool, last: bool
) -> None:
    """Take one micro-step for one parameter in memory that the host may look at."""
    if not _all_finite(grad):
        neutral = 1.0 if role == "gain" else 0.0
        parameter.sub_(neutral).mul_(group["shrink"]).add_(neutral)
        return
    relative = group["scale"] == "rms"
    decay = 0.0 if relative and role in ("gain", "bias") else group["weight_decay"]
    size = _size(parameter, role) if relative and last else 1.0
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
    parameter: Tensor, grad: Tensor, momentum: Tensor, group: dict[str, Any], role: str, *, first: bool, last: bool
) -> None:
    """Take one micro-step for one parameter, without waiting for the device."""
    # The largest entry is not finite as soon as one is; a sum could overflow by itself.
    finite = torch.isfinite(torch.linalg.vector_norm(grad, float("inf"))) if grad.numel() else torch.tensor(True)
    weight = (1.0 - group["beta"]) / group["accumulate"]
    kept = momentum.mul(group["beta"]) if first else momentum
    momentum.copy_(torch.where(finite, kept.add(grad, alpha=weight), momentum))
    relative = group["scale"] == "rms"
    neutral = 1.0 if role == "gain" else 0.0
    shrunk = (parameter - neutral).mul_(group["shrink"]).add_(neutral)
    if last:
        size = _size(parameter, role) if relative else 1.0
        decay = 0.0 if relative and role in ("gain", "bias") else group["weight_decay"]
        rate = group["lr"] * size
        moved = parameter * (1.0 - rate * decay) - momentum.sign() * rate
    else:
        moved = parameter
    parameter.copy_(torch.where(finite, moved, shrunk))
