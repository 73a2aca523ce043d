"""Tiger: Lion with one decay, steps that know the size of what they move, and accumulation without a second buffer.

    m <- [beta at the first of k micro-steps, else 1] m + (1 - beta) / k g
    W <- W - lr s(W) (sign(m) + weight_decay W)           (at the last of k micro-steps)

s(W) is the root mean square of W, one for each row of an embedding, and 1/2 for gains and biases, which do not decay.

Source: Su, "Tiger: A Tight-fisted Optimizer" (kexue.fm 9512, 2023).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from danlu._roles import ROLES, declared
from danlu._validate import choice, integer, number
from danlu.optim._base import MomentumOptimizer
from danlu.optim._common import all_finite, check_rate, descend_, is_dtensor, on_cpu, pieces, row_pieces
from danlu.optim._config import probe, without_decay
from danlu.optim._sharded import check_placement, local, sum_shards_
from danlu.optim.groups import param_groups
from danlu.optim.rounding import check_rounding

SCALES = ("rms", "none")
_SMALL = ("gain", "bias")  # roles whose s(W) is 1/2, and which do not decay


class Tiger(MomentumOptimizer):
    """Sign momentum with relative steps, gradient accumulation in its one state buffer, and a rule for NaN.

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
        rounding: of bfloat16 parameters, ``nearest``, ``stochastic`` or ``compensated``: see docs/optim/rounding.md.
        rounding_seed: of ``stochastic``.

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
        rounding: str = "nearest",
        rounding_seed: int = 0,
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
            "rounding": rounding,
            "rounding_seed": rounding_seed,
        }
        check_rounding("", defaults)
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
        """Raise if no process holds entries of the parameter itself, or what was declared of it cannot be."""
        check_placement(name, parameter)
        declared(name, parameter)

    def update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], *slots: list[Tensor]) -> None:
        """Take one micro-step for the parameters and momenta of a group, in place, each process its own entries."""
        step = _MicroStep.of(group)
        if group["accumulate"] > 1:  # torch.compile takes any write to a group for a change of the program
            group["micro_step"] = (group["micro_step"] + 1) % group["accumulate"]
        roles = [_role(parameter, group) for parameter in params]
        grads = [local(grad, parameter) for grad, parameter in zip(grads, params)]
        relative = group["scale"] == "rms"
        shards = _of_shards(params, grads, roles, sized=relative and step.last) if any(map(is_dtensor, params)) else []
        for index, (parameter, grad, momentum, role) in enumerate(zip(params, grads, *slots, roles)):
            small = relative and role in _SMALL
            size: Tensor | float = 1.0
            if relative and step.last:
                size = 0.5 if small else shards[index][1] if shards else _size(parameter, role)
            grad = -grad if group["maximize"] else grad
            one = _Subject(
                parameter=local(parameter),
                grad=grad,
                momentum=local(momentum),
                finite=shards[index][0] if shards else all_finite(grad),
                size=size,
                decay=0.0 if small else group["weight_decay"],
                neutral=1.0 if role == "gain" else 0.0,
            )
            (_update_on_cpu if on_cpu(one.parameter) else _update)(one, step)


class _MicroStep(NamedTuple):
    """What one call of ``step`` does to every parameter of a group."""

    lr: float | Tensor
    kept: float  # of the momentum
    weight: float  # of the gradient
    averaging: bool  # whether the two sum to one
    last: bool  # of the micro-steps that make a step: the weights move
    shrink: float

    @staticmethod
    def of(group: Mapping[str, Any]) -> "_MicroStep":
        beta, count, done = group["beta"], group["accumulate"], group["micro_step"]
        return _MicroStep(
            lr=group["lr"],
            kept=beta if done == 0 else 1.0,
            weight=(1.0 - beta) / count,
            averaging=count == 1,
            last=done == count - 1,
            shrink=group["shrink"],
        )


class _Subject(NamedTuple):
    """A parameter, as far as this process holds it, with what holds for it alone."""

    parameter: Tensor
    grad: Tensor
    momentum: Tensor
    finite: Any  # whether the whole gradient is: a bool, or a tensor that the host does not read
    size: Tensor | float  # s(W)
    decay: float
    neutral: float


def _role(parameter: Tensor, options: Mapping[str, Any]) -> str:
    """Return the role that holds for a parameter: its group's, its own, or what its shape suggests."""
    role: str | None = options["role"] or getattr(parameter, "danlu_role", None)
    return role or ("gain" if parameter.ndim <= 1 else "matrix")


def _averaged(role: str, ndim: int) -> tuple[int, ...]:
    """Return the dimensions over which s(W) is a mean: of an embedding's rows the last one, else all."""
    return (ndim - 1,) if role == "embedding" and ndim >= 2 else tuple(range(ndim))


def _size(parameter: Tensor, role: str) -> Tensor:
    """Return s(W): what one unit of the relative learning rate is for a parameter."""
    axes, wide = _averaged(role, parameter.ndim), torch.promote_types(parameter.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(parameter, dim=axes, keepdim=len(axes) < parameter.ndim, dtype=wide)
    scale: Tensor = norm / max(1, math.prod([parameter.shape[axis] for axis in axes])) ** 0.5
    return scale


def _of_shards(
    params: list[Tensor], grads: list[Tensor], roles: list[str], *, sized: bool
) -> list[tuple[Tensor, Tensor | float]]:
    """Return, for sharded parameters, whether the gradient is finite and s(W): one all-reduce for all.

    The size is 1 unless ``sized``.
    """
    axes = [_averaged(role, parameter.ndim) for role, parameter in zip(roles, params)]
    wide = [torch.promote_types(parameter.dtype, torch.float32) for parameter in params]
    bad = [torch.isfinite(grad).logical_not_().sum().to(dtype) for grad, dtype in zip(grads, wide)]
    squares = [
        torch.linalg.vector_norm(local(p), dim=over, keepdim=len(over) < p.ndim, dtype=dtype).square_()
        for p, over, dtype in zip(params if sized else (), axes, wide)
    ]
    everything = [range(parameter.ndim) for parameter in params]
    sum_shards_([*bad, *squares], [*params, *params], [*everything, *axes])
    sizes = [(s / max(1, math.prod([p.shape[a] for a in over]))).sqrt_() for s, p, over in zip(squares, params, axes)]
    return list(zip([count == 0 for count in bad], sizes or len(params) * [1.0]))


def _update_on_cpu(one: _Subject, step: _MicroStep) -> None:
    """Take one micro-step for one parameter in memory that the host may look at: :func:`_update` in fewer passes."""
    parameter, grad, momentum = one.parameter, one.grad, one.momentum
    if not one.finite:
        parameter.sub_(one.neutral).mul_(step.shrink).add_(one.neutral)
        return
    if isinstance(one.size, Tensor) and one.size.ndim:  # one for each row
        _accumulate(momentum, grad, step)
        for p, m, by in row_pieces(parameter, momentum, step.lr * one.size):
            p.mul_(1.0 - by * one.decay).sub_(m.sign().mul_(by))
        return
    rate = step.lr * (one.size if isinstance(step.lr, Tensor) else float(one.size))
    for p, g, m in pieces(parameter, grad, momentum):
        _accumulate(m, g, step)
        if step.last:
            descend_(p, m.sign(), rate, one.decay)


def _accumulate(momentum: Tensor, grad: Tensor, step: _MicroStep) -> None:
    """Set the momentum to ``kept * momentum + weight * grad``."""
    if step.averaging:
        momentum.lerp_(grad, step.weight)
    else:
        momentum.mul_(step.kept).add_(grad, alpha=step.weight)


def _update(one: _Subject, step: _MicroStep) -> None:
    """Take one micro-step for one parameter, without waiting for the device."""
    parameter, grad, momentum = one.parameter, one.grad, one.momentum
    kept = momentum if step.kept == 1.0 else momentum.mul(step.kept)
    grown = torch.where(one.finite, kept.add(grad, alpha=step.weight), momentum)
    moved = parameter
    if step.last:
        rate = step.lr * one.size
        moved = parameter * (1.0 - rate * one.decay) - grown.sign() * rate
    shrunk = (parameter - one.neutral).mul_(step.shrink).add_(one.neutral)
    # Both at the end: the compiler fails on a momentum that is written and then read beside a mean over rows.
    torch._foreach_copy_([momentum, parameter], [grown, torch.where(one.finite, moved, shrunk)])


@dataclass(frozen=True, kw_only=True)
class TigerConfig:
    """Tiger for every parameter, each by the size that its role gives it.

    Attributes:
        lr: relative learning rate.
        beta: decay of the momentum.
        weight_decay: decoupled decay, not for gains and biases.
        rounding: of bfloat16 weights: ``nearest``, ``stochastic`` or ``compensated``; wider ones are left as they are.
        rounding_seed: of ``stochastic``.
    """

    lr: float = 2e-3
    beta: float = 0.965
    weight_decay: float = 0.01
    rounding: Literal["nearest", "stochastic", "compensated"] = "nearest"
    rounding_seed: int = 0

    def __post_init__(self) -> None:
        Tiger(probe(), **self.options())

    def options(self) -> dict[str, Any]:
        """Return the arguments of :class:`Tiger`."""
        return {
            "lr": self.lr,
            "beta": self.beta,
            "weight_decay": self.weight_decay,
            "rounding": self.rounding,
            "rounding_seed": self.rounding_seed,
        }

    def build(self, model: nn.Module, **others: Any) -> Tiger:
        """Return the optimizer of all parameters of ``model`` that require a gradient, grouped by role.

        >>> [group["role"] for group in TigerConfig().build(nn.Linear(2, 3)).param_groups]
        ['matrix', 'bias']
        """
        return Tiger(without_decay(param_groups(model), _SMALL), **self.options())
