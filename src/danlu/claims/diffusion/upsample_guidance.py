"""Upsample guidance: the small model's word is the exact mean of the average, and what it costs."""

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from danlu.claims.frame import Claim, at_most, exact, relative
from danlu.diffusion import EDM, Cosine, Flow, Schedule, aligned_time, upsample_guidance

_WEIGHTS, _MEANS = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([-1.1, 0.2, 1.4]).double()
_SPREAD = 0.3


def _pixel(x: Tensor, t: Tensor) -> Tensor:
    """``E[x0 | x, t]`` of a pixel from three normal distributions; zero for images of more than one pixel."""
    if x.shape[-1] > 1:
        return torch.zeros_like(x)
    (a, b), x = (c.reshape(-1, 1) for c in Cosine().coefficients(t)), x.reshape(-1, 1)
    variance = a**2 * _SPREAD**2 + b**2
    weight = (_WEIGHTS.log() - (x - a * _MEANS) ** 2 / (2 * variance)).softmax(-1)
    each = _MEANS + a * _SPREAD**2 / variance * (x - a * _MEANS)
    return (weight * each).sum(-1).reshape(-1, 1, 1, 1)


def _largest_z(*, aligned: bool, factor: int = 2, time: float = 0.6, count: int = 40_000) -> float:
    """Largest z-score, over five test functions, of the average's error; the control keeps the large image's time."""
    generator = torch.Generator().manual_seed(0)
    which = torch.multinomial(_WEIGHTS, count, replacement=True, generator=generator)
    grain = torch.randn(count, 1, factor, factor, dtype=torch.float64, generator=generator)
    x0 = _MEANS[which].view(-1, 1, 1, 1) + factor * _SPREAD * grain
    t = torch.full((count,), time, dtype=torch.float64)
    x = Cosine().noised(x0, torch.randn(x0.shape, dtype=torch.float64, generator=generator), t)
    if aligned:
        guess = avg_pool2d(upsample_guidance(_pixel, Cosine(), factor, weight=1.0)(x, t), factor)
    else:
        rho = (Cosine().coefficients(t)[0] / Cosine().coefficients(aligned_time(Cosine(), t, factor))[0])[:, None]
        guess = _pixel(avg_pool2d(x, factor) / rho[..., None, None], t)
    residual, y = (avg_pool2d(x0, factor) - guess).flatten(), avg_pool2d(x, factor).flatten()
    products = residual * torch.stack([torch.ones_like(y), y, y.square(), y.sin(), (2 * y).cos()])
    return float((products.mean(-1) / products.std(-1) * count**0.5).abs().max())


def _formula_error(*, ratio: bool = True) -> float:
    """Largest error of the guided noise against the printed formula, on three schedules; else x not over rho."""
    generator, worst = torch.Generator().manual_seed(0), 0.0

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        return x.sin() * (1 + t).view(-1, 1, 1, 1)

    def noise(x: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
        a, b = (c.view(-1, 1, 1, 1) for c in schedule.coefficients(t))
        return (x - a * denoise(x, t)) / b

    for schedule in (Cosine(), Flow(), EDM()):
        t = torch.tensor([0.3, 0.5, 0.8], dtype=torch.float64)
        x = torch.randn(3, 2, 6, 9, generator=generator, dtype=torch.float64)
        (a, b), tau = (c.view(-1, 1, 1, 1) for c in schedule.coefficients(t)), aligned_time(schedule, t, 3)
        rho = a / schedule.coefficients(tau)[0].view(-1, 1, 1, 1) if ratio else 1.0
        fine, small = noise(x, t, schedule), noise(avg_pool2d(x, 3) / rho, tau, schedule)
        coarse = (small / 3 - avg_pool2d(fine, 3)).repeat_interleave(3, 2).repeat_interleave(3, 3)
        guided = fine + torch.tensor([0.0, 1.2, 1.2], dtype=torch.float64).view(-1, 1, 1, 1) * coarse
        found = upsample_guidance(denoise, schedule, 3, weight=1.2, start=0.5)(x, t)
        worst = max(worst, float(((x - a * found) / b - guided).abs().max()))
    return worst


def _pixels_asked(factor: int) -> float:
    """Pixels that a call asks the model about, over those of the large image."""
    asked = 0

    def counting(x: Tensor, t: Tensor) -> Tensor:
        nonlocal asked
        asked += x.numel()
        return x

    x = torch.zeros(3, 1, 8, 8)
    upsample_guidance(counting, Cosine(), factor)(x, torch.full((3,), 0.5))
    return asked / x.numel()


def _rho(t: float, factor: int) -> float:
    tau = aligned_time(Cosine(), t, factor)
    return float(Cosine().coefficients(t)[0] / Cosine().coefficients(tau)[0])


CLAIMS = (
    Claim(
        name="printed-formula",
        statement="error of the guided noise against eps + theta U[..], s = 3, three schedules; control: rho left out",
        source="arXiv 2404.01709, equation 11; kexue.fm 10055",
        expected=5e-15,
        tolerance=at_most(),
        measure=_formula_error,
        control=lambda: _formula_error(ratio=False),
        seconds=0.1,
    ),
    Claim(
        name="exact-mean",
        statement="largest |z| of the average's error over five test functions, 4e4 images; control: tau left out",
        source="arXiv 2404.01709; own measurement: all |z| < 2, up to 319 without tau and rho",
        expected=2.5,
        tolerance=at_most(),
        measure=lambda: _largest_z(aligned=True),
        control=lambda: _largest_z(aligned=False),
        seconds=0.1,
    ),
    Claim(
        name="rho",
        statement="a_t / a_tau of the cosine at t = 0.5, s = 4; control: s = 2",
        source="kexue.fm 10055: sqrt(a^2 + b^2 / s^2)",
        expected=0.7288689869,
        tolerance=relative(1e-9),
        measure=lambda: _rho(0.5, 4),
        control=lambda: _rho(0.5, 2),
        seconds=0.1,
    ),
    Claim(
        name="cost",
        statement="pixels asked about at s = 4 over those of the image; control: s = 2",
        source="arXiv 2404.01709: about 1 / s^2 more",
        expected=17 / 16,
        tolerance=exact(),
        measure=lambda: _pixels_asked(4),
        control=lambda: _pixels_asked(2),
        seconds=0.1,
    ),
)
