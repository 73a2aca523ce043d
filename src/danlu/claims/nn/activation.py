"""SquarePlus: the constants that tie it to softplus, and the digits it keeps."""

import math

import torch
from torch import Tensor

from danlu.claims.frame import Claim, absolute, at_least, at_most
from danlu.nn.activation import DOMINANT, EQUAL_AT_ZERO, MINIMAX, squareplus, squareplus_derivative, squareplus_inverse


def _distance(b: float) -> Tensor:
    """Squareplus minus softplus on a fine grid of [-50, 50]."""
    x = torch.linspace(-50, 50, 1_000_001, dtype=torch.float64)
    return squareplus(x, b) - torch.logaddexp(x, torch.zeros(1, dtype=torch.float64))


def _formula(x: Tensor, b: Tensor) -> Tensor:
    """The printed formula, which is as good as any at moderate arguments."""
    return (x + (x * x + b).sqrt()) / 2


def _gradient_error(*, half: bool = True) -> float:
    """Largest error of value and gradients by x and b, for one b and one for each x, against the written-out slopes.

    The control forgets that b enters the root's derivative by a half.
    """
    worst = 0.0
    x = torch.linspace(-3, 3, 70_001, dtype=torch.float64)  # more than one block, with 0 in the middle
    for b in (torch.tensor(1.7, dtype=torch.float64), torch.linspace(0.5, 5, 70_001, dtype=torch.float64)):
        inputs = [t.clone().requires_grad_() for t in (x, b)]
        weight = torch.linspace(1, 2, 70_001, dtype=torch.float64)
        y = squareplus(*inputs)
        found = torch.autograd.grad((weight * y).sum(), inputs)
        root = (x * x + b).sqrt()
        by_b = (weight / (4 if half else 2) / root).sum_to_size(b.shape)
        slope = (1 + x / root) / 2
        pairs = [(y.detach(), _formula(x, b)), (found[0], weight * slope), (found[1], by_b)]
        pairs.append((squareplus_derivative(x, b), slope))
        worst = max(worst, *(float(((a - c) / c).abs().max()) for a, c in pairs))
    return worst


def _float32_error(*, stable: bool) -> float:
    """Largest relative error of value and slope in float32 over x in [-1e4, -1e-3]."""
    x = -torch.logspace(-3, 4, 100_001, dtype=torch.float64).float()
    root = (x.double().square() + 4).sqrt()
    exact = 2 / (root - x.double())
    inputs = x.clone().requires_grad_()
    here = squareplus(inputs) if stable else _formula(inputs, torch.tensor(4.0))
    (slope,) = torch.autograd.grad(here.sum(), inputs)
    pairs = ((here.detach().double(), exact), (slope.double(), exact / root))
    return max(float((a / b - 1).abs().max()) for a, b in pairs)


def _round_trip(b: float) -> float:
    x = torch.linspace(-30, 30, 10_001, dtype=torch.float64)
    return float((squareplus_inverse(squareplus(x, 4.0), b) - x).abs().max())


CLAIMS = (
    Claim(
        name="minimax-error",
        statement="largest distance from softplus at the best b; control: b = 1.52, its first digits",
        source="kexue.fm 8833 (0.075931); 0.0759314499 by equioscillation",
        expected=0.07593144993,
        tolerance=absolute(2e-10),
        measure=lambda: float(_distance(MINIMAX).abs().max()),
        control=lambda: float(_distance(1.52).abs().max()),
        seconds=0.2,
    ),
    Claim(
        name="dominance",
        statement="least of squareplus minus softplus over [-50, 50] at b = 4 log(2)^2; control: 0.999 of that b",
        source="kexue.fm 8833",
        expected=0,
        tolerance=at_least(1e-15),
        measure=lambda: float(_distance(DOMINANT).min()),
        control=lambda: float(_distance(0.999 * DOMINANT).min()),
        seconds=0.2,
    ),
    Claim(
        name="equal-at-zero",
        statement="value at 0 with b = 4 log(2)^2; control: b = 1.92",
        source="kexue.fm 8833",
        expected=math.log(2),
        tolerance=absolute(1e-15),
        measure=lambda: squareplus(torch.zeros(1, dtype=torch.float64), EQUAL_AT_ZERO).item(),
        control=lambda: squareplus(torch.zeros(1, dtype=torch.float64), 1.92).item(),
        seconds=0.1,
    ),
    Claim(
        name="gradients",
        statement="relative error of values and gradients by x and b against the formulas; control: twice that by b",
        source="derivation: y / sqrt(x^2 + b) and 1 / (4 sqrt(x^2 + b))",
        expected=2e-14,
        tolerance=at_most(),
        measure=_gradient_error,
        control=lambda: _gradient_error(half=False),
        seconds=0.1,
    ),
    Claim(
        name="digits-below-zero",
        statement="relative error of value and slope in float32 over [-1e4, -1e-3]; control: the printed formula",
        source="derivation: max(x, 0) + b / 2 / (root + |x|) adds positive numbers only",
        expected=2**-21,
        tolerance=at_most(),
        measure=lambda: _float32_error(stable=True),
        control=lambda: _float32_error(stable=False),
        seconds=0.1,
    ),
    Claim(
        name="inverse",
        statement="error of x = y - b / (4 y) after y = squareplus(x), x in [-30, 30]; control: another b",
        source="Barron, arXiv 2112.11687",
        expected=1.5e-14,
        tolerance=at_most(),
        measure=lambda: _round_trip(4.0),
        control=lambda: _round_trip(4.001),
        seconds=0.1,
    ),
)
