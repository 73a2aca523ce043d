r"""Loss-free load balancing of experts (Wang et al., arXiv 2408.15664; kexue.fm 10757).

Each routed expert carries a bias ``b_i`` that is added to its score when the top ``k`` are chosen and nowhere else: the
gate uses the score itself, so balancing leaves no trace in the output or the gradient. After an optimizer step the
share ``F_i`` of all choices that fell on expert ``i`` is compared with ``1/n`` and the bias moves against the
excess:

* ``"sign"``: ``b -= rate * sign(F - 1/n)``, the paper's rule;
* ``"rms"``: ``b -= rate * (F - 1/n) / RMS(F - 1/n)``, the same step length with less jitter near balance.

Both are centred to zero mean, which changes no choice (a constant added to every score changes no order) and keeps the
biases from drifting together. The update follows the optimizer step: before it, the bias would carry the batch's own
information into its routing.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from danlu._validate import choice, number


@dataclass(frozen=True, kw_only=True)
class LossFreeConfig:
    """How the selection biases move."""

    rate: float = 1e-3
    """step of the bias, in units of the gate's score; 0 freezes the biases"""
    rule: Literal["sign", "rms"] = "sign"
    """direction of the step"""

    def __post_init__(self) -> None:
        number("rate", self.rate, low=0)
        choice("rule", self.rule, ("sign", "rms"))


def bias_step(counts_e: Tensor, config: LossFreeConfig) -> Tensor:
    """Change of the biases for the choices counted, ``(..., experts)``; zero where nothing was counted.

    >>> bias_step(torch.tensor([6.0, 2.0, 4.0]), LossFreeConfig(rate=0.01))
    tensor([-0.0100,  0.0100,  0.0000])
    """
    counts_e = counts_e.float()
    excess = counts_e / counts_e.sum(-1, keepdim=True).clamp_min(1) - 1 / counts_e.shape[-1]
    excess = torch.where(counts_e.sum(-1, keepdim=True) > 0, excess, 0.0)
    if config.rule == "sign":
        # Exactly balanced experts must not move on the rounding error of a division.
        mean = counts_e.mean(-1, keepdim=True)
        direction = torch.sign(counts_e - mean)
    else:
        rms = excess.square().mean(-1, keepdim=True).sqrt()
        direction = excess / rms.clamp_min(torch.finfo(torch.float32).tiny)
    return config.rate * (direction.mean(-1, keepdim=True) - direction)


def max_violation(counts_e: Tensor) -> Tensor:
    """``MaxVio = (max load - mean load) / mean load`` over the last dimension (2408.15664, section 4).

    >>> max_violation(torch.tensor([6.0, 2.0, 4.0])).item()
    0.5
    """
    mean = counts_e.float().mean(-1)
    return (counts_e.amax(-1) - mean) / mean.clamp_min(torch.finfo(torch.float32).tiny)


class Balancer(nn.Module):
    """Selection biases of one layer and the choices counted since the last update.

    Args:
        experts: number of routed experts.
        config: rate and rule.
    """

    bias: Tensor
    counts: Tensor
    load: Tensor

    def __init__(self, experts: int, config: LossFreeConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("bias", torch.zeros(experts))
        # Saved too: a step that was skipped leaves its choices to the next update, which may follow a resume.
        self.register_buffer("counts", torch.zeros(experts))
        self.register_buffer("load", torch.zeros(experts), persistent=False)

    def reset_parameters(self) -> None:
        """Forget biases and counts."""
        for buffer in (self.bias, self.counts, self.load):
            buffer.zero_()

    def count(self, counts_e: Tensor) -> None:
        """Add the choices of one training forward pass."""
        self.counts += counts_e


@torch.no_grad()
def update(model: nn.Module) -> None:
    """Move every bias of ``model`` by the choices counted since the last call, over all ranks, and count anew.

    One collective for the whole model: the counts of all layers travel together.
    """
    balancers = [module for module in model.modules() if isinstance(module, Balancer)]
    if not balancers:
        return
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        everything = torch.cat([b.counts for b in balancers])
        dist.all_reduce(everything)
        for b, total in zip(balancers, everything.split([b.counts.numel() for b in balancers])):
            b.counts.copy_(total)
    for b in balancers:
        b.bias += bias_step(b.counts, b.config)
        b.load.copy_(b.counts)
        b.counts.zero_()


def attach(model: nn.Module, optimizer: torch.optim.Optimizer) -> RemovableHandle:
    """Have ``optimizer.step()`` end with `update`; works in any training loop.

    With several optimizers attach to one of them, the last that steps. Counts of skipped steps stay and enter the next
    update.

    >>> from danlu.nn.moe import MoE, MoEConfig
    >>> layer = MoE(8, MoEConfig(experts=4, active=2, hidden=4))
    >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    >>> handle = attach(layer, optimizer)
    >>> layer(torch.randn(10, 8)).sum().backward()
    >>> optimizer.step()
    >>> layer.balancer.load.sum().item()
    20.0
    """
    return optimizer.register_step_post_hook(lambda *_: update(model))


def expert_load(model: nn.Module) -> dict[str, float]:
    """Balance at the last `update`: ``max_vio`` averaged over layers, ``idle`` the share of experts without a token.

    Empty for a model without experts or before the first update.
    """
    loads = [m.load for m in model.modules() if isinstance(m, Balancer)]
    if not loads or not any(bool(load.sum() > 0) for load in loads):
        return {}
    vio = torch.stack([max_violation(load) for load in loads]).mean()
    idle = torch.cat([load == 0 for load in loads]).float().mean()
    return {"max_vio": vio.item(), "idle_experts": idle.item()}
