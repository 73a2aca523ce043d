"""The best checkpoint of a run stays, and a run that no longer improves ends."""

import dataclasses
import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import toy

from danlu import config as configs
from danlu.models import ConvNet, ConvNetConfig
from danlu.objectives import Classification
from danlu.optim import AdamWConfig
from danlu.train import RunConfig, TrainConfig, checkpoint, resume, train
from danlu.train.best import Best, goal_of
from danlu.train.checkpoint import Goal


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def steps(run: Path) -> list[int]:
    return [int(path.name.partition("-")[2]) for path in checkpoint.checkpoints(run / "checkpoints")]


def still(**loop: Any) -> RunConfig:
    """A run that learns nothing: its first evaluation is never improved on."""
    config = toy.plain_config(eval_every=2, keep_best="val_loss", **loop)
    return dataclasses.replace(config, optim=AdamWConfig(lr=1e-30))


def test_the_best_the_last_and_every_so_many_stay(tmp_path: Path) -> None:
    run = tmp_path / "run"
    loop = {"steps": 23, "eval_every": 2, "checkpoint_every": 3, "keep": 2, "keep_every": 9, "keep_best": "val_loss"}
    config = dataclasses.replace(toy.run_config(**loop), optim=AdamWConfig(lr=1.0))  # it gets worse soon
    assert train(config, run, quiet=True) == 0
    losses = {line["step"]: line["val_loss"] for line in records(run) if "val_loss" in line}
    best = min(losses, key=lambda step: losses[step])
    assert best not in (9, 18, 21, 23)  # otherwise it would stay for another reason
    assert steps(run) == sorted({best, 9, 18, 21, 23})
    assert checkpoint.best(run) == run / "checkpoints" / f"step-{best:08d}"
    assert [line["best_step"] for line in records(run) if "val_loss" in line][-1] == best


def test_without_a_metric_the_best_is_the_kept_one_of_the_lowest_validation_loss(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert checkpoint.best(run) is None
    assert train(toy.run_config(steps=12, checkpoint_every=2, eval_every=4, keep=9), run, quiet=True) == 0
    losses = {line["step"]: line["val_loss"] for line in records(run) if "val_loss" in line}
    assert checkpoint.best(run) == run / "checkpoints" / f"step-{min(losses, key=lambda step: losses[step]):08d}"


def put(folder: Path, step: int, metrics: dict[str, float] | None, **options: Any) -> None:
    checkpoint.save(folder / "checkpoints", step, {"step": step}, config={}, metrics=metrics, **options)


def test_more_is_better_where_the_objective_says_so(tmp_path: Path) -> None:
    goal = goal_of("val_accuracy", Classification(ConvNet(ConvNetConfig(image_size=8, widths=(4,)))))
    assert goal == Goal("val_accuracy", higher=True)
    assert goal_of("val_loss", Classification(ConvNet(ConvNetConfig(image_size=8, widths=(4,))))) == Goal("val_loss")
    for step, accuracy in ((1, 0.5), (2, 0.75), (3, math.inf), (4, 0.7), (5, math.nan)):
        put(
            tmp_path,
            step,
            {"step": step, "val_accuracy": accuracy if math.isfinite(accuracy) else 0.0},
            keep=1,
            goal=goal,
        )
    assert steps(tmp_path) == [2, 5]
    assert checkpoint.best(tmp_path) == tmp_path / "checkpoints" / "step-00000002"


def test_numbers_of_an_earlier_step_make_no_checkpoint_the_best(tmp_path: Path) -> None:
    put(tmp_path, 3, {"step": 3, "val_loss": 2.0}, keep=9)
    put(tmp_path, 4, {"step": 3, "val_loss": 1.0}, keep=9)
    put(tmp_path, 5, None, keep=9)
    assert checkpoint.best(tmp_path) == tmp_path / "checkpoints" / "step-00000003"


def test_a_run_that_no_longer_improves_is_complete_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert train(still(steps=23, stop_after=3), run) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Stopped early: val_loss was best after step 2 (" in said
    assert ") and has not improved in 3 evaluations since. Trained 8 steps in" in said
    assert records(run)[-1]["step"] == 8
    assert records(run)[-1]["best_step"] == 2
    assert resume(run) == 0
    assert "is complete: it stopped early after step 8, val_loss was best after step 2" in " ".join(
        capsys.readouterr().out.split()
    )
    assert steps(run) == [2, 4, 8]


def test_an_interrupted_run_counts_on_where_it_was(tmp_path: Path) -> None:
    run = tmp_path / "run"
    toy.SIGNALS[5] = signal.SIGINT
    assert train(still(steps=23, stop_after=3), run, quiet=True) == 130
    assert resume(run, quiet=True) == 0
    assert records(run)[-1]["step"] == 8


def test_an_evaluation_that_a_signal_gave_up_counts_once(tmp_path: Path) -> None:
    run = tmp_path / "run"
    toy.EVALUATION_SIGNALS.append(signal.SIGINT)
    assert train(still(steps=23, stop_after=2), run, quiet=True) == 130
    assert resume(run, quiet=True) == 0
    assert records(run)[-1]["step"] == 6
    assert checkpoint.best(run) == run / "checkpoints" / "step-00000002.1"  # saved before and after its evaluation


def test_a_run_that_stopped_early_goes_on_with_more_patience(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(still(steps=23, stop_after=2), run, quiet=True) == 0
    (run / "config.json").write_text(configs.dumps(still(steps=23, stop_after=4)))
    assert resume(run, quiet=True) == 0
    assert [line["step"] for line in records(run)] == list(range(1, 11))


def test_a_metric_that_does_not_exist_is_named_with_those_that_do(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"train\.keep_best must be a number of the evaluation \(val_loss\), got 'bpb'"
    ):
        train(toy.run_config(keep_best="bpb"), tmp_path / "run", quiet=True)


def test_a_metric_that_one_evaluation_lacks_is_no_improvement_and_no_error() -> None:
    best = Best(Goal("val_bpb"), stop_after=5)
    assert best.update(1, {"val_loss": 1.0, "val_bpb": 2.0})
    assert not best.update(2, {"val_loss": 1.0})
    assert best.since == 1


def test_another_metric_begins_anew() -> None:
    first, second = Best(Goal("val_loss")), Best(Goal("val_bpb"))
    first.update(3, {"val_loss": 1.0})
    second.load_state_dict(first.state_dict())
    assert second.step is None
    again = Best(Goal("val_loss"))
    again.load_state_dict(first.state_dict())
    assert (again.step, again.value) == (3, 1.0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"stop_after": 3}, "stop_after counts evaluations that do not improve keep_best, got keep_best = None"),
        ({"stop_after": 3, "keep_best": "val_loss", "eval_every": None}, "got eval_every = None"),
        ({"keep_best": ""}, "keep_best must be the name of a number of the evaluation, got ''"),
        ({"keep_best": 3}, "keep_best must be the name of a number of the evaluation, got 3"),
        ({"keep_every": 0}, "keep_every must be"),
        ({"stop_after": 0, "keep_best": "val_loss"}, "stop_after must be"),
    ],
)
def test_options_that_make_no_sense_are_errors(options: dict[str, Any], said: str) -> None:
    with pytest.raises((TypeError, ValueError), match=said):
        TrainConfig(**options)


def test_a_loss_that_is_never_finite_is_no_best_and_counts() -> None:
    best = Best(Goal("val_loss"), stop_after=2)
    assert not best.update(1, {"val_loss": float(torch.nan)})
    assert not best.update(2, {"val_loss": math.inf})
    assert best.exhausted
    assert best.sentence() == "val_loss was never finite in 2 evaluations"
