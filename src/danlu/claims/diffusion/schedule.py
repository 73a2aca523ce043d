"""Noise schedules: aligned times, the shift for higher resolution, and exact conversions of predictions."""

import itertools
import math

import torch
from torch import Tensor

from danlu.claims.frame import Claim, at_most, exact, relative
from danlu.diffusion import (
    EDM,
    PREDICTIONS,
    Betas,
    Cosine,
    Flow,
    Schedule,
    Shifted,
    aligned_time,
    convert,
    from_x0_eps,
)

_STABLE = Betas(start=0.00085, end=0.012, power=2)
_TABLE = {
    (Betas(), 2): {10: 3, 100: 48, 300: 175, 500: 366, 700: 596, 900: 820, 999: 928},
    (Betas(), 4): {100: 22, 500: 230, 999: 851},
    (Betas(start=2e-5), 2): {100: 50, 500: 366, 999: 928},
    (_STABLE, 2): {500: 292, 999: 874},
    (_STABLE, 4): {500: 127, 999: 723},
}
_TIMES = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)


def _table_misses(power: int) -> float:
    """Entries of the published table that the step nearest to ``factor^power`` times the ratio is not."""
    misses = 0
    for (schedule, factor), entries in _TABLE.items():
        levels = schedule.levels()
        for step, expected in entries.items():
            found = int((levels - levels[step] - power * math.log(factor)).abs().argmin())
            misses += found != expected
    return float(misses)


def _printed(kind: str, t: Tensor) -> tuple[Tensor, Tensor]:
    """a and b of the printed schedules, with the two shifted ones at their own scale."""
    if kind in ("cosine", "limited"):
        first = math.atan(math.exp(-4.0)) if kind == "limited" else 0.0
        angle = first + (math.pi / 2 - 2 * first) * t
        return angle.cos(), angle.sin()
    if kind == "edm":
        return torch.ones_like(t), (0.002 ** (1 / 7) * (1 - t) + 80 ** (1 / 7) * t) ** 7
    if kind == "flow":
        return 1 - t, t
    if kind == "betas":
        betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
        step = (1000 * t.detach()).long()
        kept = (1 - betas).cumprod(0)[step - 1] * (1 - betas[step]) ** (1000 * t - step)
        return kept.sqrt(), (1 - kept).sqrt()
    a, b = _printed("cosine" if kind == "shifted" else "flow", t)
    factor = 4.0 if kind == "shifted" else 4.0 ** (1 - t) * 2.0**t
    size = (a**2 + factor**2 * b**2).sqrt() if kind == "shifted" else a + factor * b
    return a / size, factor * b / size


def _schedule_error(*, half: bool = False) -> float:
    """Largest relative error of a, b, their derivatives, log SNR, its slope, its exponential and its inverse.

    The control forgets that the log SNR is of squares.
    """
    schedules: dict[str, Schedule] = {
        "cosine": Cosine(),
        "limited": Cosine(limit=8.0),
        "edm": EDM(),
        "flow": Flow(),
        "betas": Betas(),
        "shifted": Shifted(base=Cosine(), factor=4.0),
        "interpolated": Shifted(base=Flow(), factor=4.0, final=2.0),
    }
    worst, t = 0.0, (_TIMES + 3e-4).requires_grad_()
    for kind, schedule in schedules.items():
        a, b = _printed(kind, t)
        logsnr = (1 if half else 2) * (a / b).log()
        slopes = [
            torch.autograd.grad(value.sum(), t, retain_graph=True)[0] if value.requires_grad else 0 * t
            for value in (a, b)
        ]
        found = [*schedule.coefficients(t), *schedule.derivatives(t), schedule.logsnr_slope(t)]
        found += [schedule.logsnr(t), schedule.snr(t), schedule.time(logsnr.detach())]
        wanted = (a, b, *slopes, 2 * (slopes[0] / a - slopes[1] / b), logsnr, logsnr.exp(), t)
        for x, y in zip(found, wanted):
            x, y = x.detach(), y.detach()
            worst = max(worst, float((x - y).abs().max() / y.abs().max().clamp_min(1e-9)))
    return worst


def _shift_error(*, closed: bool) -> float:
    """Largest relative error of SNR_high s^2 / SNR_low at s = 4; the control shifts sigma's logarithm half as far."""
    high = Shifted(base=Cosine(), factor=4.0 if closed else 2.0)
    return float((high.snr(_TIMES) * 16 / Cosine().snr(_TIMES) - 1).abs().max())


def _conversion_error(read_as: Schedule | None = None) -> float:
    """Largest error of all conversions on four schedules; the control reads every sample as one of ``read_as``."""
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 19, 31, generator=generator, dtype=torch.float64)
    worst = 0.0
    for schedule in (Cosine(), Betas(), Flow(), EDM(sigma_max=20.0)):
        x = schedule.noised(x0, eps, _TIMES)
        reader = read_as or schedule
        for source, target in itertools.permutations(PREDICTIONS, 2):
            given = from_x0_eps(x0, eps, _TIMES, schedule, source)
            expected = from_x0_eps(x0, eps, _TIMES, schedule, target)
            found = convert(given, x, _TIMES, reader, source=source, target=target)
            worst = max(worst, float((found - expected).abs().max() / expected.abs().max().clamp_min(1)))
    return worst


CLAIMS = (
    Claim(
        name="formulas",
        statement="error of seven schedules, their ratios, inverses and slopes; control: log SNR not of squares",
        source="arXiv 2102.09672, 2006.11239, 2206.00364 (equation 5), 2210.02747, 2301.11093 (section 3.1)",
        expected=2e-13,
        tolerance=at_most(),
        measure=_schedule_error,
        control=lambda: _schedule_error(half=True),
        seconds=0.1,
    ),
    Claim(
        name="aligned-time",
        statement="time of the cosine schedule whose ratio is 4 times that at t = 0.5; control: twice the ratio",
        source="kexue.fm 10055: (2 / pi) atan(tan(pi t / 2) / s)",
        expected=0.2951672353,
        tolerance=relative(2e-10),
        measure=lambda: float(aligned_time(Cosine(), 0.5, 2)),
        control=lambda: float(aligned_time(Cosine(), 0.5, math.sqrt(2))),
        seconds=0.1,
    ),
    Claim(
        name="aligned-steps",
        statement="of 17 published steps of DDPM's, the author's and Stable Diffusion's schedules, those not found; "
        "control: the ratio times s",
        source="derivation of the table: nearest step in log SNR",
        expected=0,
        tolerance=exact(),
        measure=lambda: _table_misses(2),
        control=lambda: _table_misses(1),
        seconds=0.1,
    ),
    Claim(
        name="shift",
        statement="relative error of SNR_high s^2 / SNR_low at s = 4; control: shifted by s instead of s^2",
        source="Hoogeboom et al., arXiv 2301.11093, section 3.1",
        expected=2e-15,
        tolerance=at_most(),
        measure=lambda: _shift_error(closed=True),
        control=lambda: _shift_error(closed=False),
        seconds=0.1,
    ),
    Claim(
        name="conversions",
        statement="largest error of the 30 conversions of predictions on four schedules; control: one schedule for all",
        source="derivation: all are linear in data and noise",
        expected=5e-14,
        tolerance=at_most(),
        measure=_conversion_error,
        control=lambda: _conversion_error(Cosine()),
        seconds=0.1,
    ),
)
