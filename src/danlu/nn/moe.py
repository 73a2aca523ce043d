r"""Mixture of fine-grained experts with shared ones (DeepSeekMoE, arXiv 2401.06066; DeepSeek-V3, 2412.19437).

.. math:: y = \sum_{i \le s} e_i(x) + \lambda \sum_{i \in \mathrm{top}_k(\rho + b)} \rho_i e_i(x)

``s`` shared experts see every token and have no gate; ``k`` of the routed ones are chosen by score plus a balancing
bias (`danlu.nn.balance`), and weighted by the score alone, divided by the sum over the chosen when ``renormalize``.
The factor :math:`\lambda` makes both sums equal in norm at initialisation.

Shape suffixes: N tokens, D model size, E routed experts, K choices a token.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from danlu._validate import choice, integer, positive
from danlu.nn.balance import Balancer, LossFreeConfig
from danlu.nn.feed_forward import FeedForward
from danlu.nn.grouped import routed_experts
from danlu.nn.linear import declare


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Sizes and gate of a `MoE` layer."""

    experts: int = 16
    """routed experts"""
    active: int = 4
    """routed experts a token uses"""
    hidden: int = 128
    """width of one expert"""
    shared: int = 1
    """experts that every token uses, as one layer of width shared * hidden"""
    gate: Literal["sigmoid", "softmax"] = "sigmoid"
    """score of an expert"""
    renormalize: bool = True
    """divide the chosen scores by their sum"""
    scale: float | None = None
    """factor on the routed sum; None: `scaling_factor`"""
    balance: LossFreeConfig = LossFreeConfig()
    """loss-free balancing"""


@lru_cache(maxsize=64)
def scaling_factor(
    experts: int, active: int, shared: int, gate: str = "sigmoid", renormalize: bool = True, draws: int = 20_000
) -> float:
    r"""The :math:`\lambda` that gives shared and routed experts equal norm (kexue.fm 10945).

    Mean of :math:`\sqrt{\max(s, 1)} / \sqrt{\sum_\mathrm{chosen} \rho^2}` for experts of unit norm, orthogonal, and
    router logits drawn from N(0, 1). DeepSeek-V2's 160 routed, 6 active, 2 shared with an unnormalised softmax give
    16.0 and DeepSeek-V3's 256, 8, 1 with renormalised sigmoids 2.83 (its configuration uses 2.5).

    Args:
        experts: routed experts.
        active: routed experts a token uses.
        shared: shared experts; 0 counts as one, Moonlight's convention (64, 6, 0 gives its 2.446).
        gate: ``"sigmoid"`` or ``"softmax"``.
        renormalize: whether chosen scores are divided by their sum.
        draws: sample size; the generator is seeded, so that the result is the same everywhere.

    >>> round(scaling_factor(256, 8, 1), 2)
    2.83
    """
    _check_sizes(experts, active, shared, gate)
    logits = torch.randn(draws, experts, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores = logits.sigmoid() if gate == "sigmoid" else logits.softmax(-1)
    chosen = scores.topk(active, dim=-1).values
    if renormalize:
        chosen = chosen / chosen.sum(-1, keepdim=True)
    return float((max(shared, 1) ** 0.5 / chosen.square().sum(-1).sqrt()).mean())


def _check_sizes(experts: int, active: int, shared: int, gate: str) -> None:
    integer("experts", experts)
    integer("active", active, high=experts)
    integer("shared", shared, low=0)
    choice("gate", gate, ("sigmoid", "softmax"))


class MoE(nn.Module):
    """Shared and routed SwiGLU experts with loss-free balancing.

    Router scores are computed in float32 whatever the dtype of ``x``. In training mode the choices are counted in
    ``balancer``; attach it to an optimizer with `danlu.nn.balance.attach`.

    Args:
        dim: model size D.
        config: sizes and gate.
        out_std: standard deviation of the down projections; None means ``1 / sqrt(hidden)``.

    Raises:
        ValueError: more active than routed experts, or a size below one.

    >>> layer = MoE(8, MoEConfig(experts=4, active=2, hidden=6))
    >>> layer(torch.randn(2, 3, 8)).shape, layer.balancer.counts.sum().item()
    (torch.Size([2, 3, 8]), 12.0)
    """

    def __init__(self, dim: int, config: MoEConfig, *, out_std: float | None = None) -> None:
        super().__init__()
        _check_sizes(config.experts, config.active, config.shared, config.gate)
        integer("hidden", config.hidden)
        if config.scale is not None:
            positive("scale", config.scale)
        self.config = config
        c = config
        self.scale = (
            scaling_factor(c.experts, c.active, c.shared, c.gate, c.renormalize) if c.scale is None else c.scale
        )
        self.in_std = dim**-0.5
        self.out_std = c.hidden**-0.5 if out_std is None else out_std
        self.router = declare(nn.Parameter(torch.empty(c.experts, dim)), "matrix")
        self.w_up = declare(
            nn.Parameter(torch.empty(c.experts, 2 * c.hidden, dim)), "experts", split=(c.hidden, c.hidden)
        )
        self.w_down = declare(nn.Parameter(torch.empty(c.experts, dim, c.hidden)), "experts")
        self.balancer = Balancer(c.experts, c.balance)
        self.shared = FeedForward(dim, c.shared * c.hidden, out_std=self.out_std) if c.shared else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw router and routed experts anew (the shared one has its own method)."""
        nn.init.normal_(self.router, std=self.in_std)
        nn.init.normal_(self.w_up, std=self.in_std)
        nn.init.normal_(self.w_down, std=self.out_std)

    def route(self, x_nd: Tensor) -> tuple[Tensor, Tensor]:
        """Choose experts: gates ``(N, K)`` in float32 (float64 for float64) and expert numbers ``(N, K)``.

        The gates carry the gradient to the router. A token whose scores are not finite gets gates that are not
        finite, and harms no other token.
        """
        wide = torch.promote_types(x_nd.dtype, torch.float32)
        logits = F.linear(x_nd.to(wide), self.router.to(wide))
        scores = logits.sigmoid() if self.config.gate == "sigmoid" else logits.softmax(-1)
        with torch.no_grad():
            chosen = (scores + self.balancer.bias).topk(self.config.active, dim=-1).indices
        gate = scores.gather(-1, chosen)
        if self.config.renormalize:
            gate = gate / gate.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        return gate * self.scale, chosen

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _routed(self, x_nd: Tensor) -> Tensor:
        gate, chosen = self.route(x_nd)
        if self.training:
            self.balancer.count(torch.bincount(chosen.flatten(), minlength=self.config.experts))
        return routed_experts(x_nd, gate, chosen, self.w_up, self.w_down)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to ``(..., dim)``."""
        x_nd = x.reshape(-1, x.shape[-1])
        y_nd: Tensor = self._routed(x_nd)
        if self.shared is not None:
            y_nd = y_nd + self.shared(x_nd)
        return y_nd.view(x.shape)
