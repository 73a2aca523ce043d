"""Learning-rate schedules: the balance that inverse time solves, half-lives, and a plateau that knows no end."""

import math

from danlu.claims.frame import Claim, at_most, exact, relative
from danlu.optim import Cosine, InverseTime, ScheduleConfig, WarmupStableDecay


def _recurrence(power: float, steps: int, rate: float = 1e-4) -> float:
    """What ``D <- D - 2 rate D^power`` leaves of 1: the decay that balances progress and weight decay."""
    level = 1.0
    for _ in range(steps):
        level -= 2 * rate * level**power
    return level


def _recurrence_error(*, squared: bool, power: float) -> float:
    """Largest relative distance of the schedule from the recurrence at 1000 and 10 000 steps, rate 1e-4."""
    half_life = (math.sqrt(2) - 1) / 1e-4 if squared else 1 / 2e-4
    config = InverseTime(half_life=half_life, squared=squared)
    return max(abs(config.factor(t, 1) / _recurrence(power, t) - 1) for t in (1000, 10_000))


def _half_life_error(config: InverseTime, step: int) -> float:
    return abs(config.factor(step, 1) - 0.5)


def _prolonging_changes(config: ScheduleConfig) -> float:
    """Steps of the first 70 of 100 whose rate changes when the run is made ten times as long."""
    return float(sum(config.factor(step, 100) != config.factor(step, 1000) for step in range(70)))


def _decay_sum(config: WarmupStableDecay) -> float:
    return sum(config.factor(step, 100) for step in range(100)) / 50.5


CLAIMS = (
    Claim(
        name="inverse-square-time",
        statement="distance of the squared form from the recurrence with power 3/2; control: the plain form's power",
        source="kexue.fm 9344, schedule A: 1 / (a0 p t + 1)^2",
        expected=1e-3,
        tolerance=at_most(),
        measure=lambda: _recurrence_error(squared=True, power=1.5),
        control=lambda: _recurrence_error(squared=True, power=2.0),
        seconds=0.1,
    ),
    Claim(
        name="inverse-time",
        statement="distance of the plain form from the recurrence with power 2; control: the squared form's power",
        source="kexue.fm 9344, schedule B: 1 / (2 a0 p0 t + 1)",
        expected=1e-3,
        tolerance=at_most(),
        measure=lambda: _recurrence_error(squared=False, power=2.0),
        control=lambda: _recurrence_error(squared=False, power=1.5),
        seconds=0.1,
    ),
    Claim(
        name="half-life",
        statement="distance from one half after one half-life, squared form; control: after the plain rate's half-life",
        source="derivation: a0 p = (sqrt(2) - 1) / T",
        expected=1e-12,
        tolerance=at_most(),
        measure=lambda: _half_life_error(InverseTime(half_life=37, squared=True), 37),
        control=lambda: _half_life_error(InverseTime(half_life=37 * (math.sqrt(2) - 1), squared=True), 37),
        seconds=0.1,
    ),
    Claim(
        name="plateau-knows-no-end",
        statement="rates before the decay that change when a run is made ten times as long; control: cosine",
        source="MiniCPM, arXiv 2404.06395, section 4.2",
        expected=0,
        tolerance=exact(),
        measure=lambda: _prolonging_changes(WarmupStableDecay(warmup=10, decay=0.3)),
        control=lambda: _prolonging_changes(Cosine(warmup=10)),
        seconds=0.1,
    ),
    Claim(
        name="linear-decay",
        statement="sum of the factors of a linear decay over n steps over n/2 + 1/2; control: the square-root decay",
        source="derivation: 1 + (n - 1)/n + ... + 1/n = (n + 1) / 2",
        expected=1.0,
        tolerance=relative(1e-12),
        measure=lambda: _decay_sum(WarmupStableDecay(warmup=0, decay=100)),
        control=lambda: _decay_sum(WarmupStableDecay(warmup=0, decay=100, shape="sqrt")),
        seconds=0.1,
    ),
)
