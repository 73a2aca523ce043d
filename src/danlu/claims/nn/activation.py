"""SquarePlus: the constants that tie it to softplus, and the digits it keeps."""

import math

import torch
from torch import Tensor

from danlu.claims.frame import Claim, absolute, at_least, at_most
from danlu.nn.activation import DOMINANT, EQUAL_AT_ZERO, MINIMAX, squareplus, squareplus_inverse


def _distance(b: float) -> Tensor:
    """Squareplus minus softplus on a fine grid of [-50, 50]."""
    x = torch.linspace(-50, 50, 1_000_001, dtype=torch.float64)
    return squareplus(x, b) - torch.logaddexp(x, torch.zeros(1, dtype=torch.float64))


def _float32_error(*, stable: bool) -> float:
    """Largest relative error in float32 over x in [-1e4, -1e-3]."""
    x = -torch.logspace(-3, 4, 100_001, dtype=torch.float64).float()
    exact = squareplus(x.double())
    here = squareplus(x) if stable else (x + torch.sqrt(x * x + 4)) / 2
    return float(((here.double() - exact) / exact).abs().max())


def _round_trip(b: float) -> float:
    x = torch.linspace(-30, 30, 10_001, dtype=torch.float64)
    return float((squareplus_inverse(squareplus(x, 4.0), b) - x).abs().max())


CLAIMS = (
    Claim(
        name="minimax-error",
        statement="largest distance from softplus at the best b; control: b = 4, the default of jax and keras",
        source="kexue.fm 8833 (0.075931); 0.0759314499 by equioscillation",
        expected=0.07593144993,
        tolerance=absolute(1e-8),
        measure=lambda: float(_distance(MINIMAX).abs().max()),
        control=lambda: float(_distance(4.0).abs().max()),
        seconds=0.3,
    ),
    Claim(
        name="dominance",
        statement="least of squareplus minus softplus over [-50, 50] at b = 4 log(2)^2; control: 0.999 of that b",
        source="kexue.fm 8833",
        expected=0,
        tolerance=at_least(1e-12),
        measure=lambda: float(_distance(DOMINANT).min()),
        control=lambda: float(_distance(0.999 * DOMINANT).min()),
        seconds=0.3,
    ),
    Claim(
        name="equal-at-zero",
        statement="value at 0 with b = 4 log(2)^2; control: the minimax b",
        source="kexue.fm 8833",
        expected=math.log(2),
        tolerance=absolute(1e-12),
        measure=lambda: squareplus(torch.zeros(1, dtype=torch.float64), EQUAL_AT_ZERO).item(),
        control=lambda: squareplus(torch.zeros(1, dtype=torch.float64), MINIMAX).item(),
        seconds=0.1,
    ),
    Claim(
        name="digits-below-zero",
        statement="relative error in float32 over [-1e4, -1e-3]; control: the formula as it is printed",
        source="derivation: max(x, 0) + b / 2 / (root + |x|) adds positive numbers only",
        expected=1e-6,
        tolerance=at_most(),
        measure=lambda: _float32_error(stable=True),
        control=lambda: _float32_error(stable=False),
        seconds=0.2,
    ),
    Claim(
        name="inverse",
        statement="error of x = y - b / (4 y) after y = squareplus(x), x in [-30, 30]; control: another b",
        source="Barron, arXiv 2112.11687",
        expected=1e-12,
        tolerance=at_most(),
        measure=lambda: _round_trip(4.0),
        control=lambda: _round_trip(4.001),
        seconds=0.1,
    ),
)
