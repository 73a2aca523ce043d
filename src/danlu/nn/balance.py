"""What all kinds of expert balancing share: the counts of a layer, the updates after an optimizer step, and measures.

A `Balancer` is a part of each `danlu.nn.MoE` layer. Its kind is a configuration (`danlu.protocols.BalanceConfig`) with
a file of its own: `danlu.nn.loss_free`, `danlu.nn.auxiliary_loss`, `danlu.nn.dynamic_experts`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from danlu._autograd import compiling, readable, tangents
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

    Its numbers are sums of many small ones: they stay float32 at least (the number of updates int64), whatever dtype
    the module is cast to.

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
        self.upstream: tuple[Tensor, bool] | None = None
        self.watched: Tensor | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Forget biases and counts."""
        for buffer in self.buffers():
            buffer.zero_()
        self.bias.fill_(self.start)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Balancer":
        def at_least_float32(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            if not new.is_floating_point() or new.dtype == (wide := torch.promote_types(new.dtype, torch.float32)):
                return new
            return tensor.to(new.device, wide)  # of the old numbers: the new ones are rounded

        return super()._apply(at_least_float32, recurse)  # type: ignore[no-any-return]

    def counts_now(self, scores_ne: Tensor) -> bool:
        """Whether the choices of these tokens are to be counted: in training or within `watching`, of real numbers.

        Raises:
            RuntimeError: an auxiliary loss, where its gradient cannot be added.
        """
        trains = self.training and torch.is_grad_enabled()
        if torch._C._are_functorch_transforms_active() or tangents((scores_ne,)):
            if trains and self.config.auxiliary:
                raise RuntimeError(
                    "an auxiliary balancing loss has no gradient under torch.func and in forward mode: call eval() on "
                    "the layer, or use torch.autograd"
                )
            return False
        if torch.compiler.is_exporting() and trains and self.config.auxiliary:
            raise RuntimeError("an auxiliary balancing loss cannot be exported: call eval() on the layer")
        if not (compiling() or readable(scores_ne)):
            return False
        return self.watched is not None or (trains and scores_ne.requires_grad)

    def watch(self, scores_ne: Tensor, counts_e: Tensor, real_n: Tensor | None = None) -> Tensor:
        """Return the scores unchanged, and have their backward pass count the choices and add the auxiliary gradient.

        Counting in the backward pass counts once also where activation checkpointing runs the forward pass twice. A
        compiled layer, which has no auxiliary loss, counts in its forward pass: no rule asks how often in all.

        Args:
            scores_ne: scores of tokens for experts.
            counts_e: the choices of the real tokens.
            real_n: False for tokens that are padding; None: there is none.
        """
        if self.watched is not None:
            self.watched += counts_e
        if not (self.training and torch.is_grad_enabled() and scores_ne.requires_grad):
            return scores_ne
        if compiling():
            self.count(counts_e, scores_ne.shape[0] if real_n is None else real_n.sum())
            return scores_ne
        share = None
        if self.config.auxiliary:
            total = scores_ne.sum(-1, keepdim=True)
            share = scores_ne / total.clamp_min(torch.finfo(scores_ne.dtype).tiny)
        watched: Tensor = _Watch.apply(scores_ne, share, counts_e, real_n, self)
        return watched

    def count(self, counts_e: Tensor, tokens: int | Tensor) -> None:
        """Add the choices of ``tokens`` tokens."""
        self.counts.add_(counts_e)
        self.tokens.add_(tokens)

    def share_gradient(self, tokens: int | Tensor) -> Tensor:
        """Derivative of the auxiliary loss by a token's normalised scores, at the load counted so far on all ranks.

        Raises:
            RuntimeError: nothing said which tensor is the loss, so that its scale is not known.
        """
        if self.upstream is None:
            raise RuntimeError(
                "an auxiliary balancing loss follows the scale of the training loss and does not know which tensor "
                "that is: call danlu.nn.balance.follow_loss(loss, model) before its backward pass, or once "
                "attach(model, optimizer, summed_loss=module) for a module that returns the loss summed over tokens"
            )
        counts = self.counts.clone()
        if _several_ranks():
            dist.all_reduce(counts)
        gradient = self.config.load_gradient(counts)
        upstream, summed = self.upstream
        return gradient * upstream if summed else gradient * upstream / tokens

    def step(self, factor: float | Tensor = 1.0) -> Tensor:
        """Change of the biases for what was counted, where the learning rate stands at ``factor`` of its start."""
        step = self.config.step(self.counts, self.tokens, self.budget)
        if self.config.scheduled:
            step = step * factor
        last = self.config.freeze_after
        return step if last is None else torch.where(self.updates < last, step, 0.0)


class _Watch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        scores_ne: Tensor,
        share_ne: Tensor | None,
        counts_e: Tensor,
        real_n: Tensor | None,
        balancer: Balancer,
    ) -> Tensor:
        ctx.balancer, ctx.counted = balancer, False
        ctx.save_for_backward(counts_e, real_n)
        return scores_ne.view_as(scores_ne)

    @staticmethod
    def backward(ctx: Any, grad_ne: Tensor) -> tuple[Tensor | None, ...]:
        balancer: Balancer = ctx.balancer
        counts_e, real_n = ctx.saved_tensors
        tokens = grad_ne.shape[0] if real_n is None else real_n.sum()
        if not ctx.counted:  # a second pass over the same graph meets the same tokens
            balancer.count(counts_e, tokens)
            ctx.counted = True
        share = None
        if ctx.needs_input_grad[1]:
            share = balancer.share_gradient(tokens).to(grad_ne.dtype).expand_as(grad_ne)
            if real_n is not None:
                share = share.masked_fill(~real_n[:, None], 0)
        return grad_ne, share, None, None, None


def _several_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _balancers(model: nn.Module) -> list[Balancer]:
    return [module for module in model.modules() if isinstance(module, Balancer)]


def has_experts(model: nn.Module) -> bool:
    """Say whether anything in ``model`` is balanced, so that it matters which tokens are padding.

    >>> has_experts(nn.Linear(2, 3))
    False
    """
    return bool(_balancers(model))


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
            its backward pass; auxiliary gradients then follow the same scale. None: say it of each loss, by
            `follow_loss`.

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
        summed_loss.register_forward_hook(_follow_the_output)

    def follow(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        group = optimizer.param_groups[0]
        update(model, group["lr"] / start if (start := group.get("initial_lr")) else 1.0)

    return optimizer.register_step_post_hook(follow)


@torch.compiler.disable(reason="an auxiliary balancing loss follows the backward pass")  # type: ignore[untyped-decorator]
def follow_loss(loss: Tensor, model: nn.Module, *, summed: bool = False) -> Tensor:
    """Have the auxiliary gradients of ``model`` follow ``loss``, whatever it is multiplied by before its backward pass.

    The backward pass reaches the loss first, and what arrives there is the weight that every token's loss has: a
    fraction where gradients are accumulated, 65536 where a gradient scaler looks after float16. Without an auxiliary
    loss nothing happens.

    Args:
        loss: as it is for one batch, before any scaling.
        model: the layers to balance.
        summed: whether the loss is a sum over tokens; otherwise it is a mean.

    Returns:
        ``loss``.

    >>> from danlu.nn.auxiliary_loss import AuxiliaryLossConfig
    >>> from danlu.nn.moe import MoE, MoEConfig
    >>> layer = MoE(8, MoEConfig(num_experts=4, top_k=2, hidden=4, balance=AuxiliaryLossConfig()))
    >>> loss = follow_loss(layer(torch.randn(10, 8)).square().mean(), layer)
    >>> (loss / 4).backward()
    """
    balancers = [b for b in _balancers(model) if b.config.auxiliary]

    def forget() -> None:
        for balancer in balancers:
            balancer.upstream = None

    def arrived(upstream: Tensor) -> None:
        for balancer in balancers:
            balancer.upstream = (upstream, summed)
        # The next loss has its own scale.
        torch.autograd.Variable._execution_engine.queue_callback(forget)

    if balancers and loss.requires_grad:
        loss.register_hook(arrived)
    return loss


def _follow_the_output(objective: nn.Module, _: Any, loss: Tensor) -> None:
    follow_loss(loss, objective, summed=True)


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
