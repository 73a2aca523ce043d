"""Optimizers for a whole model from one config: the right rule for every parameter, none left out."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from danlu._roles import MATRIX_ROLES, ROLES
from danlu._validate import choice, number, positive
from danlu.optim.amos import Amos
from danlu.optim.groups import Group, param_groups
from danlu.optim.lion import Lion
from danlu.optim.muon import Muon
from danlu.optim.tiger import Tiger


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
        embedding_lr: learning rate of the embeddings; None for lr.
        no_decay: roles (see :data:`danlu.optim.ROLES`) without decay.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    embedding_lr: float | None = None
    no_decay: tuple[str, ...] = ("gain", "bias")

    def __post_init__(self) -> None:
        number("lr", self.lr, low=0)
        if self.embedding_lr is not None:
            number("embedding_lr", self.embedding_lr, low=0)
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
        method: iteration, ``auto``, ``fast`` or a name of :func:`danlu.approx.published`.
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
        Muon(_probe(), **self.muon_options())
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


@dataclass(frozen=True, kw_only=True)
class LionConfig:
    """Lion for every parameter.

    Attributes:
        lr: learning rate, AdamW's divided by 3 to 10.
        betas: weight of the momentum inside the sign, and decay of the momentum.
        weight_decay: decoupled decay, AdamW's times what the learning rate was divided by.
        momentum_dtype: format of the momentum; ``auto`` is the parameter's own.
        embedding_lr: learning rate of the embeddings; None for lr.
        no_decay: roles without decay.
    """

    lr: float = 3e-4
    betas: tuple[float, float] = (0.95, 0.98)
    weight_decay: float = 0.3
    momentum_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    embedding_lr: float | None = None
    no_decay: tuple[str, ...] = ("gain", "bias")

    def __post_init__(self) -> None:
        Lion(_probe(), **self.options())
        if self.embedding_lr is not None:
            number("embedding_lr", self.embedding_lr, low=0)
        _check_roles("no_decay", self.no_decay)

    def options(self) -> dict[str, Any]:
        """Return the arguments of :class:`danlu.optim.Lion`."""
        choice("momentum_dtype", self.momentum_dtype, ("auto", "float32", "bfloat16"))
        kept = None if self.momentum_dtype == "auto" else getattr(torch, self.momentum_dtype)
        return {**_arguments(self, "lr", "betas", "weight_decay"), "momentum_dtype": kept}


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
        Tiger(_probe(), **self.options())

    def options(self) -> dict[str, Any]:
        """Return the arguments of :class:`danlu.optim.Tiger`."""
        return _arguments(self, "lr", "beta", "weight_decay")


@dataclass(frozen=True, kw_only=True)
class AmosConfig:
    """Amos for every parameter, each by the scale that its role gives it.

    Attributes:
        lr: relative step, about one over the root of the number of batches in the data.
        beta: decay of the second moment.
        momentum: decay of the average over updates; None for none.
        clip: largest size of an entry of a gradient; None for no limit.
        extra_l2: fraction of the weights that goes each step besides Amos' own decay.
        c_coef: how fast the decay slows down.
        d_coef: how fast the steps become smaller.
        embedding_eta: scale expected of embeddings; None for sqrt(2 / width).
    """

    lr: float = 0.01
    beta: float = 0.99
    momentum: float | None = 0.9
    clip: float | None = None
    extra_l2: float = 0.0
    c_coef: float = 0.25
    d_coef: float = 0.25
    embedding_eta: float | None = None

    def __post_init__(self) -> None:
        Amos(_probe(), **self.options())
        if self.embedding_eta is not None:
            positive("embedding_eta", self.embedding_eta)

    def options(self) -> dict[str, Any]:
        """Return the arguments of :class:`danlu.optim.Amos`."""
        return _arguments(self, "lr", "beta", "momentum", "clip", "extra_l2", "c_coef", "d_coef")


OptimizerConfig = AdamWConfig | MuonConfig | LionConfig | TigerConfig | AmosConfig
_ACCEPTED = "AdamWConfig, MuonConfig, LionConfig, TigerConfig or AmosConfig"


def _probe() -> list[nn.Parameter]:
    """Return a parameter on which an optimizer checks its own options."""
    return [nn.Parameter(torch.zeros(1, 1))]


def _arguments(config: Any, *names: str) -> dict[str, Any]:
    return {name: getattr(config, name) for name in names}


def _without_decay(groups: list[Group], no_decay: tuple[str, ...]) -> list[Group]:
    return [{**group, "weight_decay": 0.0} if group["role"] in no_decay else group for group in groups]


def _rated(groups: list[Group], embedding_lr: float | None) -> list[Group]:
    rated = {} if embedding_lr is None else {"lr": embedding_lr}
    return [{**group, **rated} if group["role"] == "embedding" else group for group in groups]


def _expected(group: Group, config: AmosConfig) -> Group:
    return {**group, "eta": config.embedding_eta} if group["role"] == "embedding" else group


def _adamw(groups: list[Group], config: AdamWConfig) -> AdamW:
    """Return torch's AdamW, with its fused kernel where every parameter has one."""
    params = [p for group in groups for p in group["params"]]
    # The kernel goes through a tensor's memory without looking at strides; what has gaps loses them when it is copied.
    fused = all(
        p.is_floating_point()
        and p.device.type in ("cpu", "cuda")
        and torch.empty_like(p, device="meta").stride() == p.stride()
        for p in params
    )
    groups = _without_decay(_rated(groups, config.embedding_lr), config.no_decay)
    return AdamW(groups, fused=fused, **_arguments(config, "lr", "betas", "eps", "weight_decay"))


def build_optimizers(model: nn.Module, config: OptimizerConfig, *, process_group: Any = None) -> list[Optimizer]:
    """Return the optimizers that together update every trainable parameter of ``model`` exactly once.

    Args:
        model: any module; its parameters are sorted by :func:`danlu.optim.param_groups`.
        config: one of the configs of this module.
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
    if isinstance(config, LionConfig):
        return [Lion(_without_decay(_rated(groups, config.embedding_lr), config.no_decay), **config.options())]
    if isinstance(config, TigerConfig):
        return [Tiger(groups, **config.options())]
    if isinstance(config, AmosConfig):
        return [Amos([_expected(group, config) for group in groups], **config.options())]
    if not isinstance(config, MuonConfig):
        raise TypeError(f"config must be {_ACCEPTED}, got {type(config).__name__}")
    maps = [group for group in groups if group["role"] in MATRIX_ROLES]
    rest = [group for group in groups if group["role"] not in MATRIX_ROLES]
    optimizers: list[Optimizer] = []
    if maps:
        optimizers.append(
            Muon(_without_decay(maps, config.no_decay), process_group=process_group, **config.muon_options())
        )
    if rest:
        lr = config.lr if config.adamw_lr is None else config.adamw_lr
        shared = _arguments(config, "betas", "eps", "weight_decay", "embedding_lr", "no_decay")
        optimizers.append(_adamw(rest, AdamWConfig(lr=lr, **shared)))
    return optimizers
