r"""Scaling laws from discrete skills: the quantization model.

What a model can learn comes in quanta. Quantum k is used by a share :math:`p_k = k^{-(g+1)} / \zeta(g+1)` of the
samples, and the most used quanta are learned first. Learning quantum k lowers the loss of the samples that use it from
b to a. With n quanta learned

.. math:: L_n = a + (b - a) \frac{\zeta(g+1, n+1)}{\zeta(g+1)} \approx a + (b - a) \frac{(n + 1/2)^{-g}}{g \zeta(g+1)},

a power law in n, although each single quantum is learned abruptly. The number of parameters limits how many quanta fit
(n ~ N), the data limit how many are seen often enough, and the number of steps limits how many are reached.

Source: Michaud et al., "The Quantization Model of Neural Scaling", arXiv:2303.13506.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from danlu._validate import integer, number, positive

__all__ = [
    "Exponents",
    "data_loss",
    "entropy_tail",
    "exponents",
    "log_log_slope",
    "quanta_frequencies",
    "quanta_loss",
    "quanta_loss_power_law",
    "rank_correlation",
]


def _zeta(s: float, q: Tensor | float) -> Tensor:
    """Hurwitz zeta, sum over k >= 0 of (k + q)^-s, in float64."""
    found: Tensor = torch.special.zeta(torch.tensor(s, dtype=torch.float64), torch.as_tensor(q, dtype=torch.float64))
    return found


def quanta_frequencies(count: int, g: float) -> Tensor:
    """Return ``p_1 … p_count``, the shares of the first ``count`` of infinitely many quanta.

    Args:
        count: how many.
        g: exponent of the loss in the number of quanta, above 0; the frequencies fall as ``k**-(g + 1)``.

    >>> quanta_frequencies(2, 1.0)  # 6 / pi^2, a quarter of it
    tensor([0.6079, 0.1520], dtype=torch.float64)
    """
    integer("count", count)
    positive("g", g)
    return torch.arange(1, count + 1, dtype=torch.float64) ** -(g + 1) / _zeta(g + 1, 1)


def quanta_loss(
    learned: Tensor | float, g: float, *, low: float = 0.0, high: float = 1.0, quanta: int | None = None
) -> Tensor:
    """Return the loss with the first quanta learned, exactly.

    Args:
        learned: number of quanta learned, of any shape.
        g: as in `quanta_frequencies`.
        low, high: loss of a sample with its quantum learned, and without.
        quanta: how many there are in all; None: infinitely many. With a finite list the loss falls below the power law,
            and an exponent fitted to it is larger than ``g``: compare fits with this function and not with ``g``.

    >>> quanta_loss(torch.tensor([0, 10, 100]), 0.4)
    tensor([1.0000, 0.3142, 0.1273], dtype=torch.float64)
    """
    positive("g", g)
    n = torch.as_tensor(learned, dtype=torch.float64)
    last = math.inf if quanta is None else quanta
    if quanta is not None:
        integer("quanta", quanta)
    if not bool(((n >= 0) & (n <= last)).all()):
        raise ValueError(f"learned must be from 0 to {last}, got {n}")
    beyond = 0.0 if quanta is None else _zeta(g + 1, quanta + 1.0)
    return low + (high - low) * (_zeta(g + 1, n + 1) - beyond) / (_zeta(g + 1, 1) - beyond)


def quanta_loss_power_law(learned: Tensor | float, g: float, *, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Return the loss by the power law ``(n + 1/2)**-g / (g zeta(g + 1))``.

    The 1/2 comes from the midpoint rule for the sum. With it the relative error at n = 10, g = 0.4 is 2e-4; that of
    ``n**-g`` is 2e-2.

    >>> quanta_loss_power_law(10, 0.4)
    tensor(0.3143, dtype=torch.float64)
    """
    positive("g", g)
    n = torch.as_tensor(learned, dtype=torch.float64)
    return low + (high - low) * (n + 0.5) ** -g / (g * _zeta(g + 1, 1))


class Exponents(NamedTuple):
    """How the loss above its minimum falls: ``N**-parameters``, ``D**-data``, ``S**-steps``."""

    parameters: float
    data: float
    steps: float


def exponents(g: float) -> Exponents:
    """Return the three exponents: ``g`` in parameters, ``g / (g + 1)`` in data and in steps.

    >>> exponents(1.0)
    Exponents(parameters=1.0, data=0.5, steps=0.5)
    """
    positive("g", g)
    return Exponents(g, g / (g + 1), g / (g + 1))


def data_loss(
    samples: float,
    g: float,
    *,
    threshold: int = 10,
    low: float = 0.0,
    high: float = 1.0,
    quanta: int | None = None,
    resolution: float = 0.005,
) -> float:
    r"""Return the expected loss after training on ``samples`` independent samples.

    Quantum k is learned when at least ``threshold`` samples used it; their number is Poisson with mean ``samples p_k``:

    .. math:: L = a + (b - a) \sum_k p_k\, P(\mathrm{Poisson}(D p_k) < \tau)

    Args:
        samples: D.
        g: as in `quanta_frequencies`.
        threshold: samples that a quantum needs.
        low, high, quanta: as in `quanta_loss`.
        resolution: quanta beyond the thousandth are summed in blocks of this relative width.

    >>> round(data_loss(1e6, 0.4), 4)
    0.0411
    """
    positive("samples", samples)
    positive("g", g)
    integer("threshold", threshold)
    positive("resolution", resolution)
    total = _zeta(g + 1, 1) - (0.0 if quanta is None else _zeta(g + 1, quanta + 1.0))
    # Far beyond the first quantum that is seen once, all are unlearned: one last block.
    end = max(2000.0, 1e4 * (samples / float(total)) ** (1 / (g + 1)))
    blocks = math.ceil(math.log(end / 1000) / resolution)
    edges = torch.cat(
        [torch.arange(1.0, 1000, dtype=torch.float64), torch.logspace(3, math.log10(end), blocks).double()]
    )
    if quanta is not None:
        edges = torch.cat([edges[edges < quanta + 1], torch.tensor([quanta + 1.0], dtype=torch.float64)])
    mass = _zeta(g + 1, edges[:-1]) - _zeta(g + 1, edges[1:])
    count = edges[1:] - edges[:-1]
    unlearned = torch.special.gammaincc(torch.tensor(float(threshold)).double(), samples / total * mass / count)
    lost = (mass * unlearned).sum() + (_zeta(g + 1, edges[-1]) if quanta is None else 0.0)
    return float(low + (high - low) * lost / total)


def entropy_tail(learned: int, g: float) -> tuple[float, float]:
    r"""Return the loss when an unlearned quantum costs ``-log p_k`` and a learned one nothing: exact and approximate.

    .. math:: \sum_{k > n} -p_k \log p_k \approx \frac{1 + g + g \log\zeta}{g^2 \zeta} m^{-g}
              + \frac{g+1}{g \zeta} m^{-g} \log m, \qquad m = n + 1/2

    The logarithm vanishes slowly: at g = 0.4 the local slope is 0.302 at n = 1000 and 0.333 at 1e5.

    Source: Michaud et al., arXiv:2303.13506, appendix A.

    >>> [round(value, 4) for value in entropy_tail(1000, 0.4)]
    [0.7264, 0.7264]
    """
    integer("learned", learned, low=0)
    positive("g", g)
    import mpmath  # takes a while to load, and this function alone needs it

    s = g + 1
    total, tail = float(_zeta(s, 1)), float(_zeta(s, learned + 1.0))
    exact = (-s * float(mpmath.zeta(s, learned + 1, 1)) + math.log(total) * tail) / total
    m = learned + 0.5
    form = (1 + g + g * math.log(total)) / (g * g * total) * m**-g + s / (g * total) * m**-g * math.log(m)
    return exact, form


def log_log_slope(x: Tensor, y: Tensor) -> float:
    """Return the least-squares slope of ``log y`` over ``log x``: minus the exponent of a falling power law.

    >>> x = torch.tensor([1.0, 10.0, 100.0])
    >>> round(log_log_slope(x, 3 * x**-0.5), 6)
    -0.5
    """
    x, y = _two_vectors(x, y)
    if not bool(((x > 0) & x.isfinite() & (y > 0) & y.isfinite()).all()):
        raise ValueError("x and y must be positive and finite")
    a, b = x.log() - x.log().mean(), y.log() - y.log().mean()
    number("the spread of log x", float(a.abs().max()), low=0, low_open=True)
    return float((a * b).sum() / a.square().sum())


def rank_correlation(x: Tensor, y: Tensor) -> float:
    """Return Spearman's rank correlation: 1 where y increases whenever x does, whatever the curve.

    Ties share their mean rank, and an infinite value (a quantum that was never learned) ranks last. The memory grows
    with the square of the length.

    Raises:
        ValueError: vectors of different lengths or shorter than 2, or a vector of equal values.

    >>> rank_correlation(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0, 11.0, torch.inf]))
    1.0
    """
    x, y = _two_vectors(x, y)
    a, b = _centred_ranks("x", x), _centred_ranks("y", y)
    return float(a @ b / (a @ a * (b @ b)).sqrt())


def _centred_ranks(name: str, values: Tensor) -> Tensor:
    row, column = values, values[:, None]
    ranks = (row < column).sum(1) + ((row == column).sum(1) + 1) / 2
    number(f"the spread of {name}", float((values != values[0]).sum()), low=0, low_open=True)
    return (ranks - ranks.mean()).double()


def _two_vectors(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    x, y = torch.as_tensor(x, dtype=torch.float64), torch.as_tensor(y, dtype=torch.float64)
    if x.shape != y.shape or x.ndim != 1 or len(x) < 2:
        raise ValueError(f"x and y must be vectors of equal length, at least 2, got {tuple(x.shape)}, {tuple(y.shape)}")
    return x, y
