"""SiD: which loss of a generator points to the data, in closed form for normal data."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from danlu.claims.frame import Claim, at_most, relative
from danlu.objectives import generator_loss


def players(alpha: float | None, *, steps: int = 4000, rate: float = 0.01) -> tuple[float, float]:
    """Let generator and student score play on data N(0, 1), and return the generator's mean and standard deviation.

    ``x_g = mu + k z`` starts at mu = 3, k = 0.3; the student's (mu, k) follows by a fifth each step; the noise is
    ``ln sigma ~ N(-1.2, 1.2^2)``. Every step takes the expected gradient of ``L2 - alpha L1`` in the noise
    (``alpha`` None: of L1 alone), which is closed: gap and residual are linear in z and eps.
    """
    points, weights = np.polynomial.hermite_e.hermegauss(61)
    weight = weights / weights.sum()
    power: NDArray[np.float64] = np.exp(-1.2 + 1.2 * points) ** 2  # b^2
    c = 1 / (1 + power)  # f_phi = c x
    mu, k, psi_mu, psi_k = 3.0, 0.3, 3.0, 0.3
    second, first = (0.0, -1.0) if alpha is None else (1.0, alpha)
    for _ in range(steps):
        psi_mu, psi_k = psi_mu + 0.2 * (mu - psi_mu), psi_k + 0.2 * (k - psi_k)
        d = psi_k**2 / (psi_k**2 + power)  # f_psi = psi_mu + d (x - psi_mu)
        slope, mean = c - d, (c - d) * mu - (1 - d) * psi_mu  # f_phi - f_psi = slope x + ..., with this mean
        of_mu = second * (c - 1) * (slope * mu + mean) - first * 2 * slope * mean
        of_k = 2 * slope * k * (second * (c - 1) - first * slope)
        mu, k = mu - rate * float(weight @ (of_mu / power)), k - rate * float(weight @ (of_k / power))
    return mu, k


def _gradient(alpha: float, *, follow: bool = False) -> Tensor:
    """The gradient in (mu, k) at mu = 1, k = 0.5 of the loss in images, a = 1, b = 0.5, by quadrature.

    The student is at its best; ``follow`` lets it move with the generator.
    """
    points, weights = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(9))
    weight = (weights[:, None] * weights).flatten() / weights.sum() ** 2
    z, eps = (v.flatten()[:, None] for v in torch.meshgrid(points, points, indexing="ij"))
    theta = torch.tensor([1.0, 0.5], dtype=torch.float64, requires_grad=True)
    psi = theta if follow else theta.detach()
    x_g = theta[0] + theta[1] * z
    x = x_g + 0.5 * eps
    f_phi, f_psi = x / 1.25, psi[0] + psi[1] ** 2 / (psi[1] ** 2 + 0.25) * (x - psi[0])
    loss = generator_loss(f_phi, f_psi, x_g, alpha, normalise=False) / 0.25
    return torch.autograd.grad((weight * loss).sum(), theta)[0]


def _half_error(alpha: float) -> float:
    """Distance of twice the gradient with a constant student from the true one, relative."""
    true = -2 * (_gradient(1.0, follow=True) - _gradient(0.5, follow=True))  # twice half of L1, which L2 equals
    return float((2 * _gradient(alpha) - true).norm() / true.norm())


CLAIMS = (
    Claim(
        name="alpha-one-half",
        statement="distance of twice the frozen gradient from the true one of the score distance; control: alpha 1",
        source="kexue.fm 10567; derivation by the envelope theorem",
        expected=1e-9,
        tolerance=at_most(),
        measure=lambda: _half_error(0.5),
        control=lambda: _half_error(1.0),
        seconds=0.1,
    ),
    Claim(
        name="mean-at-alpha-one",
        statement="d/dmu of the loss for a student half as wide as the data, frozen; control: L2 alone, of wrong sign",
        source="derivation: a^2 c d mu = 0.4, and a^2 c (2c - d) mu = -0.08 for L2",
        expected=0.4,
        tolerance=relative(1e-9),
        measure=lambda: float(_gradient(1.0)[0]),
        control=lambda: float(_gradient(0.0)[0]),
        seconds=0.1,
    ),
    Claim(
        name="players-find-the-data",
        statement="distance of the generator's mean from the data's after 4000 steps, alpha 1.2; control: L1 alone",
        source="kexue.fm 10085: L1 alone gives nothing useful",
        expected=0.2,
        tolerance=at_most(),
        measure=lambda: abs(players(1.2)[0]),
        control=lambda: abs(players(None)[0]),
        seconds=0.5,
    ),
)
