"""Denoising: the error that averaging leaves, and EDM's targets of unit size."""

import torch

from danlu.claims.frame import Claim, at_most, relative
from danlu.diffusion import EDM, Prediction, from_x0_eps
from danlu.objectives import multiscale_loss


def _pooled_error(factor: int) -> float:
    """A component's error of a predictor of no noise, averaged over ``factor x factor`` pixels of 64 x 64."""
    noise = torch.randn(64, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    size = 64 // factor
    return float(multiscale_loss(noise, (size,)).mean()) * size


def _target_size(kind: Prediction) -> float:
    """Largest distance from 1 of the targets' variance at nine levels from 0.002 to 80; data of variance 1/4."""
    generator = torch.Generator().manual_seed(0)
    x0 = 0.5 * torch.randn(9, 40_000, generator=generator)
    eps = torch.randn(9, 40_000, generator=generator)
    target = from_x0_eps(x0, eps, torch.linspace(0, 1, 9), EDM(), kind)
    return float((target.var(1) - 1).abs().max())


CLAIMS = (
    Claim(
        name="pooled-error",
        statement="error of predicting no noise, averaged over 4 x 4 pixels; control: over 2 x 2",
        source="derivation: 1 / s^2; measured in simulation: 0.0619",
        expected=1 / 16,
        tolerance=relative(0.02),
        measure=lambda: _pooled_error(4),
        control=lambda: _pooled_error(2),
        seconds=0.2,
    ),
    Claim(
        name="unit-targets",
        statement="distance from 1 of the variance of a preconditioned target over all noise levels; control: of x0",
        source="Karras et al., arXiv 2206.00364, appendix B.6",
        expected=0.03,
        tolerance=at_most(),
        measure=lambda: _target_size("edm"),
        control=lambda: _target_size("x0"),
        seconds=0.2,
    ),
)
