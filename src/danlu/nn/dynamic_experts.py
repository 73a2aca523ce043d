r"""As many experts as a token needs (kexue.fm 10815): a threshold for each expert in place of top-k.

Expert ``i`` works on a token when :math:`\rho_i + b_i > 0`. With ``Ft_i`` the share of the tokens that chose it, the
*budget* :math:`|Ft| = \sum_i Ft_i` is the mean number of experts per token, and :math:`F = Ft / |Ft|` the load. The
biases hold the load even and the budget at ``k``; after an optimizer step :math:`b \leftarrow b - \alpha d` with

* ``"A"``: ``sign(F - 1/n)`` less its mean, plus ``sign(|Ft| - k)``;
* ``"B"``: the same with ``sign(max(|Ft| - k, 0))``: ``k`` is a ceiling, and a lower budget stays;
* ``"C"``: ``sign(Ft - k/n)``, both in one, with more jitter at the start;
* ``"D"``: ``(Ft - k/n) / RMS(Ft - k/n)``.

Unlike the biases of top-k these have an absolute meaning: a constant added to all changes the budget. From zero they
would travel for hundreds of steps in which every token uses every expert, so they begin at `initial_bias`.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import ClassVar, Literal

import torch
from torch import Tensor

from danlu._validate import choice, integer, literals, number, positive
from danlu.protocols import BalanceConfig

Rule = Literal["A", "B", "C", "D"]


@dataclass(frozen=True, kw_only=True)
class DynamicConfig(BalanceConfig):
    """A threshold for each expert; the layer's ``top_k`` is the mean number of experts per token."""

    thresholds: ClassVar[bool] = True

    rate: float = 1e-3
    """step of the bias, in units of the gate's score; 0 freezes the biases"""
    rule: Rule = "A"
    """direction of the step: separate, ceiling, merged, merged and divided by its RMS"""
    freeze_after: int | None = None
    """updates after which the biases stay as they are; None: never"""
    scheduled: bool = False
    """multiply the rate by the learning rate's own factor"""

    def __post_init__(self) -> None:
        number("rate", self.rate, low=0)
        literals(self)
        if self.freeze_after is not None:
            integer("freeze_after", self.freeze_after, low=0)

    def check(self, num_experts: int, top_k: int, *, gate: str, select_by: str, num_groups: int) -> None:
        """Raise ValueError unless thresholds can hold ``top_k`` experts per token in the mean."""
        if gate == "softmax" or select_by != "gate" or num_groups > 1:
            raise ValueError(
                "balance: a dynamic number of experts needs gate 'sigmoid' or 'relu', select_by 'gate' and one group, "
                f"got {gate!r}, {select_by!r}, {num_groups}"
            )
        if top_k == num_experts:
            raise ValueError(f"top_k must be below num_experts = {num_experts} for a dynamic number, got {top_k}")

    def start(self, num_experts: int, top_k: int, gate: str) -> float:
        """Return `initial_bias`."""
        return initial_bias(num_experts, top_k, gate=gate)

    def step(self, counts_e: Tensor, tokens: Tensor, budget: float) -> Tensor:
        """Change of the biases, see `threshold_step`."""
        return threshold_step(counts_e, tokens, budget, self)


def threshold_step(counts_e: Tensor, tokens: Tensor | float, budget: float, config: DynamicConfig) -> Tensor:
    """Change of the biases after ``tokens`` tokens made the choices counted, ``(experts,)``; zero without a token.

    >>> config = DynamicConfig(rate=0.01, rule="C")
    >>> threshold_step(torch.tensor([9.0, 2.0, 5.0]), 10, 1.5, config)
    tensor([-0.0100,  0.0100, -0.0000])
    """
    n = counts_e.shape[-1]
    counts_e = counts_e.float()
    tokens = torch.as_tensor(tokens, dtype=torch.float32, device=counts_e.device)
    # Counts against their mean and the budget in counts: an exact balance must not move on the rounding of a division.
    if config.rule in ("A", "B"):
        even = torch.sign(counts_e - counts_e.mean())
        excess = counts_e.sum() - budget * tokens
        direction = even - even.mean() + torch.sign(excess if config.rule == "A" else excess.clamp_min(0))
    else:
        excess = counts_e - budget / n * tokens
        rms = excess.square().mean().sqrt().clamp_min(torch.finfo(torch.float32).tiny)
        direction = torch.sign(excess) if config.rule == "C" else excess / rms
    return torch.where(tokens > 0, -config.rate * direction, 0.0)


def _checked(num_experts: int, budget: float, std: float, gate: str) -> None:
    integer("num_experts", num_experts)
    number("budget", budget, low=0, high=num_experts, low_open=True, high_open=True)
    positive("std", std)
    choice("gate", gate, ("sigmoid", "relu"))


def initial_bias(num_experts: int, budget: float, *, std: float = 1.0, gate: str = "sigmoid") -> float:
    r"""Bias at which Gaussian router logits choose ``budget`` experts per token: :math:`-h(\sigma \Phi^{-1}(1 - k/n))`.

    Args:
        num_experts: number of routed experts.
        budget: mean number wanted.
        std: standard deviation of the logits: that of the router's weights times the root of the model size.
        gate: ``"sigmoid"`` or ``"relu"``, whose threshold cannot be below 0, so that it chooses at most half of them.

    >>> round(initial_bias(32, 4, std=6e-3 * 1024**0.5), 5)
    -0.55499
    """
    _checked(num_experts, budget, std, gate)
    threshold = std * NormalDist().inv_cdf(1 - budget / num_experts)
    return -1 / (1 + math.exp(-threshold)) if gate == "sigmoid" else -max(threshold, 0.0)


def expected_budget(bias: float, num_experts: int, *, std: float = 1.0, gate: str = "sigmoid") -> float:
    """Mean number of experts chosen at a common ``bias`` by Gaussian router logits, the inverse of `initial_bias`.

    >>> round(expected_budget(-0.5546875, 32, std=6e-3 * 1024**0.5), 2)
    4.04
    """
    _checked(num_experts, num_experts / 2, std, gate)
    number("bias", bias)
    if gate == "sigmoid":
        if not -1 < bias < 0:
            return float(num_experts) if bias >= 0 else 0.0
        threshold = math.log(-bias / (1 + bias))
    else:
        threshold = max(-bias, 0.0)
    return num_experts * (1 - NormalDist(0, std).cdf(threshold))
