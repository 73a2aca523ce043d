"""Flow matching: its smallest loss on normal data is not zero, and known."""

import math

import torch
from torch import Tensor, nn

from danlu.claims.frame import Claim, relative
from danlu.objectives import FlowMatching, evaluate

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
    """Loss an image of 1000 images of 400 normal components."""
    images = _STD * torch.randn(1000, 1, 20, 20, generator=torch.Generator().manual_seed(0))
    return evaluate(FlowMatching(_Velocity(factor)), [{"images": images}])["val_loss"]


CLAIMS = (
    Claim(
        name="smallest-loss",
        statement="loss of the exact velocity of normal data, standard deviation 0.7; control: no velocity",
        source="derivation: Var(eps - x0 | xt) = S^2 / ((1-t)^2 S^2 + t^2), over t: pi S / 2",
        expected=math.pi * _STD / 2,
        tolerance=relative(0.03),
        measure=lambda: _loss(1.0),
        control=lambda: _loss(0.0),
        seconds=0.2,
    ),
)
