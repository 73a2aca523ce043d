"""Noise schedules: aligned times, the shift for higher resolution, and exact conversions of predictions."""

import itertools
import math

import torch

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
        expected=1e-9,
        tolerance=at_most(),
        measure=lambda: _shift_error(closed=True),
        control=lambda: _shift_error(closed=False),
        seconds=0.1,
    ),
    Claim(
        name="conversions",
        statement="largest error of the 30 conversions of predictions on four schedules; control: one schedule for all",
        source="derivation: all are linear in data and noise",
        expected=1e-12,
        tolerance=at_most(),
        measure=_conversion_error,
        control=lambda: _conversion_error(Cosine()),
        seconds=0.3,
    ),
)
