"""What all kinds of expert balancing share: the counts of a layer, the updates after an optimizer step, and measures.

A `Balancer` is a part of each `danlu.nn.MoE` layer. Its kind is a configuration (`danlu.protocols.BalanceConfig`) with
a file of its own: `danlu.nn.loss_free`, `danlu.nn.auxiliary_loss`, `danlu.nn.dynamic_experts`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from danlu.protocols import BalanceConfig


def max_violation(counts_e: Tensor) -> Tensor:
    """``MaxVio = (max load - mean load) / mean load`` over the last dimension (2408.15664, section 4).

    >>> max_violation(torch.tensor([6.0, 2.0, 4.0])).item()
    0.5
    """
    mean = counts_e.float().mean(-1)
    return (counts_e.amax(-1) - mean) / mean.clamp_min(torch.finfo(torch.float32).tiny)


class Balancer(nn.Module):
    """What one layer knows of its balance: selection biases, and the choices counted since the last update.

    Args:
        num_experts: number of routed experts.
        config: kind of balancing.
        budget: experts per token, the mean that a dynamic number is held at.
        start: where the biases begin.
    """

    bias: Tensor
    counts: Tensor
    tokens: Tensor
    updates: Tensor
    load: Tensor
    used: Tensor

    def __init__(self, num_experts: int, config: BalanceConfig, *, budget: float = 1.0, start: float = 0.0) -> None:
        super().__init__()
        self.config, self.budget, self.start = config, budget, start
        self.register_buffer("bias", torch.empty(num_experts))
        # Saved too: a step that was skipped leaves its choices to the next update, which may follow a resume.
        self.register_buffer("counts", torch.empty(num_experts))
        self.register_buffer("tokens", torch.empty(()))
        self.register_buffer("updates", torch.empty((), dtype=torch.int64))
        self.register_buffer("load", torch.empty(num_experts), persistent=False)
        self.register_buffer("used", torch.empty(()), persistent=False)
        self.upstream: Tensor | None = None
        self.watched: Tensor | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Forget biases and counts."""
        for buffer in self.buffers():
            buffer.zero_()
        self.bias.fill_(self.start)

    def watch(self, scores_ne: Tensor, counts_e: Tensor) -> Tensor:
        """Return the scores unchanged, and have their backward pass count the choices and add the auxiliary gradient.

        Counting in the backward pass counts once also where activation checkpointing runs the forward pass twice.
        """
        if self.watched is not None:
            self.watched += counts_e
        if not (self.training and torch.is_grad_enabled() and scores_ne.requires_grad):
            return scores_ne
        share = None
        if self.config.auxiliary:
            total = scores_ne.sum(-1, keepdim=True)
            share = scores_ne / total.clamp_min(torch.finfo(scores_ne.dtype).tiny)
        watched: Tensor = _Watch.apply(scores_ne, share, counts_e, self)
        return watched

    def count(self, counts_e: Tensor, tokens: int) -> None:
        """Add the choices of ``tokens`` tokens."""
        self.counts += counts_e
        self.tokens += tokens

    def share_gradient(self, tokens: int) -> Tensor:
        """Derivative of the auxiliary loss by a token's normalised scores, at the load counted so far on all ranks."""
        counts = self.counts.clone()
        if _several_ranks():
            dist.all_reduce(counts)
        gradient = self.config.load_gradient(counts)
        return gradient / tokens if self.upstream is None else gradient * self.upstream

    def step(self, factor: float | Tensor = 1.0) -> Tensor:
        """Change of the biases for what was counted, where the learning rate stands at ``factor`` of its start."""
        step = self.config.step(self.counts, self.tokens, self.budget)
        if self.config.scheduled:
            step = step * factor
        last = self.config.freeze_after
        return step if last is None else torch.where(self.updates < last, step, 0.0)


class _Watch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores_ne: Tensor, share_ne: Tensor | None, counts_e: Tensor, balancer: Balancer) -> Tensor:
        ctx.balancer = balancer
        ctx.save_for_backward(counts_e)
        return scores_ne.view_as(scores_ne)

    @staticmethod
    def backward(ctx: Any, grad_ne: Tensor) -> tuple[Tensor | None, ...]:
        balancer: Balancer = ctx.balancer
        tokens = grad_ne.shape[0]
        balancer.count(ctx.saved_tensors[0], tokens)
        share = None
        if ctx.needs_input_grad[1]:
            share = balancer.share_gradient(tokens).to(grad_ne.dtype).expand_as(grad_ne)
        return grad_ne, share, None, None


def _several_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _balancers(model: nn.Module) -> list[Balancer]:
    return [module for module in model.modules() if isinstance(module, Balancer)]


@torch.no_grad()
def update(model: nn.Module, factor: float | Tensor = 1.0) -> None:
    """Move every bias of ``model`` by the choices counted since the last call, over all ranks, and count anew.

    One collective for the whole model: the counts of all layers travel together.

    Args:
        model: the layers to balance.
        factor: learning rate over the one it started from, for layers whose biases are ``scheduled``.
    """
    balancers = _balancers(model)
    if balancers and _several_ranks():
        everything = torch.cat([part for b in balancers for part in (b.counts, b.tokens[None])])
        dist.all_reduce(everything)
        for b in balancers:
            size = b.counts.numel() + 1
            b.counts.copy_(everything[: size - 1])
            b.tokens.copy_(everything[size - 1])
            everything = everything[size:]
    for b in balancers:
        b.bias += b.step(factor)
        b.updates += 1
        b.load.copy_(b.counts)
        b.used.copy_(b.tokens)
        b.counts.zero_()
        b.tokens.zero_()


def attach(
    model: nn.Module, optimizer: torch.optim.Optimizer, *, summed_loss: nn.Module | None = None
) -> RemovableHandle:
    """Have ``optimizer.step()`` end with `update`; works in any training loop.

    With several optimizers attach to one of them, the last that steps. Counts of skipped steps stay and enter the next
    update. The schedule that ``scheduled`` biases follow is that of its first group of parameters: ``lr`` over
    ``initial_lr``, which torch's schedulers write there; without one the rate stays.

    Args:
        model: the layers to balance.
        optimizer: whose steps are followed.
        summed_loss: module around the model whose output is a loss *summed* over tokens, which the caller scales before
            its backward pass; auxiliary gradients then follow the same scale. None: the loss is a mean over the tokens.

    >>> from danlu.nn.moe import MoE, MoEConfig
    >>> layer = MoE(8, MoEConfig(num_experts=4, top_k=2, hidden=4))
    >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    >>> handle = attach(layer, optimizer)
    >>> layer(torch.randn(10, 8)).sum().backward()
    >>> optimizer.step()
    >>> layer.balancer.load.sum().item()
    20.0
    """
    if summed_loss is not None and any(b.config.auxiliary for b in _balancers(model)):
        summed_loss.register_forward_hook(_follow_the_scale)

    def follow(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        group = optimizer.param_groups[0]
        update(model, group["lr"] / start if (start := group.get("initial_lr")) else 1.0)

    return optimizer.register_step_post_hook(follow)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _follow_the_scale(objective: nn.Module, _: Any, loss: Tensor) -> None:
    """The backward pass begins at the loss: what arrives there is the weight that every token's loss has."""

    def arrived(upstream: Tensor) -> None:
        for balancer in _balancers(objective):
            balancer.upstream = upstream.detach()

    if loss.requires_grad:
        loss.register_hook(arrived)


@contextmanager
def watching(model: nn.Module) -> Iterator[list[Tensor]]:
    """Count the choices of every layer within, in evaluation too: a list of ``(experts,)``, one a layer.

    >>> from danlu.nn.moe import MoE, MoEConfig
    >>> layer = MoE(8, MoEConfig(num_experts=4, top_k=2, hidden=4)).eval()
    >>> with torch.no_grad(), watching(layer) as loads:
    ...     y = layer(torch.randn(10, 8))
    >>> loads[0].sum().item()
    20.0
    """
    balancers = _balancers(model)
    for b in balancers:
        b.watched = torch.zeros_like(b.counts)
    try:
        yield [b.watched for b in balancers if b.watched is not None]
    finally:
        for b in balancers:
            b.watched = None


def expert_load(model: nn.Module) -> dict[str, float]:
    """Balance at the last `update`: ``max_vio`` averaged over layers, ``idle_experts`` the share without a token.

    ``experts_per_token`` is the mean number in use where it is dynamic. Empty for a model without experts or before the
    first update.
    """
    balancers = _balancers(model)
    if not any(bool(b.load.sum() > 0) for b in balancers):
        return {}
    found = {
        "max_vio": torch.stack([max_violation(b.load) for b in balancers]).mean().item(),
        "idle_experts": torch.cat([b.load == 0 for b in balancers]).float().mean().item(),
    }
    dynamic = [b.load.sum() / b.used.clamp_min(1) for b in balancers if b.config.thresholds]
    if dynamic:
        found["experts_per_token"] = torch.stack(dynamic).mean().item()
    return found
