"""The length of a run that has so many minutes."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import toy

from danlu.optim import Constant, Cosine, InverseTime, WarmupStableDecay
from danlu.protocols import ScheduleConfig
from danlu.train import resume, train
from danlu.train import trainer as trainer_file
from danlu.train.budget import Length


def taken(length: Length, seconds_per_step: float) -> int:
    """Steps of a run whose steps all take so long."""
    step = 0
    while not length.reached(step):
        length.update(step, step * seconds_per_step)
        step += 1
    return step


@pytest.mark.parametrize(
    "schedule", [WarmupStableDecay(), WarmupStableDecay(decay=37), Cosine(), Constant(), InverseTime()]
)
@pytest.mark.parametrize("seconds_per_step", [0.06, 0.5, 7.0])
def test_a_budget_is_used_up_and_not_overdrawn_by_two_steps(schedule: ScheduleConfig, seconds_per_step: float) -> None:
    assert 60 * 3 / seconds_per_step == pytest.approx(taken(Length(None, 3.0, schedule), seconds_per_step), abs=1.99)


@pytest.mark.parametrize("schedule", [WarmupStableDecay(), Cosine(), Constant()])
def test_there_are_never_more_steps_than_the_most(schedule: ScheduleConfig) -> None:
    assert taken(Length(41, 3.0, schedule), 0.01) == 41
    assert taken(Length(41, 3.0, schedule), 18.0) in (10, 11)


def test_the_decay_begins_when_its_share_of_the_time_is_left_and_ends_with_it() -> None:
    schedule, length, factors = (
        WarmupStableDecay(warmup=5, decay=0.4, floor=0.0),
        Length(None, 1.0, WarmupStableDecay(warmup=5, decay=0.4, floor=0.0)),
        [],
    )
    step = 0
    while not length.reached(step):
        length.update(step, step * 0.1)
        factors.append(schedule.factor(step, length.steps))
        step += 1
    assert step == 600
    assert set(factors[5:360]) == {1.0}
    assert factors[361] < 1
    assert factors[-1] == pytest.approx(1 / 240)


def test_a_slower_second_half_does_not_change_a_settled_length() -> None:
    length = Length(None, 1.0, Cosine())
    for step in range(1, 30):
        length.update(step, step * 1.0 if step < 12 else step * 5.0)
    assert length.settled
    assert length.steps == 60


def test_a_run_without_a_budget_has_the_steps_it_was_given() -> None:
    length = Length(7, None, WarmupStableDecay())
    length.update(3, 1e9)
    assert [length.reached(step) for step in (6, 7, 8)] == [False, True, True]


class Clock:
    """A clock that goes on by the same time at every look."""

    def __init__(self, tick: float) -> None:
        self.tick, self.looks = tick, itertools.count()

    def perf_counter(self) -> float:
        return next(self.looks) * self.tick


def records(run: Path) -> list[dict[str, Any]]:
    import json

    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("time", "items_per_second", "mfu")} for line in lines]


def test_a_resumed_run_keeps_the_length_that_was_settled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Interrupted in its decay and resumed on a machine a thousand times slower, it takes the same steps."""
    import signal

    config = toy.run_config(steps=None, minutes=1.0, eval_every=None, checkpoint_every=None)
    for name in ("undisturbed", "interrupted"):
        monkeypatch.setattr(trainer_file, "time", Clock(0.5))
        if name == "interrupted":
            toy.SIGNALS[35] = signal.SIGTERM
        train(config, tmp_path / name)
    monkeypatch.setattr(trainer_file, "time", Clock(500.0))
    assert resume(tmp_path / "interrupted") == 0
    steps = [record["step"] for record in records(tmp_path / "undisturbed")]
    assert 30 < steps[-1] < 50
    assert records(tmp_path / "interrupted") == records(tmp_path / "undisturbed")
    said = capsys.readouterr().out
    assert "Training: for 1 min 00 s" in said
    assert resume(tmp_path / "interrupted") == 0
    assert "is complete" in capsys.readouterr().out


@pytest.mark.parametrize("schedule", [WarmupStableDecay(decay=0.4), Cosine(), Constant()])
def test_a_slow_first_step_that_compiles_does_not_shorten_the_run(schedule: ScheduleConfig) -> None:
    length, step = Length(None, 5.0, schedule), 0
    while not length.reached(step):
        length.update(step, 60 + step * 0.5 if step else 0.0)
        step += 1
    assert step == pytest.approx((300 - 60) / 0.5, abs=3)


class Unsettling:
    """A schedule that claims to depend on the length after its end."""

    def factor(self, step: int, total: int) -> float:
        return 1.0

    def settles_at(self, total: int) -> float:
        return 7.0


def test_the_budget_ends_a_run_whatever_its_schedule_says() -> None:
    assert taken(Length(None, 1.0, Unsettling()), 1.0) in (60, 61, 62)
