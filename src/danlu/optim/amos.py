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

from danlu._roles import ROLES, declared, oriented
from danlu._validate import choice, integer, number, positive
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
        kept = _kept(_role(parameter, options), parameter.ndim)
        state = {
            "step": torch.zeros((), dtype=wide, device=parameter.device),
            "exp_avg_sq": _for_rows(parameter, kept, wide),
            "decay": _for_rows(parameter, kept, wide),
        }
        if options["momentum"] is not None:
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state

    def update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], *slots: list[Tensor]) -> None:
        """Update parameters and state of a group in place, each process its own entries and their rows."""
        if not params:
            return
        roles = [_role(parameter, group) for parameter in params]
        kept = [_kept(role, parameter.ndim) for role, parameter in zip(roles, params)]
        etas = [group["eta"] or _scale(role, parameter, group) for role, parameter in zip(roles, params)]
        grads = [local(grad, parameter) for grad, parameter in zip(grads, params)]
        steps, second, decay, *averages = [[local(tensor) for tensor in tensors] for tensors in slots]
        if group["maximize"]:
            grads = [-grad for grad in grads]
        if group["clip"] is not None:
            grads = [grad.clamp(-group["clip"], group["clip"]) for grad in grads]
        taken = [_squared(grad, first, v.dtype) for grad, first, v in zip(grads, kept, second)]
        grads, squares = [grad for grad, _ in taken], [square for _, square in taken]
        if any(map(is_dtensor, params)):
            sum_shards_(squares, params, kept)
        torch._foreach_div_(squares, [float(max(1, math.prod(p.shape[k:]))) for p, k in zip(params, kept)])
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


def _scale(role: str, parameter: Tensor, options: Mapping[str, Any]) -> float:
    """Return Amos' eta of a parameter, whichever way its weight is kept."""
    transposed = options.get("transposed")
    if transposed is None:
        transposed = declared("the parameter", parameter).transposed
    return amos_scale(role, oriented(parameter.shape, transposed))


def _kept(role: str, ndim: int) -> int:
    """Return how many of a parameter's dimensions its slots have: over the others squares are averaged."""
    if role == "conv":
        return 1
    return ndim - 1 if role == "experts" or (role in _BY_ROWS and ndim >= 2) else 0


def _for_rows(parameter: Any, kept: int, dtype: torch.dtype) -> Tensor:
    """Return zeros for the rows of a parameter, sharded where its rows are."""
    shape = (*parameter.shape[:kept], *(1,) * (parameter.ndim - kept))
    if not is_dtensor(parameter):
        return torch.zeros(shape, dtype=dtype, device=parameter.device)
    from torch.distributed.tensor import Replicate, zeros

    placed = [p if p.is_replicate() or p.dim < kept else Replicate() for p in parameter.placements]
    return zeros(shape, dtype=dtype, device_mesh=parameter.device_mesh, placements=placed)


def _sum_of_squares(grad: Tensor, kept: int, dtype: torch.dtype) -> Tensor:
    """Return the sum of the squares of ``grad`` over all but its ``kept`` first dimensions, which become 1."""
    if kept >= grad.ndim:
        return grad.to(dtype).square()
    axes = tuple(range(kept, grad.ndim))
    norm: Tensor = torch.linalg.vector_norm(grad, dim=axes, keepdim=True, dtype=dtype)
    return norm.square_()


def _squared(grad: Tensor, kept: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return a gradient in which no entry is too large for its squares to be summed, and these sums."""
    limit = 2.0**500 if dtype == torch.float64 else 2.0**48
    squares = _sum_of_squares(grad, kept, dtype)
    if on_cpu(grad) and (not squares.numel() or float(squares.max()) <= limit**2):  # and no NaN
        return grad, squares
    limit = min(limit, torch.finfo(grad.dtype).max)
    grad = finite_or_zero(grad).clamp(-limit, limit)
    return grad, _sum_of_squares(grad, kept, dtype)


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
class AmosHyperparameters:
    """Learning rate, decay and half-life for AdamW or Lion, from Amos' balance of progress and decay.

    Attributes:
        lr: learning rate at the beginning.
        weight_decay: decoupled decay as in AdamW, constant.
        half_life: steps after which the learning rate has halved, for :class:`danlu.optim.InverseTime`.
    """

    lr: float
    weight_decay: float
    half_life: float


def amos_hyperparameters(
    d: int, *, step: float = 1e-3, alignment: float = 0.05, constant: bool = False, role: str = "matrix"
) -> AmosHyperparameters:
    """Return hyper-parameters for updates whose entries have size one (Lion, Tiger, AdamW), without a search.

    A weight of expected size sigma moves by ``step * sigma``; the decay that cancels the second order of that move is
    step^2 / 2 a step, that is ``step / (2 sigma)`` times the learning rate. With p the cosine between update and
    remaining error, the learning rate halves after 1 / (2 step p) steps if p fades with the error, and after
    (sqrt(2) - 1) / (step p) steps (then quadratically) if it is constant.

    The decay is of the order that leaves the distance to the optimum unharmed while the weights are still far from
    it; late in training the argument no longer holds, though the schedule does.

    Args:
        d: inputs of a matrix, or width of an embedding; unused for gains and biases.
        step: relative change of a weight at the beginning, about 1e-3; 1e-2 for easy tasks.
        alignment: the cosine p at the beginning.
        constant: the cosine stays: use ``InverseTime(half_life=..., squared=True)``.
        role: one of :data:`danlu.optim.ROLES`; sigma is 1 / sqrt(d) for maps and embeddings, 1/2 for gains and biases.

    Raises:
        ValueError, TypeError: naming the argument.

    Source: Su, kexue.fm 9344.

    >>> found = amos_hyperparameters(768, step=1.11e-3)
    >>> print(f"{found.lr:.4g} {found.weight_decay:.4g} {found.half_life:.5g}")
    4.005e-05 0.01538 9009
    """
    integer("d", d)
    positive("step", step)
    number("alignment", alignment, low=0, high=1, low_open=True)
    choice("role", role, ROLES)
    sigma = 0.5 if role in ("gain", "bias") else 1.0 / math.sqrt(d)
    life = (math.sqrt(2.0) - 1.0) / (step * alignment) if constant else 1.0 / (2.0 * step * alignment)
    return AmosHyperparameters(lr=step * sigma, weight_decay=step / (2.0 * sigma), half_life=life)


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
