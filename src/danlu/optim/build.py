"""Optimizers for a whole model from one config: the right rule for every parameter, none left out."""

from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from danlu._validate import choice, number, positive
from danlu.optim.groups import MATRIX_ROLES, ROLES, Group, param_groups
from danlu.optim.muon import Muon


def _check_betas(name: str, betas: tuple[float, float]) -> None:
    if len(betas) != 2:
        raise ValueError(f"{name} must be two numbers, got {betas!r}")
    for index, beta in enumerate(betas):
        number(f"{name}[{index}]", beta, low=0, high=1, high_open=True)


def _check_roles(name: str, roles: tuple[str, ...]) -> None:
    for role in roles:
        choice(name, role, ROLES)


@dataclass(frozen=True, kw_only=True)
class AdamWConfig:
    """AdamW for every parameter.

    Attributes:
        lr: learning rate.
        betas: decay of the first and of the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay.
        no_decay: roles (see :data:`danlu.optim.ROLES`) without decay.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    no_decay: tuple[str, ...] = ("gain", "bias")

    def __post_init__(self) -> None:
        number("lr", self.lr, low=0)
        _check_betas("betas", self.betas)
        positive("eps", self.eps)
        number("weight_decay", self.weight_decay, low=0)
        _check_roles("no_decay", self.no_decay)


@dataclass(frozen=True, kw_only=True)
class MuonConfig:
    """Muon for the linear maps, AdamW for embeddings, head, gains and biases.

    With the scales ``moonlight`` and ``rms`` both take the same learning rate and decay (Liu et al.,
    arXiv:2502.16982), which None stands for.

    Attributes:
        lr: Muon's learning rate.
        momentum: decay of Muon's momentum.
        nesterov: look one step ahead.
        weight_decay: decay of both, decoupled in AdamW.
        decay: what Muon's decay shrinks, ``decoupled``, ``spectral`` or ``clipped``, see :class:`danlu.optim.Muon`.
        decay_bound: of ``clipped``, where decay begins.
        scale: factor by shape, see :func:`danlu.optim.shape_scale`.
        method: iteration, ``auto`` or a name of :func:`danlu.approx.published`.
        steps: number of polynomials; None for what ``method`` is made for.
        dtype: format of the iteration; ``auto`` takes the faster of float32 and bfloat16.
        momentum_dtype: format of Muon's momentum; ``auto`` is the parameter's own.
        adamw_lr: AdamW's learning rate; None for Muon's.
        embedding_lr: learning rate of the embeddings, whose entries of size one want larger steps than a matrix;
            None for adamw_lr.
        betas: AdamW's decays of the first and of the second moment.
        eps: added to the root of AdamW's second moment.
        no_decay: roles without decay.
    """

    lr: float = 1e-3
    momentum: float = 0.95
    nesterov: bool = True
    weight_decay: float = 0.1
    decay: Literal["decoupled", "spectral", "clipped"] = "decoupled"
    decay_bound: float | None = None
    scale: Literal["moonlight", "rms", "plain", "jordan", "mup"] = "moonlight"
    method: str = "auto"
    steps: int | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    momentum_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    adamw_lr: float | None = None
    embedding_lr: float | None = None
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    no_decay: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        Muon([nn.Parameter(torch.zeros(1, 1))], **self.muon_options())  # the optimizer checks its own options
        for name in ("adamw_lr", "embedding_lr"):
            if getattr(self, name) is not None:
                number(name, getattr(self, name), low=0)
        _check_betas("betas", self.betas)
        positive("eps", self.eps)
        _check_roles("no_decay", self.no_decay)

    def muon_options(self) -> dict[str, Any]:
        """Return the arguments of :class:`danlu.optim.Muon`."""
        accepted = ("auto", "float32", "bfloat16")
        for name in ("dtype", "momentum_dtype"):
            choice(name, getattr(self, name), accepted)
        names = ("lr", "momentum", "nesterov", "weight_decay", "decay", "decay_bound", "scale", "method", "steps")
        return {
            **{name: getattr(self, name) for name in names},
            "dtype": None if self.dtype == "auto" else getattr(torch, self.dtype),
            "momentum_dtype": None if self.momentum_dtype == "auto" else getattr(torch, self.momentum_dtype),
        }


OptimizerConfig = AdamWConfig | MuonConfig


def _without_decay(groups: list[Group], no_decay: tuple[str, ...]) -> list[Group]:
    return [{**group, "weight_decay": 0.0} if group["role"] in no_decay else group for group in groups]


def _adamw(groups: list[Group], config: AdamWConfig) -> AdamW:
    """Return torch's AdamW, with its fused kernel where every parameter has one."""
    params = [p for group in groups for p in group["params"]]
    fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in params)
    options = {field.name: getattr(config, field.name) for field in fields(config) if field.name != "no_decay"}
    return AdamW(_without_decay(groups, config.no_decay), fused=fused, **options)


def build_optimizers(model: nn.Module, config: OptimizerConfig, *, process_group: Any = None) -> list[Optimizer]:
    """Return the optimizers that together update every trainable parameter of ``model`` exactly once.

    Args:
        model: any module; its parameters are sorted by :func:`danlu.optim.param_groups`.
        config: ``AdamWConfig`` or ``MuonConfig``.
        process_group: processes that hold replicas of the model, among which Muon shares its work; None for none.

    Returns:
        One optimizer for each rule that the model has parameters for. Call ``step`` and ``zero_grad`` on each; every
        group carries its ``role`` and ``param_names``.

    >>> from torch import nn
    >>> model = nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 8), nn.LayerNorm(8))
    >>> for optimizer in build_optimizers(model, MuonConfig(lr=0.01)):
    ...     print(type(optimizer).__name__, [group["role"] for group in optimizer.param_groups])
    Muon ['matrix']
    AdamW ['embedding', 'gain', 'bias']
    """
    groups = param_groups(model)
    if isinstance(config, AdamWConfig):
        return [_adamw(groups, config)]
    if not isinstance(config, MuonConfig):
        raise TypeError(f"config must be AdamWConfig or MuonConfig, got {type(config).__name__}")
    maps = [group for group in groups if group["role"] in MATRIX_ROLES]
    rest = [group for group in groups if group["role"] not in MATRIX_ROLES]
    optimizers: list[Optimizer] = []
    if maps:
        optimizers.append(
            Muon(_without_decay(maps, config.no_decay), process_group=process_group, **config.muon_options())
        )
    if rest:
        lr = config.lr if config.adamw_lr is None else config.adamw_lr
        adamw = AdamWConfig(
            lr=lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, no_decay=config.no_decay
        )
        if config.embedding_lr is not None:
            rest = [{**g, "lr": config.embedding_lr} if g["role"] == "embedding" else g for g in rest]
        optimizers.append(_adamw(rest, adamw))
    return optimizers
