r"""Loss-free load balancing of experts (Wang et al., arXiv 2408.15664; kexue.fm 10757).

Each routed expert carries a bias ``b_i`` that is added to its score when the top ``k`` are chosen and nowhere else: the
gate uses the score itself, so balancing leaves no trace in the output or the gradient. After an optimizer step the
share ``F_i`` of all choices that fell on expert ``i`` is compared with ``1/n`` and the bias moves against the
excess:

* ``"sign"``: ``b -= rate * sign(F - 1/n)``, the paper's rule;
* ``"rms"``: ``b -= rate * (F - 1/n) / RMS(F - 1/n)``, the same step length with less jitter near balance;
* ``"relative"``: ``b -= rate * (n F - 1)``, the paper's variant in proportion to the excess.

They are centred to zero mean unless ``centered`` is off: that changes no choice (a constant added to every score
changes no order) and keeps the biases from drifting together. The update follows the optimizer step: before it, the
bias would carry the batch's own information into its routing.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from danlu._validate import integer, literals, number
from danlu.protocols import BalanceConfig

Rule = Literal["sign", "rms", "relative"]


@dataclass(frozen=True, kw_only=True)
class LossFreeConfig(BalanceConfig):
    """How the selection biases move."""

    rate: float = 1e-3
    """step of the bias, in units of the gate's score; 0 freezes the biases"""
    rule: Rule = "sign"
    """direction of the step"""
    centered: bool = True
    """take the mean off each step; no choice depends on it"""
    freeze_after: int | None = None
    """updates after which the biases stay as they are, for the end of a long run; None: never"""
    scheduled: bool = False
    """multiply the rate by the learning rate's own factor, so that the biases come to rest with the router"""

    def __post_init__(self) -> None:
        number("rate", self.rate, low=0)
        literals(self)
        if self.freeze_after is not None:
            integer("freeze_after", self.freeze_after, low=0)

    def step(self, counts_e: Tensor, tokens: Tensor, budget: float) -> Tensor:
        """Change of the biases, see `bias_step`."""
        return bias_step(counts_e, self)


def bias_step(counts_e: Tensor, config: LossFreeConfig) -> Tensor:
    """Change of the biases for the choices counted, ``(..., experts)``; zero where nothing was counted.

    >>> bias_step(torch.tensor([6.0, 2.0, 4.0]), LossFreeConfig(rate=0.01))
    tensor([-0.0100,  0.0100, -0.0000])
    """
    counts_e = counts_e.float()
    # Exactly balanced experts must not move on the rounding error of a division: counts, not shares, are compared.
    mean = counts_e.mean(-1, keepdim=True)
    excess = counts_e - mean
    tiny = torch.finfo(torch.float32).tiny
    if config.rule == "sign":
        direction = torch.sign(excess)
    elif config.rule == "rms":
        direction = excess / excess.square().mean(-1, keepdim=True).sqrt().clamp_min(tiny)
    else:
        direction = excess / mean.clamp_min(tiny)
    if config.centered:
        direction = direction - direction.mean(-1, keepdim=True)
    return -config.rate * direction
