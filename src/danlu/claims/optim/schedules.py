"""Learning-rate schedules: the balance that inverse time solves, half-lives, and a plateau that knows no end."""

import math

import torch
from torch import nn
from torch.optim import SGD

from danlu.claims.frame import Claim, at_most, exact, relative
from danlu.optim import Constant, Cosine, InverseTime, ScheduleConfig, WarmupStableDecay, schedule


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


def _distance_from_table(*, idle_start: bool) -> float:
    """Largest distance of factors from figures worked out by hand; the control starts a warm-up at 0."""
    table: tuple[tuple[ScheduleConfig, dict[int, float]], ...] = (
        (Constant(warmup=4), {0: 0.25, 1: 0.5, 3: 1.0, 99: 1.0}),
        (Constant(), {0: 1.0, 99: 1.0}),
        (Constant(warmup=0.1), {4: 0.5, 9: 1.0, 10: 1.0}),
        (WarmupStableDecay(warmup=0.1, decay=0.4, floor=0.2), {4: 0.5, 50: 1.0, 60: 1.0, 80: 0.6, 99: 0.22, 100: 0.2}),
        (
            WarmupStableDecay(warmup=0, decay=16, shape="sqrt"),
            {83: 1.0, 84: 1.0, 88: 0.5, 93: 0.25, 100: 0.0, 200: 0.0},
        ),
        (WarmupStableDecay(warmup=0, decay=0), {99: 1.0, 100: 0.0}),
        (
            Cosine(warmup=20, floor=0.1),
            {9: 0.5, 20: 1.0, 40: 0.1 + 0.9 * 0.5 * (1 + math.sqrt(0.5)), 60: 0.55, 100: 0.1},
        ),
        (Cosine(warmup=100), {49: 0.5, 99: 1.0, 150: 0.1}),
        (InverseTime(half_life=30, warmup=10), {4: 0.5, 10: 1.0, 40: 0.5, 100: 0.25}),
        (InverseTime(half_life=30, squared=True), {0: 1.0, 30: 0.5, 60: 1 / (2 * math.sqrt(2) - 1) ** 2}),
    )
    worst = 0.0
    for config, rows in table:
        warmup = config.warmup if isinstance(config.warmup, int) else round(100 * config.warmup)
        for step, expected in rows.items():
            right = step / warmup if idle_start and step < warmup else expected
            worst = max(worst, abs(config.factor(step, 100) - right))
    settled = (
        (Constant(), 1.0),
        (WarmupStableDecay(decay=0.3), 0.7),
        (InverseTime(), 1.0),
        (WarmupStableDecay(decay=50), 0.5),
    )
    return max(worst, *(abs(config.settles_at(100) - share) for config, share in settled))


def _rate_of_late_group(*, told: bool) -> float:
    """Rate, over its own, of a group of rate 0.5 added after 3 of 8 steps of a decay, at step 4; control: at step 3."""
    weights = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = SGD([weights[0]], lr=2.0)
    scheduler = schedule(optimizer, WarmupStableDecay(warmup=0, decay=8), 8)
    for count in range(4):
        if count == 3:
            optimizer.add_param_group({"params": [weights[1]], "lr": 0.5})
            if not told:
                return float(optimizer.param_groups[1]["lr"] / 0.5)
        optimizer.step()
        scheduler.step()
    return float(optimizer.param_groups[1]["lr"] / 0.5 * optimizer.param_groups[0]["lr"])


CLAIMS = (
    Claim(
        name="inverse-square-time",
        statement="distance of the squared form from the recurrence with power 3/2; control: the plain form's power",
        source="kexue.fm 9344, schedule A: 1 / (a0 p t + 1)^2",
        expected=2e-4,
        tolerance=at_most(),
        measure=lambda: _recurrence_error(squared=True, power=1.5),
        control=lambda: _recurrence_error(squared=True, power=2.0),
        seconds=0.1,
    ),
    Claim(
        name="inverse-time",
        statement="distance of the plain form from the recurrence with power 2; control: the squared form's power",
        source="kexue.fm 9344, schedule B: 1 / (2 a0 p0 t + 1)",
        expected=1e-4,
        tolerance=at_most(),
        measure=lambda: _recurrence_error(squared=False, power=2.0),
        control=lambda: _recurrence_error(squared=False, power=1.5),
        seconds=0.1,
    ),
    Claim(
        name="table",
        statement="largest distance of 38 factors of ten schedules from figures by hand; control: a warm-up from 0",
        source="derivation: their definitions",
        expected=1e-14,
        tolerance=at_most(),
        measure=lambda: _distance_from_table(idle_start=False),
        control=lambda: _distance_from_table(idle_start=True),
        seconds=0.1,
    ),
    Claim(
        name="late-group",
        statement="factors of two groups, multiplied, when one joins late, half way down; control: before a step",
        source="derivation: 1/2 for the late group, 1 for a rate of 2",
        expected=0.5,
        tolerance=relative(1e-12),
        measure=lambda: _rate_of_late_group(told=True),
        control=lambda: _rate_of_late_group(told=False),
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
