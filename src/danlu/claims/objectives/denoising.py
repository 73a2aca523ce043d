"""Denoising: EDM's loss and targets of unit size, and the error that averaging leaves."""

import math

import torch
from torch import Tensor, nn

from danlu.claims.frame import Claim, at_most, relative
from danlu.diffusion import (
    EDM,
    Cosine,
    LogNormalNoise,
    Prediction,
    ScheduleConfig,
    ddim,
    ddpm,
    from_x0_eps,
    heun,
    preconditioning,
    time_grid,
)
from danlu.objectives import Denoising, DenoisingConfig, draws, evaluate, multiscale_loss


def _pooled_error(factor: int) -> float:
    """A component's error of a predictor of no noise, averaged over ``factor x factor`` pixels of 64 x 64."""
    noise = torch.randn(256, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    size = 64 // factor
    return float(multiscale_loss(noise, (size,)).mean()) * size


def _target_size(kind: Prediction, data_std: float = 0.5) -> float:
    """Largest distance from 1 of the targets' variance at nine levels from 0.002 to 80; data of variance 1/4."""
    generator = torch.Generator().manual_seed(0)
    x0 = 0.5 * torch.randn(9, 40_000, generator=generator)
    eps = torch.randn(9, 40_000, generator=generator)
    target = from_x0_eps(x0, eps, torch.linspace(0, 1, 9), EDM(), kind, data_std=data_std)
    return float((target.var(1) - 1).abs().max())


def _constants_error(sigma: float) -> float:
    """Largest error of EDM's four constants at noise 2.5."""
    found = preconditioning(EDM().time(-2 * math.log(sigma)), EDM())
    listed = (0.0384615, 0.4902903, 0.3922323, 0.2290727)
    return max(abs(float(a) - b) for a, b in zip(found, listed))


class _Network(nn.Module):
    """A network ``net(x, t, classes)`` that depends on both."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor, classes: Tensor | None = None) -> Tensor:
        return (self.gain * x + t.view(-1, 1, 1, 1)).sin()


def _drawn_error(*, clip: bool = True) -> float:
    """Largest distance of images drawn by three samplers from the same by hand, clipped where denoised."""
    network, worst = _Network(), 0.0
    for sampler in ("ddim", "ddpm", "heun"):
        config = DenoisingConfig(sampler=sampler, eta=0.3)
        found = Denoising(network, config).sample((3, 1, 2, 2), steps=5, generator=torch.Generator().manual_seed(0))
        generator = torch.Generator().manual_seed(0)
        schedule, times = config.schedule, time_grid(config.schedule, 5)
        x = schedule.coefficients(1.0)[1] * torch.randn(3, 1, 2, 2, generator=generator)

        def denoise(x: Tensor, t: Tensor, schedule: ScheduleConfig = schedule) -> Tensor:
            a, b = (c.view(-1, 1, 1, 1) for c in schedule.coefficients(t))
            drawn: Tensor = a * x - b * network(x, t)
            return drawn.clamp(-1, 1) if clip else drawn

        if sampler == "ddim":
            wanted = ddim(denoise, x, schedule, times, eta=0.3, generator=generator)
        elif sampler == "ddpm":
            wanted = ddpm(denoise, x, schedule, times, generator=generator)
        else:
            wanted = heun(denoise, x, schedule, times)
        worst = max(worst, float((found - wanted).detach().abs().max()))
    return worst


def _loss_error(*, scaled: bool = True) -> float:
    """Largest relative error of the losses by EDM and of v against their printed forms; else x not scaled by c_in."""
    network, images = _Network(), torch.randn(6, 2, 8, 8, generator=torch.Generator().manual_seed(1)).double() / 2
    worst = 0.0
    for resolutions in ((), (2, 8)):
        edm = DenoisingConfig(schedule=EDM(), prediction="edm", times=LogNormalNoise(), resolutions=resolutions)
        plain = DenoisingConfig(schedule=Cosine(), prediction="v", resolutions=resolutions)
        for config in (edm, plain):
            keys = torch.arange(6)
            found = evaluate(Denoising(network, config), [{"images": images, "position": keys}])["val_loss"]
            eps = draws.normal(keys, "noise", 2, 8, 8, dtype=torch.float64)
            if config is edm:
                level = EDM().time(-2 * (-1.2 + 1.2 * draws.normal(keys, "times")))
                sigma = EDM().coefficients(level.double())[1].view(-1, 1, 1, 1)
                root = (sigma**2 + 0.25).sqrt()
                x = images + sigma * eps
                output = network(x / root if scaled else x, (sigma.log() / 4).flatten())
                denoised = 0.25 / root**2 * x + 0.5 * sigma / root * output
                error = root / (0.5 * sigma) * (denoised - images)
            else:
                t = draws.uniform(keys, "times").double()
                a, b = ((math.pi / 2 * t.view(-1, 1, 1, 1)).cos(), (math.pi / 2 * t.view(-1, 1, 1, 1)).sin())
                error = network(a * images + b * eps, t) - (a * eps - b * images)
            wanted = error.square().mean()
            if resolutions:
                coarse = error.unflatten(2, (2, 4)).unflatten(4, (2, 4)).mean((3, 5))
                wanted = coarse.square().mean() / 2 + wanted / 8
            worst = max(worst, abs(found / float(wanted.detach()) - 1))
    return worst


CLAIMS = (
    Claim(
        name="written-out",
        statement="relative error of the losses of EDM and v, plain and at two sizes; control: input not over its size",
        source="arXiv 2206.00364, equation 8; 2202.00512, section 4; 2301.11093, section 3.2",
        expected=1e-15,
        tolerance=at_most(),
        measure=_loss_error,
        control=lambda: _loss_error(scaled=False),
        seconds=0.1,
    ),
    Claim(
        name="drawn",
        statement="distance of images drawn by three samplers with v from those by hand; control: not clipped",
        source="arXiv 2202.00512, section 4: x_0 = a x - b v; 2010.02502, 2006.11239, 2206.00364",
        expected=1e-4,
        tolerance=at_most(),
        measure=_drawn_error,
        control=lambda: _drawn_error(clip=False),
        seconds=0.1,
    ),
    Claim(
        name="constants",
        statement="distance of EDM's four constants at noise 2.5 from the worked ones; control: at 2.49",
        source="Karras et al., arXiv 2206.00364, table 1, worked to seven digits",
        expected=5e-8,
        tolerance=at_most(),
        measure=lambda: _constants_error(2.5),
        control=lambda: _constants_error(2.49),
        seconds=0.1,
    ),
    Claim(
        name="pooled-error",
        statement="error of predicting no noise, averaged over 4 x 4 pixels; control: over 2 x 2",
        source="derivation: 1 / s^2; measured in simulation: 0.0619",
        expected=1 / 16,
        tolerance=relative(0.01),
        measure=lambda: _pooled_error(4),
        control=lambda: _pooled_error(2),
        seconds=0.1,
    ),
    Claim(
        name="unit-targets",
        statement="distance from 1 of a target's variance over all noise levels; control: 0.49 as the data's std",
        source="Karras et al., arXiv 2206.00364, appendix B.6",
        expected=0.02,
        tolerance=at_most(),
        measure=lambda: _target_size("edm"),
        control=lambda: _target_size("edm", 0.49),
        seconds=0.1,
    ),
)
