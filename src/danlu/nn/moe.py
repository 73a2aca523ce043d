r"""Mixture of fine-grained experts with shared ones (DeepSeekMoE, arXiv 2401.06066; DeepSeek-V3, 2412.19437).

.. math:: y = \sum_{i \le s} e_i(x) + \lambda \sum_{i \in \mathrm{top}_k(\rho + b)} \rho_i e_i(x)

``s`` shared experts see every token and have no gate; ``k`` of the routed ones are chosen by score plus a balancing
bias (`danlu.nn.balance`), and weighted by the score alone, divided by the sum over the chosen when ``renormalize``.
The factor :math:`\lambda` makes both sums equal in norm at initialisation. How the load is balanced decides what
``b`` is: moved after each step (`danlu.nn.loss_free`), zero beside an auxiliary loss (`danlu.nn.auxiliary_loss`), or a
threshold that chooses every expert with :math:`\rho_i + b_i > 0` (`danlu.nn.dynamic_experts`).

With ``normalize_experts`` the layer follows kexue.fm 10699: each :math:`e_i(x)` is brought to a fixed norm, so that the
score *is* the predicted norm of what the expert adds, and choosing the largest scores leaves out the least.

Shape suffixes: N tokens, D model size, E routed experts, K choices per token.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from danlu._autograd import autocasts, compiling
from danlu._roles import declare
from danlu._validate import choice, integer, positive
from danlu.nn.auxiliary_loss import AuxiliaryLossConfig
from danlu.nn.balance import Balancer
from danlu.nn.dynamic_experts import DynamicConfig
from danlu.nn.exchange import exchanged_experts, is_cut
from danlu.nn.feed_forward import FeedForward
from danlu.nn.grouped import routed_experts
from danlu.nn.loss_free import LossFreeConfig
from danlu.protocols import BalanceConfig

Gate = Literal["sigmoid", "softmax", "relu"]
SelectBy = Literal["gate", "sigmoid"]


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Sizes and gate of a `MoE` layer."""

    renamed: ClassVar[dict[str, str]] = {
        "experts": "num_experts",
        "active": "top_k",
        "shared": "num_shared_experts",
        "groups": "num_groups",
        "active_groups": "top_k_groups",
    }

    num_experts: int = 16
    """routed experts"""
    top_k: int = 4
    """routed experts per token"""
    hidden: int = 128
    """width of one expert"""
    num_shared_experts: int = 1
    """experts that every token uses, as one layer of width num_shared_experts * hidden"""
    gate: Gate = "sigmoid"
    """score of an expert"""
    select_by: SelectBy = "gate"
    """what the biases are added to for the choice; sigmoids suit the usual rate whatever the gate"""
    renormalize: bool = True
    """divide the chosen scores by their sum"""
    num_groups: int = 1
    """groups of neighbouring experts, ranked by the sum of their two best"""
    top_k_groups: int = 1
    """groups that a token may choose from"""
    normalize_experts: bool = False
    """bring every routed expert's output to one norm, so that the score predicts what it adds"""
    scale: float | None = None
    """factor on the routed sum; None: `scaling_factor`"""
    balance: LossFreeConfig | AuxiliaryLossConfig | DynamicConfig | BalanceConfig = LossFreeConfig()
    """how the load is balanced; dynamic: ``top_k`` is the mean number of experts"""

    def build(self, dim: int, *, out_std: float, **others: Any) -> "MoE":
        """Make the layer; ``out_std`` is for an output projection that reads ``dim`` features."""
        return MoE(dim, self, out_std=out_std * math.sqrt(dim / max(self.hidden, 1)))


GATES: dict[Gate, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "softmax": lambda logits: logits.softmax(-1),
    "relu": F.relu,
}
"""Scores of the experts from the router's logits ``(..., experts)``."""


@lru_cache(maxsize=64)
def scaling_factor(
    num_experts: int,
    top_k: int,
    num_shared_experts: int,
    gate: Gate = "sigmoid",
    renormalize: bool = True,
    draws: int = 20_000,
) -> float:
    r"""The :math:`\lambda` that gives shared and routed experts equal norm (kexue.fm 10945).

    Mean of :math:`\sqrt{\max(s, 1)} / \sqrt{\sum_\mathrm{chosen} \rho^2}` for experts of unit norm, orthogonal, and
    router logits drawn from N(0, 1). DeepSeek-V2's 160 routed, 6 active, 2 shared with an unnormalised softmax give
    16.0 and DeepSeek-V3's 256, 8, 1 with renormalised sigmoids 2.83 (its configuration uses 2.5).

    Args:
        num_experts: routed experts.
        top_k: routed experts per token.
        num_shared_experts: shared experts; 0 counts as one, Moonlight's convention (64, 6, 0 gives its 2.446).
        gate: ``"sigmoid"``, ``"softmax"`` or ``"relu"``.
        renormalize: whether chosen scores are divided by their sum.
        draws: sample size; the generator is seeded, so that the result is the same everywhere.

    >>> round(scaling_factor(256, 8, 1), 2)
    2.83
    """
    _check_sizes(num_experts, top_k, num_shared_experts, gate)
    generator = torch.Generator().manual_seed(0)
    # On the CPU also where the layer is built on "meta", which has no numbers.
    logits = torch.randn(draws, num_experts, generator=generator, dtype=torch.float64, device="cpu")
    scores = GATES[gate](logits)
    chosen = scores.topk(top_k, dim=-1).values
    chosen = chosen[chosen.sum(-1) > 0]  # where every ReLU is dead there is no norm to match
    if renormalize:
        chosen = chosen / chosen.sum(-1, keepdim=True)
    return float((max(num_shared_experts, 1) ** 0.5 / chosen.square().sum(-1).sqrt()).mean())


def balanced_load(num_experts: int, top_k: int, num_shared_experts: int = 0) -> Tensor:
    """Return the share of the work of each expert where the routed ones are chosen equally often, float64.

    Of ``k = num_shared_experts + top_k`` experts of a token each shared one does ``1 / k``, and a routed one
    ``top_k / (k * num_experts)``. (kexue.fm 10945 prints the case ``top_k = 1``.)

    Returns:
        ``(num_shared_experts + num_experts,)``, the shared ones first; their sum is 1.

    >>> balanced_load(4, 2, 1).tolist()
    [0.3333333333333333, 0.16666666666666666, 0.16666666666666666, 0.16666666666666666, 0.16666666666666666]
    """
    _check_sizes(num_experts, top_k, num_shared_experts, "sigmoid")
    k = num_shared_experts + top_k
    shares = ((num_shared_experts, 1 / k), (num_experts, top_k / (k * num_experts)))
    return torch.cat([torch.full((count,), share, dtype=torch.float64) for count, share in shares])


def _check_sizes(num_experts: int, top_k: int, num_shared_experts: int, gate: str) -> None:
    integer("num_experts", num_experts)
    integer("top_k", top_k, high=num_experts)
    integer("num_shared_experts", num_shared_experts, low=0)
    choice("gate", gate, get_args(Gate))


def _check_routing(c: MoEConfig) -> None:
    integer("num_groups", c.num_groups, high=c.num_experts)
    integer("top_k_groups", c.top_k_groups, high=c.num_groups)
    if c.num_experts % c.num_groups:
        raise ValueError(f"num_groups must divide num_experts = {c.num_experts}, got {c.num_groups}")
    reachable = c.num_experts // c.num_groups * c.top_k_groups
    if c.top_k > reachable:
        raise ValueError(f"top_k must be at most {reachable}, the experts of {c.top_k_groups} groups, got {c.top_k}")
    choice("select_by", c.select_by, get_args(SelectBy))
    c.balance.check(c.num_experts, c.top_k, gate=c.gate, select_by=c.select_by, num_groups=c.num_groups)


def _in_best_groups(scores_ne: Tensor, num_groups: int, top_k: int) -> Tensor:
    """The scores, minus infinity outside a token's best groups (a biased score can be negative: 0 would not do)."""
    by_group = scores_ne.unflatten(-1, (num_groups, -1))
    rank = by_group.topk(min(2, by_group.shape[-1]), dim=-1).values.sum(-1)
    best = torch.zeros_like(rank, dtype=torch.bool).scatter_(-1, rank.topk(top_k, dim=-1).indices, True)
    masked: Tensor = by_group.masked_fill(~best[..., None], -torch.inf).flatten(-2)
    return masked


class MoE(nn.Module):
    """Shared and routed SwiGLU experts, balanced.

    Router scores are computed in float32 whatever the dtype of ``x``, under ``torch.autocast`` too. In training mode
    the choices are counted in ``balancer`` when the backward pass comes by; attach it to an optimizer with
    `danlu.nn.balance.attach`. A token whose scores are not finite gets an output that is not finite, and harms no other
    token. Under ``torch.func`` and ``torch.export`` every expert works on every token, and nothing is counted. A
    compiled layer is one graph (``fullgraph=True``), but for an auxiliary loss in training, before which it breaks.

    Args:
        dim: model size D.
        config: sizes and gate.
        out_std: standard deviation of the down projections; None means ``1 / sqrt(hidden)``.

    Raises:
        ValueError: more chosen than routed experts, a size below one, or options that exclude one another.

    >>> layer = MoE(8, MoEConfig(num_experts=4, top_k=2, hidden=6))
    >>> y = layer(torch.randn(2, 3, 8))
    >>> y.sum().backward()
    >>> y.shape, layer.balancer.counts.sum().item()
    (torch.Size([2, 3, 8]), 12.0)
    """

    def __init__(self, dim: int, config: MoEConfig, *, out_std: float | None = None) -> None:
        super().__init__()
        _check_sizes(config.num_experts, config.top_k, config.num_shared_experts, config.gate)
        integer("hidden", config.hidden)
        _check_routing(config)
        if config.scale is not None:
            positive("scale", config.scale)
        self.config = config
        c = config
        self.scale = (
            scaling_factor(c.num_experts, c.top_k, c.num_shared_experts, c.gate, c.renormalize)
            if c.scale is None
            else c.scale
        )
        self.in_std = dim**-0.5
        self.out_std = c.hidden**-0.5 if out_std is None else out_std
        self.router = nn.Parameter(torch.empty(c.num_experts, dim))
        declare(self, "router", "matrix")
        self.w_up = nn.Parameter(torch.empty(c.num_experts, 2 * c.hidden, dim))
        declare(self, "w_up", "experts", split=(c.hidden, c.hidden))
        self.w_down = nn.Parameter(torch.empty(c.num_experts, dim, c.hidden))
        declare(self, "w_down", "experts")
        start = c.balance.start(c.num_experts, c.top_k, c.gate)
        self.balancer = Balancer(c.num_experts, c.balance, budget=c.top_k, start=start)
        self.shared = (
            FeedForward(dim, c.num_shared_experts * c.hidden, out_std=self.out_std) if c.num_shared_experts else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw router and routed experts anew (the shared one has its own method)."""
        nn.init.normal_(self.router, std=self.in_std)
        nn.init.normal_(self.w_up, std=self.in_std)
        nn.init.normal_(self.w_down, std=self.out_std)

    def _logits(self, x_nd: Tensor) -> Tensor:
        wide = torch.promote_types(x_nd.dtype, torch.float32)
        device = x_nd.device.type
        if autocasts(device):
            with torch.autocast(device, enabled=False):
                return F.linear(x_nd.to(wide), self.router.to(wide))
        return F.linear(x_nd.to(wide), self.router.to(wide))

    def route(self, x_nd: Tensor, real_n: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Choose experts.

        Args:
            x_nd: tokens.
            real_n: False for tokens that are padding, which are not counted; None: there is none.

        Returns:
            Gates in float32 (float64 for float64), which carry the gradient to the router, and the choice: gates
            ``(N, K)`` with expert numbers ``(N, K)``; for a dynamic number gates ``(N, E)`` with a mask ``(N, E)``.
        """
        c = self.config
        logits = self._logits(x_nd)
        scores = GATES[c.gate](logits)
        with torch.no_grad():
            biased = (scores if c.select_by == "gate" else logits.sigmoid()) + self.balancer.bias
            if c.balance.thresholds:
                chosen = ~(biased <= 0)  # so that NaN chooses, and shows in the output
            else:
                if c.num_groups > 1:
                    biased = _in_best_groups(biased, c.num_groups, c.top_k_groups)
                chosen = biased.topk(c.top_k, dim=-1).indices
        if self.balancer.counts_now(scores):
            scores = self.balancer.watch(scores, self._counts(chosen, real_n), real_n)
        gate = scores * chosen if c.balance.thresholds else scores.gather(-1, chosen)
        if c.renormalize:
            gate = gate / gate.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        return gate * self.scale, chosen

    def _counts(self, chosen: Tensor, real_n: Tensor | None) -> Tensor:
        """How many real tokens chose each expert."""
        experts = self.config.num_experts
        if self.config.balance.thresholds:
            return (chosen if real_n is None else chosen & real_n[:, None]).sum(0)
        # What padding chose is counted behind the experts, and cut off.
        counted = chosen if real_n is None else chosen.masked_fill(~real_n[:, None], experts)
        # A compiler does not know how many numbers a bincount gives, and a GPU waits to see its largest one.
        if compiling() or counted.device.type != "cpu":
            counts_e = counted.new_zeros(experts + 1)
            return counts_e.scatter_add(0, counted.flatten(), torch.ones_like(counted).flatten())[:experts]
        return torch.bincount(counted.flatten(), minlength=experts)[:experts]

    def _routed(self, x_nd: Tensor, real_n: Tensor | None) -> Tensor:
        gate, chosen = self.route(x_nd, real_n)
        # The norm is the one that experts have on average when training starts, up to a constant.
        norm = self.out_std * self.config.hidden**0.5 if self.config.normalize_experts else None
        experts = exchanged_experts if is_cut(self.w_up) else routed_experts
        return experts(x_nd, gate, chosen, self.w_up, self.w_down, rms=norm)

    @torch.compiler.disable(reason="an auxiliary balancing loss is added in the backward pass")  # type: ignore[untyped-decorator]
    def _uncompiled(self, x_nd: Tensor, real_n: Tensor | None) -> Tensor:
        return self._routed(x_nd, real_n)

    def forward(self, x: Tensor, *, real: Tensor | None = None) -> Tensor:
        """Apply the layer to ``(..., dim)``.

        Args:
            x: tokens.
            real: booleans ``(...)``, False for tokens that are padding: they get an output like any other, and no part
                in the balance. None: there is no padding.

        Raises:
            ValueError: ``real`` is not one boolean a token.
        """
        x_nd = x.reshape(-1, x.shape[-1])
        if real is not None:
            if real.shape != x.shape[:-1] or real.dtype != torch.bool:
                got = f"{real.dtype} {tuple(real.shape)}"
                raise ValueError(f"real must be booleans {tuple(x.shape[:-1])}, one a token, got {got}")
            real = real.reshape(-1)
        broken = compiling() and self.training and torch.is_grad_enabled() and self.config.balance.auxiliary
        y_nd = self._uncompiled(x_nd, real) if broken else self._routed(x_nd, real)
        if self.shared is not None:
            y_nd = y_nd + self.shared(x_nd)
        return y_nd.view(x.shape)
