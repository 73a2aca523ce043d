"""Auxiliary loss by straight-through: which usual losses it contains, and what their value is worth."""

import torch
from torch import Tensor

from danlu.claims.frame import Claim, at_least, at_most
from danlu.nn import AuxiliaryLossConfig, MoE, MoEConfig
from danlu.nn.auxiliary_loss import straight_through
from danlu.nn.balance import follow_loss, max_violation, update


def _routed() -> tuple[Tensor, Tensor, Tensor]:
    logits = torch.randn(997, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    share = logits.softmax(-1)
    selected = torch.zeros_like(share).scatter_(-1, share.topk(2, -1).indices, 0.5).detach()
    return logits, share, selected


def _difference(form: str, *, straight: bool = True) -> float:
    """Relative distance of the straight-through gradient by the logits from that of the usual loss."""
    logits, share, selected = _routed()
    counted = selected.mean(0)
    load = straight_through(share, selected) if straight else share.mean(0)
    ours = load.square().sum() / 2 if form == "square" else (load * load.log()).sum()
    usual = (counted if form == "square" else counted.log()) @ share.mean(0)
    a, b = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (ours, usual))
    return float((a - b).norm() / b.norm())


def _improvement(weight: float) -> float:
    """How many times MaxVio falls over 120 steps of a skewed router that has no other loss."""
    generator = torch.Generator().manual_seed(0)
    balance = AuxiliaryLossConfig(weight=weight)
    layer = MoE(6, MoEConfig(num_experts=5, top_k=2, hidden=4, num_shared_experts=0, scale=1.0, balance=balance))
    with torch.no_grad():
        layer.router.copy_(torch.randn(5, 6, generator=generator) / 6**0.5)
        layer.w_down.zero_()
    x = torch.randn(512, 6, generator=generator)
    x[:, 0] += 2.0
    optimizer = torch.optim.Adam([layer.router], lr=0.02)
    violations = []
    for _ in range(120):
        follow_loss(layer(x).mean(), layer).backward()
        violations.append(float(max_violation(layer.balancer.counts)))
        optimizer.step()
        optimizer.zero_grad()
        update(layer)
    return violations[0] / max(violations[-1], 1e-3)


CLAIMS = (
    Claim(
        name="square-is-load-times-share",
        statement="relative difference of the gradients of |F|^2 / 2 and F.P; control: P in place of F",
        source="kexue.fm 10735",
        expected=1e-12,
        tolerance=at_most(),
        measure=lambda: _difference("square"),
        control=lambda: _difference("square", straight=False),
        seconds=0.1,
    ),
    Claim(
        name="entropy-is-share-times-log-load",
        statement="relative difference of the gradients of sum F log F and sum P log F; control: P in place of F",
        source="kexue.fm 10735",
        expected=1e-12,
        tolerance=at_most(),
        measure=lambda: _difference("entropy"),
        control=lambda: _difference("entropy", straight=False),
        seconds=0.1,
    ),
    Claim(
        name="balances",
        statement="times less MaxVio after 120 steps of a skewed router; control: weight 0",
        source="Switch, arXiv 2101.03961, section 2.2 (the loss encourages an even load)",
        expected=3.0,
        tolerance=at_least(),
        measure=lambda: _improvement(1.0),
        control=lambda: _improvement(0.0),
        seconds=1.0,
    ),
)
