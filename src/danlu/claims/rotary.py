"""Rotary position embedding: relative positions from absolute ones, norms kept, angles right far out."""

import math

import torch
from torch import Tensor

from danlu.claims.frame import Claim, at_most
from danlu.nn.rotary import rotary_angles, rotate


def _sample() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 19, 26, generator=generator, dtype=torch.float64)
    return q, k


def _shift_error(*, rotated: bool) -> float:
    """Largest change of the score matrix when all positions move by 1000; else with tables added instead."""
    q, k = _sample()
    scores = []
    for start in (0.0, 1000.0):
        cos, sin = rotary_angles(start + torch.arange(19, dtype=torch.float64), 26)
        if rotated:
            scores.append(rotate(q, cos, sin) @ rotate(k, cos, sin).mT)
        else:
            scores.append((q + cos + sin) @ (k + cos + sin).mT)
    return float((scores[0] - scores[1]).abs().max())


def _norm_error(*, with_sine: bool) -> float:
    """Largest relative change of a vector's norm."""
    q, _ = _sample()
    cos, sin = rotary_angles(torch.arange(19, dtype=torch.float64), 26)
    turned = rotate(q, cos, sin if with_sine else torch.zeros_like(sin))
    return float((turned.norm(dim=-1) / q.norm(dim=-1) - 1).abs().max())


def _far_error(*, double: bool) -> float:
    """Largest error of the cosines at position 1 234 567 against Python's own arithmetic."""
    position, dim = 1_234_567, 64
    exact = [math.cos(position * 10000.0 ** (-2 * j / dim)) for j in range(dim // 2)]
    if double:
        here = rotary_angles(torch.tensor([position]), dim)[0][0, : dim // 2].double()
    else:
        frequencies = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim)
        here = (position * frequencies).cos().double()
    return float((here - torch.tensor(exact, dtype=torch.float64)).abs().max())


CLAIMS = (
    Claim(
        name="relative-positions",
        statement="largest change of 19 x 19 scores when positions move by 1000; control: tables added to the vectors",
        source="RoFormer, arXiv 2104.09864, equation 16",
        expected=1e-11,
        tolerance=at_most(),
        measure=lambda: _shift_error(rotated=True),
        control=lambda: _shift_error(rotated=False),
        seconds=0.1,
    ),
    Claim(
        name="norm-kept",
        statement="largest relative change of a norm by the rotation; control: without the sine part",
        source="RoFormer, arXiv 2104.09864, section 3.2.2 (the matrices are orthogonal)",
        expected=1e-14,
        tolerance=at_most(),
        measure=lambda: _norm_error(with_sine=True),
        control=lambda: _norm_error(with_sine=False),
        seconds=0.1,
    ),
    Claim(
        name="far-positions",
        statement="error of float32 tables at position 1 234 567; control: angles multiplied out in float32",
        source="derivation: a float32 angle of 1e6 is rounded by up to 0.03",
        expected=1e-6,
        tolerance=at_most(),
        measure=lambda: _far_error(double=True),
        control=lambda: _far_error(double=False),
        seconds=0.1,
    ),
)
