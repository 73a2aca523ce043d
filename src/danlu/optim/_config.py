"""What the configurations of the optimizers share: checks, and options that depend on a group's role."""

from collections.abc import Sequence

import torch
from torch import nn

from danlu._roles import ROLES
from danlu._validate import choice, number
from danlu.optim.groups import Group

#: dtypes as a configuration names them; ``auto`` leaves the choice to the optimizer.
DTYPES: dict[str, torch.dtype | None] = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}


def probe() -> list[nn.Parameter]:
    """Return a parameter on which an optimizer checks its own options."""
    return [nn.Parameter(torch.zeros(1, 1))]


def dtype_of(name: str, value: str) -> torch.dtype | None:
    """Return the dtype that the option ``name`` says, None for ``auto``."""
    choice(name, value, tuple(DTYPES))
    return DTYPES[value]


def check_betas(name: str, betas: tuple[float, float]) -> None:
    """Raise unless ``betas`` are two decays in [0, 1)."""
    if len(betas) != 2:
        raise ValueError(f"{name} must be two numbers, got {betas!r}")
    for index, beta in enumerate(betas):
        number(f"{name}[{index}]", beta, low=0, high=1, high_open=True)


def check_by_role(embedding_lr: float | None, no_decay: Sequence[str]) -> None:
    """Raise unless the options that depend on the role are in their range."""
    if embedding_lr is not None:
        number("embedding_lr", embedding_lr, low=0)
    for role in no_decay:
        choice("no_decay", role, ROLES)


def by_role(groups: list[Group], *, embedding_lr: float | None, no_decay: Sequence[str]) -> list[Group]:
    """Return the groups, embeddings with their own learning rate unless it is None, ``no_decay`` without decay."""
    groups = without_decay(groups, no_decay)
    if embedding_lr is None:
        return groups
    return [{**group, **({"lr": embedding_lr} if group["role"] == "embedding" else {})} for group in groups]


def without_decay(groups: list[Group], roles: Sequence[str], *, option: str = "weight_decay") -> list[Group]:
    """Return the groups, those of ``roles`` with the option of their decay at zero."""
    return [{**group, option: 0.0} if group["role"] in roles else group for group in groups]
