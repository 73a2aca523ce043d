"""Auxiliary loss by straight-through: which usual losses it contains, and that the load goes where it is wanted."""

import torch
from torch import Tensor

from danlu.claims.frame import Claim, at_most
from danlu.nn import AuxiliaryLossConfig, MoE, MoEConfig
from danlu.nn.auxiliary_loss import FORMS, straight_through
from danlu.nn.balance import attach, follow_loss

_TARGET = (1.0, 2.0, 3.0, 2.0, 2.0)


def _layer(config: AuxiliaryLossConfig, generator: torch.Generator) -> MoE:
    """A layer whose output is zero: its router has no gradient but that of the auxiliary loss."""
    layer = MoE(6, MoEConfig(num_experts=5, top_k=2, hidden=4, num_shared_experts=0, scale=1.0, balance=config))
    with torch.no_grad():
        layer.router.copy_(torch.randn(5, 6, generator=generator) / 6**0.5)
        layer.w_down.zero_()
    return layer


def _usual(load: Tensor, share: Tensor, form: str, target: Tensor) -> Tensor:
    """The losses of the literature: the first factor is a constant."""
    difference = len(load) * (load - target) if form == "square" else (load / target).log()
    return difference.detach() @ share


def _difference(form: str, *, counted: bool = True) -> float:
    """Relative distance of gradients from those of the usual loss, or of that with P in place of F.

    By the logits for a loss written in the straight-through load, by a layer's router for the layer's own loss in two
    parts of a batch behind which there is padding, seven times the loss; each with an even and another target.
    """
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for wanted in (None, _TARGET):
        target = torch.tensor(wanted or (1.0,) * 5, dtype=torch.float64)
        target = target / target.sum()
        config = AuxiliaryLossConfig(form=form, weight=0.3, target=wanted)  # type: ignore[arg-type]
        layer = _layer(config, generator).double()
        x = torch.randn(997, 6, generator=generator, dtype=torch.float64) + 0.5
        total: Tensor = torch.zeros((), dtype=torch.float64)
        counts = torch.zeros(5, dtype=torch.float64)
        for part in (x[:400], x):  # the second part is counted behind the first
            score = (part @ layer.router.mT).sigmoid()
            share = score / score.sum(-1, keepdim=True)
            selected = torch.zeros_like(share).scatter_(-1, score.topk(2, -1).indices, 0.5).detach()
            counts = counts + selected.sum(0)
            load = counts / counts.sum() if counted else share.mean(0)
            total = total + 7 * 0.3 * _usual(load, share.mean(0), form, target)
            padded, real = torch.cat((part, part[:50])), torch.arange(len(part) + 50) < len(part)
            (7 * follow_loss(layer(padded, real=real).mean(), layer)).backward()
            if len(part) == 400:
                ours = 0.3 * FORMS[form](straight_through(share, selected), target)
                usual = 0.3 * _usual(load, share.mean(0), form, target)
                a, b = (torch.autograd.grad(loss, layer.router, retain_graph=True)[0] for loss in (ours, usual))
                worst = max(worst, float((a - b).norm() / b.norm()))
        expected = torch.autograd.grad(total, layer.router)[0]
        assert layer.router.grad is not None
        worst = max(worst, float((layer.router.grad - expected).norm() / expected.norm()))
    return worst


def _distance(target: tuple[float, ...] | None) -> float:
    """Largest distance of an expert's load from a tenth of 1, 2, 3, 2, 2 after 150 steps of a skewed router."""
    generator = torch.Generator().manual_seed(0)
    layer = _layer(AuxiliaryLossConfig(weight=1.0, target=target), generator)
    x = torch.randn(512, 6, generator=generator)
    x[:, 0] += 2.0
    optimizer = torch.optim.Adam([layer.router], lr=0.02)
    attach(layer, optimizer)
    for step in range(150):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 150)
        follow_loss(layer(x).mean(), layer).backward()
        optimizer.step()
        optimizer.zero_grad()
    load = layer.balancer.load / layer.balancer.load.sum()
    return float((load - torch.tensor(_TARGET) / 10).abs().max())


CLAIMS = (
    Claim(
        name="square-is-load-times-share",
        statement="relative difference of the gradients of n |F - Q|^2 / 2 and n (F - Q).P; control: P in place of F",
        source="kexue.fm 10735",
        expected=1e-14,
        tolerance=at_most(),
        measure=lambda: _difference("square"),
        control=lambda: _difference("square", counted=False),
        seconds=0.1,
    ),
    Claim(
        name="entropy-is-share-times-log-load",
        statement="relative difference of the gradients of sum F log F/Q and sum P log F/Q; control: P in place of F",
        source="kexue.fm 10735",
        expected=1e-14,
        tolerance=at_most(),
        measure=lambda: _difference("entropy"),
        control=lambda: _difference("entropy", counted=False),
        seconds=0.1,
    ),
    Claim(
        name="balances",
        statement="distance of the load from (1, 2, 3, 2, 2) / 10 after 150 steps of a skewed router; control: Q even",
        source="kexue.fm 10735: any target Q; Switch, arXiv 2101.03961, section 2.2, for an even one",
        expected=0.003,
        tolerance=at_most(),
        measure=lambda: _distance(_TARGET),
        control=lambda: _distance(None),
        seconds=1.2,
    ),
)
