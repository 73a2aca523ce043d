"""Quantization model: the power law with its half, the exponent in data, a finite list's bend, the slow logarithm."""

import math

import torch

from danlu.analysis import data_loss, entropy_tail, log_log_slope, quanta_loss, quanta_loss_power_law
from danlu.claims.frame import Claim, absolute, at_most


def _power_law_error(shift: float) -> float:
    """Relative error of the power law at n = 10, g = 0.4; a shift of 0.5 takes the half away again."""
    return float(quanta_loss_power_law(10 - shift, 0.4) / quanta_loss(10, 0.4)) - 1


def _exponent_in_data(*, quanta: int | None) -> float:
    """Minus the slope of the loss in the number of samples, from 1e8 to 1e9, g = 0.4, ten samples a quantum."""
    few, many = (data_loss(samples, 0.4, quanta=quanta) for samples in (1e8, 1e9))
    return math.log10(few / many)


def _exponent_in_quanta(quanta: int | None) -> float:
    """Minus the slope of the loss in the number of quanta learned, from 10 to 100, g = 0.4."""
    n = torch.logspace(1, 2, 30)
    return -log_log_slope(n, quanta_loss(n, 0.4, quanta=quanta))


def _slope_with_logarithm(learned: int) -> float:
    """Minus the local slope of the loss with costs of -log p."""
    here, there = entropy_tail(learned, 0.4)[0], entropy_tail(learned + learned // 100, 0.4)[0]
    return math.log(here / there) / math.log(1.01)


CLAIMS = (
    Claim(
        name="power-law-with-its-half",
        statement="relative error of (n + 1/2)^-g / (g zeta) at n = 10, g = 0.4; control: n^-g",
        source="derivation: the midpoint rule (2.1e-4; 2.0e-2 for n^-g)",
        expected=2.2e-4,
        tolerance=at_most(),
        measure=lambda: _power_law_error(0.0),
        control=lambda: _power_law_error(0.5),
        seconds=0.1,
    ),
    Claim(
        name="exponent-in-data",
        statement="exponent of the expected loss in samples, 1e8 to 1e9, g = 0.4; control: a list of 10^7 quanta",
        source="Michaud et al., arXiv 2303.13506: g / (g + 1)",
        expected=0.4 / 1.4,
        tolerance=absolute(0.002),
        measure=lambda: _exponent_in_data(quanta=None),
        control=lambda: _exponent_in_data(quanta=10**7),
        seconds=0.2,
    ),
    Claim(
        name="finite-lists-look-steeper",
        statement="exponent fitted over n = 10 to 100 of 500 quanta with g = 0.4; control: infinitely many",
        source="derivation: the truncated sum (0.604)",
        expected=0.604,
        tolerance=absolute(0.005),
        measure=lambda: _exponent_in_quanta(500),
        control=lambda: _exponent_in_quanta(None),
        seconds=0.1,
    ),
    Claim(
        name="logarithms-fade-slowly",
        statement="local exponent at n = 1000, g = 0.4, when a quantum costs -log p; control: at n = 10^5",
        source="derivation: (m^-g log m) beside m^-g (0.302 and 0.333)",
        expected=0.302,
        tolerance=absolute(0.001),
        measure=lambda: _slope_with_logarithm(1000),
        control=lambda: _slope_with_logarithm(100_000),
        seconds=0.3,
    ),
)
