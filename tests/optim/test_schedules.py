"""Schedules: their shapes in closed form, and resuming them."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from danlu.optim import Constant, Cosine, InverseTime, WarmupStableDecay, schedule

ALL = [Constant(warmup=3), WarmupStableDecay(warmup=3), Cosine(warmup=3), InverseTime(half_life=7.0, warmup=3)]


def optimizer_at(*rates):
    return torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in rates])


@pytest.mark.parametrize("config", ALL)
def test_every_schedule_warms_up_linearly_and_peaks_at_one(config):
    factors = [config.factor(step, 100) for step in range(100)]
    assert factors[:3] == pytest.approx([1 / 3, 2 / 3, 1])
    assert max(factors) == pytest.approx(1)


def test_warmup_stable_decay_holds_its_plateau_and_falls_linearly_to_the_floor():
    config = WarmupStableDecay(warmup=0.1, decay=0.2, floor=0.1)
    assert [config.factor(step, 50) for step in (5, 20, 40)] == [1, 1, 1]
    assert config.factor(45, 50) == pytest.approx(0.55)
    assert config.factor(50, 50) == pytest.approx(0.1)
    assert config.factor(500, 50) == pytest.approx(0.1)


def test_the_sqrt_decay_is_one_minus_the_root_of_progress():
    config = WarmupStableDecay(warmup=0, decay=100, shape="sqrt")
    assert config.factor(25 + 900, 1000) == pytest.approx(0.5)


def test_the_plateau_does_not_know_the_length_of_the_run():
    config = WarmupStableDecay(warmup=10, decay=0.2)
    assert [config.factor(step, 100) for step in range(80)] == [config.factor(step, 1000) for step in range(80)]


def test_cosine_is_halfway_in_the_middle():
    config = Cosine(warmup=0, floor=0.2)
    assert config.factor(50, 100) == pytest.approx(0.6)
    assert config.factor(1000, 100) == pytest.approx(0.2)


@pytest.mark.parametrize("squared", [False, True])
def test_inverse_time_has_the_half_life_it_was_given(squared):
    config = InverseTime(half_life=37.0, squared=squared)
    assert config.factor(37, 1) == pytest.approx(0.5, rel=1e-12)


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("t", [100, 1000, 10000, 100000])
def test_inverse_time_solves_the_balance_between_progress_and_decay(squared, t):
    # D is the decay that the recurrence D <- D - 2 a0 p D^(3/2) (constant p) or D <- D - 2 a0 p0 D^2 leaves.
    rate, level = 1e-3, 1.0
    for _ in range(t):
        level -= 2 * rate * level ** (1.5 if squared else 2.0)
    half_life = (math.sqrt(2) - 1) / rate if squared else 1 / (2 * rate)
    assert InverseTime(half_life=half_life, squared=squared).factor(t, 1) == pytest.approx(level, rel=2e-3)


@pytest.mark.parametrize("config", ALL)
def test_ratios_between_groups_survive(config):
    optimizer = optimizer_at(0.1, 1.6)
    scheduler = schedule(optimizer, config, steps=20)
    for _ in range(25):
        low, high = scheduler.get_last_lr()
        assert high == pytest.approx(16 * low, rel=1e-12)
        optimizer.step()
        scheduler.step()


def test_a_tensor_rate_is_changed_in_place():
    rate = torch.tensor(0.5)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=rate)
    scheduler = schedule(optimizer, Constant(warmup=2), steps=10)
    assert optimizer.param_groups[0]["lr"].item() == 0.25
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"].item() == 0.5


@pytest.mark.parametrize("config", ALL)
def test_a_resumed_schedule_continues_bit_exactly(config):
    straight = optimizer_at(0.3)
    scheduler = schedule(straight, config, steps=30)
    for _ in range(11):
        straight.step()
        scheduler.step()
    resumed = optimizer_at(0.3)
    again = schedule(resumed, config, steps=30)
    resumed.load_state_dict(straight.state_dict())
    again.load_state_dict(scheduler.state_dict())
    for _ in range(15):
        assert again.get_last_lr() == scheduler.get_last_lr()
        for pair in ((straight, scheduler), (resumed, again)):
            for part in pair:
                part.step()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Constant(warmup=1.5), "warmup must be in"),
        (lambda: Constant(warmup=-1), "warmup must be an integer"),
        (lambda: WarmupStableDecay(decay=math.nan), "decay must be in"),
        (lambda: WarmupStableDecay(floor=2.0), "floor must be in"),
        (lambda: WarmupStableDecay(shape="linea"), "did you mean 'linear'"),
        (lambda: InverseTime(half_life=0.0), "half_life must be in"),
        (lambda: schedule(optimizer_at(0.1), Cosine(), steps=0), "steps must be an integer"),
    ],
)
def test_bad_values_are_named(make, says):
    with pytest.raises(ValueError, match=says):
        make()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: schedule([], Cosine(), 10), "optimizer must be"),
        (lambda: schedule(optimizer_at(0.1), "cosine", 10), "config must be Constant"),
    ],
)
def test_bad_types_are_named(make, says):
    with pytest.raises(TypeError, match=says):
        make()


def test_a_group_that_is_added_later_follows_the_schedule():
    first, late = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([first], lr=0.8)
    scheduler = schedule(optimizer, Cosine(warmup=0), steps=10)
    optimizer.step()
    scheduler.step()
    optimizer.add_param_group({"params": [late], "lr": 0.2})
    for step in range(2, 8):
        optimizer.step()
        scheduler.step()
        assert scheduler.get_last_lr() == pytest.approx([lr * Cosine(warmup=0).factor(step, 10) for lr in (0.8, 0.2)])
    again = schedule(optimizer, Cosine(warmup=0), steps=10)
    again.load_state_dict(scheduler.state_dict())
    assert again.get_last_lr() == scheduler.get_last_lr()


def test_a_branch_decays_over_the_share_of_the_run_or_over_the_steps_that_were_asked_for():
    shares, steps = WarmupStableDecay(warmup=0.02, decay=0.2), WarmupStableDecay(warmup=20, decay=150)
    assert shares.decaying_from(400, 1000) == (replace(shares, warmup=20, decay=100), 500)
    assert shares.decaying_from(400, 1000, 30) == (replace(shares, warmup=20, decay=30), 430)
    assert steps.decaying_from(400, 1000) == (steps, 550)
    assert steps.decaying_from(851, 1000) == (None, 1001)
    assert steps.decaying_from(19, 1000) == (None, 169)
    branch, total = shares.decaying_from(400, 1000)
    assert branch is not None
    assert [branch.factor(step, total) for step in (399, 400, 450)] == [1.0, 1.0, 0.5]
