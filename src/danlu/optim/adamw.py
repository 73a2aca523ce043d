"""AdamW for all parameters of a model: torch's own, with its fused kernel where that is right.

Source: Loshchilov & Hutter, "Decoupled Weight Decay Regularization", arXiv:1711.05101.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW

from danlu._validate import number, positive
from danlu.optim._config import by_role, check_betas, check_by_role
from danlu.optim.groups import Group, param_groups


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
        check_betas("betas", self.betas)
        positive("eps", self.eps)
        number("weight_decay", self.weight_decay, low=0)
        check_by_role(self.embedding_lr, self.no_decay)

    def build(self, model: nn.Module, **others: Any) -> AdamW:
        """Return the optimizer of all parameters of ``model`` that require a gradient, grouped by role.

        >>> AdamWConfig(lr=0.1).build(nn.Linear(2, 3)).param_groups[1]["weight_decay"]
        0.0
        """
        return self.of_groups(param_groups(model))

    def of_groups(self, groups: list[Group]) -> AdamW:
        """Return the optimizer of groups that :func:`danlu.optim.param_groups` made."""
        params = [p for group in groups for p in group["params"]]
        # The kernel goes through a tensor's memory without looking at strides; what has gaps loses them when copied.
        fused = all(
            p.is_floating_point()
            and p.device.type in ("cpu", "cuda")
            and torch.empty_like(p, device="meta").stride() == p.stride()
            for p in params
        )
        groups = by_role(groups, embedding_lr=self.embedding_lr, no_decay=self.no_decay)
        options = {"lr": self.lr, "betas": self.betas, "eps": self.eps, "weight_decay": self.weight_decay}
        return AdamW(groups, fused=fused, **options)  # type: ignore[arg-type]
