"""Flow matching: its smallest loss on normal data is not zero, and known."""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from danlu.claims.frame import Claim, at_most, relative
from danlu.objectives import FlowMatching, FlowMatchingConfig, draws, evaluate

_STD = 0.7


class _Velocity(nn.Module):
    """``factor`` times the velocity of data N(0, 0.7^2)."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, x: Tensor, t: Tensor, classes: Tensor | None = None) -> Tensor:
        t = t.view(-1, 1, 1, 1)
        return self.factor * (t - (1 - t) * _STD**2) / ((1 - t) ** 2 * _STD**2 + t**2) * x


def _loss(factor: float) -> float:
    """Loss an image of 8000 images of 100 normal components."""
    images = _STD * torch.randn(8000, 1, 10, 10, generator=torch.Generator().manual_seed(0))
    return evaluate(FlowMatching(_Velocity(factor)), [{"images": images}])["val_loss"]


def _loss_error(*, towards: float = 1.0) -> float:
    """Relative error of a loss against the mean square of ``v(x_t, t) - (eps - x_0)``; else away from noise."""
    images = _STD * torch.randn(50, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    network, keys = _Velocity(0.8), torch.arange(50)
    found = evaluate(FlowMatching(network), [{"images": images, "position": keys}])["val_loss"]
    t = draws.uniform(keys, "times").view(-1, 1, 1, 1)
    eps = draws.normal(keys, "noise", 1, 4, 4)
    wanted = (network((1 - t) * images + t * eps, t) - towards * (eps - images)).double().square().mean()
    return abs(found / float(wanted.detach()) - 1)


def _drawn_error(*, steps: int) -> float:
    """Largest distance of images drawn by the exact velocity in 5 steps of Euler or Heun from the same by hand."""
    network, worst = _Velocity(1.0), 0.0
    methods: tuple[Literal["euler", "heun"], ...] = ("euler", "heun")
    for method in methods:
        objective = FlowMatching(network, FlowMatchingConfig(sampler=method))
        found = objective.sample((3, 1, 2, 2), steps=5, generator=torch.Generator().manual_seed(0))
        x = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0))
        for step in range(steps):
            t, late = ((steps - step - k) / steps * torch.ones(3) for k in (0, 1))
            v = network(x, t)
            if method == "heun" and step + 1 < steps:
                v = (v + network(x - v / steps, late)) / 2
            x = x - v / steps
        worst = max(worst, float((found - x).detach().abs().max()))
    return worst


CLAIMS = (
    Claim(
        name="written-out",
        statement="relative error of a loss against the mean of |v - (eps - x_0)|^2; control: the velocity from noise",
        source="Lipman et al., arXiv 2210.02747; Liu et al., 2209.03003",
        expected=1e-6,
        tolerance=at_most(),
        measure=_loss_error,
        control=lambda: _loss_error(towards=-1.0),
        seconds=0.1,
    ),
    Claim(
        name="drawn",
        statement="distance of images drawn in 5 steps of Euler and Heun from those by hand; control: 6 steps by hand",
        source="arXiv 2210.02747, section 6; 2206.00364, algorithm 1",
        expected=1e-6,
        tolerance=at_most(),
        measure=lambda: _drawn_error(steps=5),
        control=lambda: _drawn_error(steps=6),
        seconds=0.1,
    ),
    Claim(
        name="smallest-loss",
        statement="loss of the exact velocity of normal data, standard deviation 0.7; control: 0.7 of it",
        source="derivation: Var(eps - x0 | xt) = S^2 / ((1-t)^2 S^2 + t^2), over t: pi S / 2",
        expected=math.pi * _STD / 2,
        tolerance=relative(0.01),
        measure=lambda: _loss(1.0),
        control=lambda: _loss(0.7),
        seconds=0.1,
    ),
)
