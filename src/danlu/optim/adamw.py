"""AdamW for all parameters of a model: torch's own, with its fused kernel where that is right.

Only where weights of 16 bits are to be rounded otherwise than to nearest it is a class of danlu's.

Source: Loshchilov & Hutter, "Decoupled Weight Decay Regularization", arXiv:1711.05101.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from danlu._validate import integer, number, positive
from danlu.optim._base import MomentumOptimizer
from danlu.optim._common import check_rate, is_dtensor
from danlu.optim._config import by_role, check_betas, check_by_role
from danlu.optim._sharded import check_placement, local
from danlu.optim.groups import Group, param_groups
from danlu.optim.mup import mup_groups
from danlu.optim.rounding import check_rounding, watch_resolution


class RoundedAdamW(MomentumOptimizer):
    """AdamW that steps in float32 and rounds as ``rounding`` says, with moments in float32 whatever the weights are.

    :class:`AdamWConfig` takes it where its rounding is not ``nearest``. The arithmetic is torch's. In a compiled step
    it is traced, which torch's fused AdamW is not.

    Args:
        params: parameters, named parameters or groups; a group may carry every option below.
        lr: learning rate, a number or a one-element tensor.
        betas: decay of the first and of the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay.
        rounding: of bfloat16 parameters, ``nearest``, ``stochastic`` or ``compensated``: see docs/optim/rounding.md.
        rounding_seed: of ``stochastic``.

    Raises:
        ValueError, TypeError: naming the argument, or the group and the parameter.

    >>> weight = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    >>> optimizer = RoundedAdamW([weight], lr=1e-4, weight_decay=0.0, rounding="compensated")
    >>> for _ in range(100):
    ...     weight.grad = torch.ones_like(weight)
    ...     optimizer.step()
    >>> weight.tolist()
    [0.98828125, 0.98828125]
    """

    exchanges = False

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        rounding: str = "stochastic",
        rounding_seed: int = 0,
    ) -> None:
        defaults: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        defaults |= {"rounding": rounding, "rounding_seed": rounding_seed}
        check_rounding("", defaults)
        self.check_options("", defaults)
        super().__init__(params, defaults)

    def check_options(self, where: str, options: Mapping[str, Any]) -> None:
        """Raise unless every option of a group is in its range; ``where`` begins the message."""
        check_rate(where, options["lr"])
        check_betas(f"{where}betas", options["betas"])
        positive(f"{where}eps", options["eps"])
        number(f"{where}weight_decay", options["weight_decay"], low=0)

    def check_parameter(self, name: str, parameter: Tensor, options: Mapping[str, Any]) -> None:
        """Raise if no process holds entries of the parameter itself."""
        check_placement(name, parameter)

    def slots(self, parameter: Tensor, options: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the state of a parameter before its first step."""
        stepped_in_float32 = options["rounding"] != "nearest"
        wide = torch.promote_types(parameter.dtype, torch.float32) if stepped_in_float32 else parameter.dtype
        return {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, dtype=wide, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(parameter, dtype=wide, memory_format=torch.preserve_format),
        }

    def update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], *slots: list[Tensor]) -> None:
        """Update parameters and moments of a group in place, each process its own entries."""
        if not params:
            return
        steps, first, second = ([local(tensor) for tensor in tensors] for tensors in slots)
        weights = [local(parameter) for parameter in params]
        compiling = torch.compiler.is_compiling()
        fused = not compiling and all(dense(p) for p in weights)
        adamw(
            weights,
            [local(grad, parameter).to(weight.dtype) for grad, parameter, weight in zip(grads, params, weights)],
            first,
            second,
            [],
            steps,
            foreach=False,
            fused=fused,
            capturable=not fused and weights[0].device.type != "cpu",
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def dense(parameter: Tensor) -> bool:
    """Say whether torch's fused kernel is right for a parameter.

    It goes through a tensor's memory without looking at strides; what has gaps loses them when copied.
    """
    return (
        parameter.is_floating_point()
        and parameter.device.type in ("cpu", "cuda")
        and torch.empty_like(parameter, device="meta").stride() == parameter.stride()
    )


class AdamW(torch.optim.AdamW):
    """torch's AdamW, whose moments lie in memory as their parameters do, also where they were loaded from a file.

    The fused kernel goes through the memory of weights, gradients and moments alike without looking at strides, and
    files keep none: the weights of ``channels_last`` would meet the moments of others.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore state and options; each moment takes the strides of its parameter."""
        super().load_state_dict(state_dict)
        for parameter in (p for group in self.param_groups for p in group["params"] if not is_dtensor(p)):
            state = self.state.get(parameter, {})
            for name, held in state.items():
                if held.shape == parameter.shape and held.stride() != parameter.stride():
                    state[name] = torch.empty_like(parameter, dtype=held.dtype).copy_(held)


@dataclass(frozen=True, kw_only=True)
class AdamWConfig:
    """AdamW for every parameter.

    Attributes:
        lr: learning rate.
        betas: decay of the first and of the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay.
        embedding_lr: learning rate of the embeddings; None for lr.
        no_decay: roles (see :data:`danlu.optim.ROLES`) without decay.
        mup_base_width: width at which ``lr`` was found; matrices of other widths take what the spectral condition makes
            of it (:func:`danlu.optim.mup_groups`). None: lr for all.
        rounding: of bfloat16 weights: ``nearest``, ``stochastic`` or ``compensated``; wider ones are left as they are.
        rounding_seed: of ``stochastic``.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    embedding_lr: float | None = None
    no_decay: tuple[str, ...] = ("gain", "bias")
    mup_base_width: int | None = None
    rounding: Literal["nearest", "stochastic", "compensated"] = "nearest"
    rounding_seed: int = 0

    def __post_init__(self) -> None:
        number("lr", self.lr, low=0)
        check_betas("betas", self.betas)
        positive("eps", self.eps)
        number("weight_decay", self.weight_decay, low=0)
        check_by_role(self.embedding_lr, self.no_decay)
        if self.mup_base_width is not None:
            integer("mup_base_width", self.mup_base_width)
        check_rounding("", {"rounding": self.rounding, "rounding_seed": self.rounding_seed})

    def build(self, model: nn.Module, **others: Any) -> AdamW | RoundedAdamW:
        """Return the optimizer of all parameters of ``model`` that require a gradient, grouped by role.

        >>> AdamWConfig(lr=0.1).build(nn.Linear(2, 3)).param_groups[1]["weight_decay"]
        0.0
        """
        if self.mup_base_width is None:
            return self.of_groups(param_groups(model))
        return self.of_groups(mup_groups(model, self.lr, self.mup_base_width, weight_decay=self.weight_decay))

    def of_groups(self, groups: list[Group]) -> AdamW | RoundedAdamW:
        """Return the optimizer of groups that :func:`danlu.optim.param_groups` made."""
        fused = all(dense(p) for group in groups for p in group["params"])
        groups = by_role(groups, embedding_lr=self.embedding_lr, no_decay=self.no_decay)
        options = {"lr": self.lr, "betas": self.betas, "eps": self.eps, "weight_decay": self.weight_decay}
        if self.rounding != "nearest":
            return RoundedAdamW(groups, rounding=self.rounding, rounding_seed=self.rounding_seed, **options)  # type: ignore[arg-type]
        optimizer = AdamW(groups, fused=fused, **options)  # type: ignore[arg-type]
        watch_resolution(optimizer, optimizer.param_groups, "AdamW")
        return optimizer
