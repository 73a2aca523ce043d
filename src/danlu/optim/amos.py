"""Amos: steps of the size that weights are expected to have, slowing down and decaying by themselves.

With the expected scale eta of a parameter, and one number v and one number b for each row of it, both from 0:

    q <- mean of g^2 over the row
    v <- beta v + (1 - beta) q                       r = (1 - beta^t) / max(v, eps)
    c = (1 + c_coef sqrt(lr) b)^(-1/2)               d = 1 / (1 + d_coef sqrt(lr eta) b)
    gamma = c lr^2 r q
    W <- W - d ((gamma / 2 + extra_l2) W + lr eta sqrt(r) g)
    b <- b + gamma (1 + b)                           (c and d take the old b)

Source: Tian & Parikh, "Amos: An Adam-style Optimizer with Adaptive Weight Decay towards Model-Oriented Scale",
arXiv:2210.11693, algorithm 1, with the decays of the program that its authors keep (jestimator, version 0.3.2).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from danlu._roles import ROLES, declared, map_of
from danlu._validate import choice, number, positive
from danlu.optim._base import MomentumOptimizer
from danlu.optim._common import check_rate, finite_or_zero, fusable, is_dtensor, on_cpu, row_pieces
from danlu.optim._config import probe, without_decay
from danlu.optim._sharded import check_placement, local, sum_shards_
from danlu.optim.groups import Group, param_groups
from danlu.optim.rounding import check_rounding

#: Roles of which every row, one input of a table or one output of a map, keeps slots of its own.
_BY_ROWS = ("matrix", "head", "embedding")


class Amos(MomentumOptimizer):
    """Adaptive steps whose learning rate and weight decay fall as the work is done, at half of AdamW's memory.

    The learning rate is the relative change of a weight in one step, about one over the root of the number of batches
    in the data; no schedule and no length of the run is needed, a warm-up does no harm. Second moments are kept for
    rows, not for weights, so that with momentum the state is half of AdamW's and without it next to nothing.

    An entry of a gradient that is not finite counts as zero, and one beyond 2^48 (2^500 in float64) as that, so that
    no mean of squares becomes infinite, which would stop its row for good.

    Args:
        params: parameters, named parameters or groups. A group may carry ``role``
            (:data:`danlu.optim.ROLES`; :func:`danlu.optim.param_groups` sets it) and ``eta``, the scale that its
            weights are expected to have, besides every option below. Without a role a parameter's ``danlu_role``
            holds, then its shape: at most one dimension is a gain, two are a matrix, three a stack of experts, more
            a convolution. Without eta :func:`amos_scale` gives it.
        lr: relative step, a number or a one-element tensor.
        beta: decay of the second moment, 1 - beta about ``lr``.
        momentum: decay of an average over the updates; None for none, and no memory for it.
        clip: largest size of an entry of the gradient; None for no limit.
        extra_l2: shrinks the weights by this fraction each step, besides the decay that Amos finds.
        c_coef: how fast the decay slows down.
        d_coef: how fast the steps become smaller.
        eps: smallest mean square of a gradient.
        maximize: climb instead of descending.
        rounding: of bfloat16 parameters, ``nearest``, ``stochastic`` or ``compensated``: see docs/optim/rounding.md.
        rounding_seed: of ``stochastic``.

    Raises:
        ValueError, TypeError: naming the argument, or the group and the parameter.

    >>> weight = torch.nn.Parameter(torch.zeros(2, 4))
    >>> optimizer = Amos([weight], lr=0.1)
    >>> weight.grad = torch.tensor([[3.0, -3.0, 3.0, 3.0], [0.0, 0.0, 0.0, 0.0]])
    >>> optimizer.step()
    >>> weight.data.mul(100).round()
    tensor([[-5.,  5., -5., -5.],
            [ 0.,  0.,  0.,  0.]])
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.01,
        *,
        beta: float = 0.999,
        momentum: float | None = None,
        clip: float | None = None,
        extra_l2: float = 0.0,
        c_coef: float = 0.25,
        d_coef: float = 0.25,
        eps: float = 2.0**-125,
        maximize: bool = False,
        rounding: str = "nearest",
        rounding_seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "beta": beta,
            "momentum": momentum,
            "clip": clip,
            "extra_l2": extra_l2,
            "c_coef": c_coef,
            "d_coef": d_coef,
            "eps": eps,
            "maximize": maximize,
            "role": None,
            "transposed": None,
            "eta": None,
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
        if options["momentum"] is not None:
            number(f"{where}momentum", options["momentum"], low=0, high=1, high_open=True)
        for name in ("clip", "eta"):
            if options[name] is not None:
                positive(f"{where}{name}", options[name])
        for name in ("extra_l2", "c_coef", "d_coef"):
            number(f"{where}{name}", options[name], low=0)
        positive(f"{where}eps", options["eps"])
        if options["role"] is not None:
            choice(f"{where}role", options["role"], ROLES)

    def check_parameter(self, name: str, parameter: Tensor, options: Mapping[str, Any]) -> None:
        """Raise if no process holds entries of the parameter itself."""
        check_placement(name, parameter)

    def slots(self, parameter: Tensor, options: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the state of a parameter before its first step."""
        wide = torch.promote_types(parameter.dtype, torch.float32)
        axes = _averaged(parameter, options)
        state = {
            "step": torch.zeros((), dtype=wide, device=parameter.device),
            "exp_avg_sq": _for_rows(parameter, axes, wide),
            "decay": _for_rows(parameter, axes, wide),
        }
        if options["momentum"] is not None:
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state

    def update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], *slots: list[Tensor]) -> None:
        """Update parameters and state of a group in place, each process its own entries and their rows."""
        if not params:
            return
        axes = [_averaged(parameter, group) for parameter in params]
        etas = [group["eta"] or _scale(parameter, group) for parameter in params]
        grads = [local(grad, parameter) for grad, parameter in zip(grads, params)]
        steps, second, decay, *averages = [[local(tensor) for tensor in tensors] for tensors in slots]
        if group["maximize"]:
            grads = [-grad for grad in grads]
        if group["clip"] is not None:
            grads = [grad.clamp(-group["clip"], group["clip"]) for grad in grads]
        taken = [_squared(grad, over, v.dtype) for grad, over, v in zip(grads, axes, second)]
        grads, squares = [grad for grad, _ in taken], [square for _, square in taken]
        if any(map(is_dtensor, params)):
            sum_shards_(squares, params, axes)
        torch._foreach_div_(
            squares, [float(max(1, math.prod([p.shape[a] for a in over]))) for p, over in zip(params, axes)]
        )
        shrinks, sizes = _factors(squares, steps, second, decay, etas, group)
        for index, (parameter, grad) in enumerate(zip(params, grads)):
            average = averages[0][index] if averages else None
            _move(local(parameter), grad, shrinks[index], sizes[index], average, group["momentum"] or 0.0)


def amos_scale(role: str, shape: Sequence[int]) -> float:
    """Return the root mean square that trained weights of a parameter are expected to have: Amos' eta.

    As in the paper's appendix: sqrt(2 / width) for embeddings, 1 for gains, 1/2 for biases, and 1 / sqrt(inputs) for
    every other map. The paper's sqrt(2 / inputs) for the second matrix of a feed-forward layer, and 1/2 for relative
    positions, are for a group's ``eta`` to say.

    Args:
        role: one of :data:`danlu.optim.ROLES`.
        shape: of the parameter, outputs before inputs as in ``torch.nn``.

    >>> amos_scale("matrix", (4096, 1024)), amos_scale("embedding", (50000, 512)), amos_scale("bias", (4096,))
    (0.03125, 0.0625, 0.5)
    """
    choice("role", role, ROLES)
    if role in ("gain", "bias"):
        return 1.0 if role == "gain" else 0.5
    inputs = math.prod(shape[1:]) if role in ("conv", "head") else (shape[-1] if shape else 1)
    return math.sqrt((2.0 if role == "embedding" else 1.0) / max(1, inputs))


def _role(parameter: Tensor, options: Mapping[str, Any]) -> str:
    """Return the role that holds for a parameter: its group's, its own, or what its shape suggests."""
    role: str | None = options["role"] or declared("the parameter", parameter)[0]
    return role or {0: "gain", 1: "gain", 2: "matrix", 3: "experts"}.get(parameter.ndim, "conv")


def _transposed(parameter: Tensor, options: Mapping[str, Any]) -> bool:
    """Say whether a weight is kept as (inputs, outputs)."""
    said: bool | None = options.get("transposed")
    return declared("the parameter", parameter).transposed if said is None else said


def _scale(parameter: Tensor, options: Mapping[str, Any]) -> float:
    """Return Amos' eta of a parameter, whichever way its weight is kept."""
    role, shape = _role(parameter, options), tuple(parameter.shape)
    if not _transposed(parameter, options):
        return amos_scale(role, shape)
    split = options.get("split") or declared("the parameter", parameter).split
    return amos_scale(role, map_of(role, shape, split, transposed=True))


def _averaged(parameter: Tensor, options: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the dimensions over which the squares of a gradient are averaged: those of the inputs of each output."""
    role, ndim = _role(parameter, options), parameter.ndim
    by_rows = role == "experts" or (role in _BY_ROWS and ndim >= 2)
    if role != "conv" and not by_rows:
        return tuple(range(ndim))
    if _transposed(parameter, options):
        return (0,) if role == "conv" else (ndim - 2,)
    return tuple(range(1, ndim)) if role == "conv" else (ndim - 1,)


def _for_rows(parameter: Any, axes: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return zeros for the rows of a parameter, sharded where its rows are."""
    shape = tuple(1 if axis in axes else size for axis, size in enumerate(parameter.shape))
    if not is_dtensor(parameter):
        return torch.zeros(shape, dtype=dtype, device=parameter.device)
    from torch.distributed.tensor import Replicate, zeros

    placed = [Replicate() if p.is_replicate() or p.dim in axes else p for p in parameter.placements]
    return zeros(shape, dtype=dtype, device_mesh=parameter.device_mesh, placements=placed)


def _sum_of_squares(grad: Tensor, axes: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return the sum of the squares of ``grad`` over some dimensions, which become 1."""
    if not axes:
        return grad.to(dtype).square()
    norm: Tensor = torch.linalg.vector_norm(grad, dim=axes, keepdim=True, dtype=dtype)
    return norm.square_()


def _squared(grad: Tensor, axes: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return a gradient in which no entry is too large for its squares to be summed, and these sums."""
    limit = 2.0**500 if dtype == torch.float64 else 2.0**48
    squares = _sum_of_squares(grad, axes, dtype)
    if on_cpu(grad) and (not squares.numel() or float(squares.max()) <= limit**2):  # and no NaN
        return grad, squares
    limit = min(limit, torch.finfo(grad.dtype).max)
    grad = finite_or_zero(grad).clamp(-limit, limit)
    return grad, _sum_of_squares(grad, axes, dtype)


def _factors(
    squares: list[Tensor],
    steps: list[Tensor],
    second: list[Tensor],
    decay: list[Tensor],
    etas: list[float],
    group: Mapping[str, Any],
) -> tuple[list[Tensor], list[Tensor]]:
    """Update the slots; return what fraction of each weight goes, and how much of each gradient is subtracted.

    The slots of a group are small, so that the number of calls counts: every one is made for all parameters at once.
    """
    lr, beta = group["lr"], group["beta"]
    lr = lr.reshape(()) if isinstance(lr, Tensor) else lr
    torch._foreach_add_(steps, 1.0)
    torch._foreach_lerp_(second, squares, 1.0 - beta)
    # 1 - beta^t to full precision: as a difference it would lose four digits at the first step.
    unbias = list(torch._foreach_expm1(torch._foreach_mul(steps, math.log(beta) if beta else -math.inf)))
    inverse = list(torch._foreach_div(unbias, torch._foreach_neg(torch._foreach_clamp_min(second, group["eps"]))))

    slow = list(torch._foreach_mul(decay, lr**0.5 * group["c_coef"]))
    torch._foreach_add_(slow, 1.0)
    torch._foreach_sqrt_(slow)
    gamma = list(torch._foreach_mul(squares, inverse))
    torch._foreach_mul_(gamma, lr**2)
    torch._foreach_div_(gamma, slow)

    damping = list(torch._foreach_mul(decay, [group["d_coef"] * math.sqrt(eta) for eta in etas]))
    torch._foreach_mul_(damping, lr**0.5)
    torch._foreach_add_(damping, 1.0)

    shrinks = list(torch._foreach_mul(gamma, 0.5))
    torch._foreach_add_(shrinks, group["extra_l2"])
    torch._foreach_div_(shrinks, damping)
    sizes = list(torch._foreach_sqrt(inverse))
    torch._foreach_mul_(sizes, etas)
    torch._foreach_mul_(sizes, lr)
    torch._foreach_div_(sizes, damping)

    torch._foreach_addcmul_(decay, gamma, decay)
    torch._foreach_add_(decay, gamma)
    return shrinks, sizes


def _move(
    parameter: Tensor, grad: Tensor, shrink: Tensor, size: Tensor, average: Tensor | None, momentum: float
) -> None:
    """Subtract ``shrink * parameter + size * grad``, or its average over the steps, in place."""
    if average is None:
        for p, g, keep, by in row_pieces(parameter, grad, 1.0 - shrink, size):
            p.mul_(keep).addcmul_(g, by, value=-1.0)
        return
    weight = momentum - 1.0
    for p, g, m, a, by in row_pieces(parameter, grad, average, shrink, size):
        if momentum and fusable(p, m, a, by):
            move = torch.mul(p, a).addcmul_(g, by)
            torch._fused_sgd_(
                [p],
                [move],
                [m],
                lr=-1.0,
                weight_decay=0.0,
                momentum=momentum,
                dampening=1.0 - weight,
                nesterov=False,
                maximize=False,
                is_first_step=False,
            )
        else:
            m.mul_(momentum).addcmul_(p, a, value=weight).addcmul_(g, by, value=weight)
            p.add_(m)


@dataclass(frozen=True, kw_only=True)
class AmosConfig:
    """Amos for every parameter, each by the scale that its role gives it.

    Attributes:
        lr: relative step, about one over the root of the number of batches in the data.
        beta: decay of the second moment.
        momentum: decay of the average over updates; None for none.
        clip: largest size of an entry of a gradient; None for no limit.
        extra_l2: fraction of the weights that goes each step besides Amos' own decay; none of gains and biases.
        c_coef: how fast the decay slows down.
        d_coef: how fast the steps become smaller.
        embedding_eta: scale expected of embeddings; None for sqrt(2 / width).
        rounding: of bfloat16 weights: ``nearest``, ``stochastic`` or ``compensated``; wider ones are left as they are.
        rounding_seed: of ``stochastic``.
    """

    lr: float = 0.01
    beta: float = 0.99
    momentum: float | None = 0.9
    clip: float | None = None
    extra_l2: float = 0.0
    c_coef: float = 0.25
    d_coef: float = 0.25
    embedding_eta: float | None = None
    rounding: Literal["nearest", "stochastic", "compensated"] = "nearest"
    rounding_seed: int = 0

    def __post_init__(self) -> None:
        Amos(probe(), **self.options())
        if self.embedding_eta is not None:
            positive("embedding_eta", self.embedding_eta)

    def options(self) -> dict[str, Any]:
        """Return the arguments of :class:`Amos`."""
        return {
            "lr": self.lr,
            "beta": self.beta,
            "momentum": self.momentum,
            "clip": self.clip,
            "extra_l2": self.extra_l2,
            "c_coef": self.c_coef,
            "d_coef": self.d_coef,
            "rounding": self.rounding,
            "rounding_seed": self.rounding_seed,
        }

    def build(self, model: nn.Module, **others: Any) -> Amos:
        """Return the optimizer of all parameters of ``model`` that require a gradient, grouped by role.

        >>> AmosConfig(embedding_eta=0.5).build(nn.Embedding(5, 2)).param_groups[0]["eta"]
        0.5
        """
        eta = {"embedding": self.embedding_eta}
        groups: list[Group] = [{**group, "eta": eta.get(group["role"])} for group in param_groups(model)]
        return Amos(without_decay(groups, ("gain", "bias"), option="extra_l2"), **self.options())
