"""A run's life after its first end: another checkpoint, more steps, a branch, weights for another run, a restart."""

import dataclasses
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import toy

from danlu import config as configs
from danlu.optim import AdamWConfig, Constant, Cosine, WarmupStableDecay
from danlu.train import RunConfig, branch, checkpoint, load, resume, train
from danlu.train.load import checkpoint_steps, run_at

STABLE = WarmupStableDecay(warmup=2, decay=4)


def config(schedule: Any = STABLE, **loop: Any) -> RunConfig:
    made = toy.run_config(**{"steps": 12, "checkpoint_every": 2, "keep": 9, **loop})
    return dataclasses.replace(made, schedule=schedule)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    assert train(config(ema=0.9), run, quiet=True) == 0
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of a finished run: stable up to step 8, decayed at 12."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def records(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("time", "items_per_second", "mfu")} for line in lines]


def state_of(run: Path, step: int) -> dict[str, bytes]:
    state = checkpoint.load(run / "checkpoints" / f"step-{step:08d}").state
    tensors, _ = checkpoint.pack({**state, "seconds": 0})
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def longer(run: Path, **loop: Any) -> RunConfig:
    kept = configs.loads(RunConfig, (run / "config.json").read_text())
    return dataclasses.replace(kept, train=dataclasses.replace(kept.train, **loop))


def test_a_checkpoint_is_named_by_its_step_or_by_what_it_is(run: Path) -> None:
    losses = {r["step"]: r["val_loss"] for r in records(run) if "val_loss" in r and r["step"] % 2 == 0}
    best = min(losses, key=lambda step: losses[step])
    for at, step in (("4", 4), ("12", 12), ("last", 12), ("best", best)):
        model, _ = load(f"{run}@{at}")
        saved = checkpoint.load(run / "checkpoints" / f"step-{step:08d}").state["ema"]
        assert torch.equal(model.first.weight, saved["module.model.first.weight"]), at


@pytest.mark.parametrize(
    ("at", "message"),
    [
        ("5", r"has no checkpoint of step 5: it has those of steps 2, 4, 6, 8, 10 and 12$"),
        ("newest", "@ must be followed by a step, best or last, got 'newest'"),
        ("-4", "got '-4'"),
    ],
)
def test_a_checkpoint_that_is_not_there_is_answered_with_those_that_are(run: Path, at: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(f"{run}@{at}")


def test_a_folder_may_have_the_mark_in_its_name(run: Path) -> None:
    odd = run.rename(run.with_name("run@7"))
    assert run_at(odd).folder == odd
    assert run_at(f"{odd}@4").at == 4
    load(odd)


def test_a_finished_run_goes_on_from_its_stable_phase_as_if_it_had_been_longer_from_the_start(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(config(ema=0.9, steps=16), tmp_path / "long", quiet=True) == 0
    assert resume(run, config=longer(run, steps=16)) == 0
    said = capsys.readouterr().out
    assert "Going on from step 8 to 16 steps." in said
    assert "not what" not in said
    assert records(run)[12:] == records(tmp_path / "long")[12:]
    assert state_of(run, 16) == state_of(tmp_path / "long", 16)
    assert json.loads((run / "config.json").read_text())["train"]["steps"] == 16
    # What was there before is a run folder of its own.
    earlier = run / "earlier" / "1"
    assert checkpoint_steps(earlier) == [10, 12]
    assert state_of(earlier, 12) != state_of(run, 12)
    assert load(earlier)[1].train.steps == 12
    assert len(records(earlier)) == 12
    # A plain resume knows of the change, and that the run is complete.
    assert resume(run) == 0
    assert "is complete: all 16 steps" in capsys.readouterr().out


@pytest.mark.parametrize("at", [9, 13])
def test_a_longer_run_that_is_interrupted_is_resumed_without_a_word_about_its_length(
    run: Path, tmp_path: Path, at: int
) -> None:
    toy.SIGNALS[at] = signal.SIGTERM
    assert resume(run, config=longer(run, steps=16), quiet=True) == 143
    assert resume(run, quiet=True) == 0
    assert train(config(ema=0.9, steps=16), tmp_path / "long", quiet=True) == 0
    assert state_of(run, 16) == state_of(tmp_path / "long", 16)


@pytest.mark.parametrize("budget", [{"steps": 20}, {"steps": 20, "minutes": 5.0}])
def test_a_longer_run_that_is_killed_before_it_saves_keeps_its_new_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: dict[str, Any]
) -> None:
    def killed(*_: Any) -> None:
        raise ConnectionAbortedError

    run, schedule = tmp_path / "run", Cosine()
    train(config(schedule, minutes=1.0 if "minutes" in budget else None), run, quiet=True)
    with monkeypatch.context() as patch:
        patch.setattr("danlu.train.run._fit", killed)
        with pytest.raises(ConnectionAbortedError):
            resume(run, config=longer(run, **budget), quiet=True)
    assert resume(run, quiet=True) == 0
    found = {r["step"]: r["lr"] for r in records(run)}
    assert len(found) == 20
    for step in range(13, 21):
        assert found[step] == pytest.approx(0.02 * schedule.factor(step - 1, 20), rel=1e-12), step


@pytest.mark.parametrize(
    ("schedule", "keep", "start", "exact"),
    [
        (Constant(warmup=2), 9, 12, True),
        (Cosine(), 9, 12, False),
        (STABLE, 2, 12, False),  # nothing of the stable phase is left
        (WarmupStableDecay(warmup=0.25, decay=4), 9, 8, False),
    ],
)
def test_what_cannot_be_exact_is_said(
    schedule: Any, keep: int, start: int, exact: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train(config(schedule, keep=keep), run, quiet=True)
    assert resume(run, config=longer(run, steps=20)) == 0
    said = capsys.readouterr().out
    assert f"Going on from step {start} to 20 steps." in said
    assert ("This is not what 20 steps from the start would give" in said) is not exact
    rates = {r["step"]: r["lr"] for r in records(run)}
    assert len(rates) == 20
    for step in range(start + 1, 21):
        assert rates[step] == pytest.approx(0.02 * schedule.factor(step - 1, 20), rel=1e-12), step


def test_a_run_with_a_budget_is_prolonged_by_steps_and_the_other_way_round(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(config(Constant(), minutes=1.0), run, quiet=True)  # ends by its twelve steps
    assert resume(run, config=longer(run, steps=14, minutes=None), quiet=True) == 0
    assert records(run)[-1]["step"] == 14
    assert resume(run, config=longer(run, steps=15, minutes=2.0), quiet=True) == 0
    assert records(run)[-1]["step"] == 15
    with pytest.raises(ValueError, match=r"train\.minutes must be above"):
        resume(run, config=longer(run, steps=15, minutes=1e-6), quiet=True)


def test_what_would_make_it_another_run_is_refused_by_name(run: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != ".lock"}
    other = dataclasses.replace(longer(run, seed=1), optim=AdamWConfig(lr=0.5))
    with pytest.raises(ValueError, match=r"keeps optim.*train\.seed: another value .* danlu train RECIPE --init"):
        resume(run, config=other)
    with pytest.raises(ValueError, match=r"train\.steps must be above the 12 .*, got 8"):
        resume(run, config=longer(run, steps=8))
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != ".lock"} == before


def test_options_that_change_no_number_are_taken_and_kept(run: Path, finished: Path) -> None:
    shutil.rmtree(run / "checkpoints" / "step-00000012")
    assert resume(run, config=longer(run, log_every=3, keep=1, checkpoint_every=5), quiet=True) == 0
    assert checkpoint_steps(run) == [12]
    assert state_of(run, 12) == state_of(finished, 12)
    assert json.loads((run / "config.json").read_text())["train"]["keep"] == 1
    assert resume(run, quiet=True) == 0


def test_a_run_goes_back_to_a_checkpoint_and_keeps_what_came_after(run: Path, finished: Path) -> None:
    (run / "samples.txt").write_text("of step 12")
    assert resume(f"{run}@6", quiet=True) == 0
    assert state_of(run, 12) == state_of(finished, 12)
    assert records(run) == records(finished)
    assert checkpoint_steps(run / "earlier" / "1") == [8, 10, 12]
    assert (run / "earlier" / "1" / "samples.txt").read_text() == "of step 12"
    assert resume(f"{run}@12", quiet=True) == 0, "there is nothing to do after the last step"
    assert not (run / "earlier" / "2").exists()


@pytest.mark.parametrize("decay", [None, 3])
def test_a_branch_decays_from_the_stable_phase_and_leaves_its_source_alone(
    run: Path, tmp_path: Path, decay: int | None
) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    out = tmp_path / "branch"
    assert branch(f"{run}@6", out, steps=decay, quiet=True) == 0
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    shutil.rmtree(run)
    steps = 6 + (decay or 4)
    alone = config(dataclasses.replace(STABLE, decay=decay or 4), ema=0.9, steps=steps)
    assert train(alone, tmp_path / "alone", quiet=True) == 0
    assert state_of(out, steps) == state_of(tmp_path / "alone", steps)
    assert [r["step"] for r in records(out)] == list(range(1, steps + 1))
    said = json.loads((out / "history.json").read_text())["events"][0]
    assert (said["event"], said["step"], len(said["sha256"])) == ("branch", 6, 64)
    assert resume(out, quiet=True) == 0


def test_a_branch_needs_the_stable_phase(run: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"step 12 of .* is not in its stable phase; it has those of steps 2, 4, 6, 8$"
    ):
        branch(run, tmp_path / "branch")
    train(config(Cosine(), steps=2), tmp_path / "cosine", quiet=True)
    with pytest.raises(ValueError, match=r"schedule cosine, which has no stable phase .* --init"):
        branch(tmp_path / "cosine", tmp_path / "branch")
    assert not (tmp_path / "branch").exists()


def test_a_run_begins_with_another_s_weights_and_needs_it_no_more(run: Path, tmp_path: Path) -> None:
    other = dataclasses.replace(config(Cosine(), steps=5, ema=0.5), optim=AdamWConfig(lr=1e-3))
    new = tmp_path / "new"
    toy.SIGNALS[1] = signal.SIGTERM
    assert train(other, new, init=f"{run}@8", quiet=True) == 143
    started = checkpoint.load(new / "checkpoints" / "step-00000000").state
    theirs = checkpoint.load(run / "checkpoints" / "step-00000008").state["ema"]
    for part, prefix in (("objective", ""), ("ema", "module.")):
        assert torch.equal(started[part][f"{prefix}model.first.weight"], theirs["module.model.first.weight"])
    said = {e["event"]: e for e in json.loads((new / "history.json").read_text())["events"]}["init"]
    assert (said["run"], said["step"], said["averaged"]) == (str(run), 8, True)
    shutil.rmtree(run)
    assert resume(new, quiet=True) == 0
    assert [r["step"] for r in records(new)] == [1, 2, 3, 4, 5]
    shutil.rmtree(new / "checkpoints")
    with pytest.raises(ValueError, match=r"began with the weights of .* and has no checkpoint left"):
        resume(new, quiet=True)


def test_weights_that_do_not_fit_are_named(run: Path, tmp_path: Path) -> None:
    wider = dataclasses.replace(config(), model=toy.NetConfig(width=11))
    with pytest.raises(
        ValueError, match=r"first\.weight is \(7, 5\) there and \(11, 5\) here.*width: 11 and 7.*--config"
    ):
        train(wider, tmp_path / "new", init=run, quiet=True)
    with pytest.raises(FileNotFoundError, match="is not a run folder"):
        train(config(), tmp_path / "new", init=tmp_path / "nowhere", quiet=True)
    assert not (tmp_path / "new").exists()


def test_one_line_starts_a_run_goes_on_with_it_and_says_when_it_is_complete(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    for at, code in ((3, 143), (7, 143), (None, 0), (None, 0)):
        if at:
            toy.SIGNALS[at] = signal.SIGTERM
        assert train(config(ema=0.9, log_every=1 if at else 2), run, restartable=True) == code
    assert "is complete: all 12 steps are trained." in capsys.readouterr().out.splitlines()[-1]
    assert state_of(run, 12) == state_of(finished, 12)


def test_a_restart_is_refused_where_another_run_is(run: Path) -> None:
    with pytest.raises(
        ValueError, match=r"another configuration \(asked for now and then\): train\.steps: 13 and 12; "
    ):
        train(config(ema=0.9, steps=13), run, restartable=True)
    with pytest.raises(ValueError, match="init: elsewhere and None"):
        train(config(ema=0.9), run, restartable=True, init="elsewhere")
    resume(run, config=longer(run, steps=14), quiet=True)
    assert train(config(ema=0.9), run, restartable=True, quiet=True) == 0, "the line is the same as ever"


def test_a_restart_finds_what_a_kill_before_the_first_step_left(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(config(ema=0.9), run, quiet=True)
    for path in ("config.json", "metrics.jsonl"):
        (run / path).unlink()
    with pytest.raises(FileExistsError):
        train(config(ema=0.9), run, quiet=True)
    assert train(config(ema=0.9), run, restartable=True, quiet=True) == 0
    assert state_of(run, 12) == state_of(finished, 12)


def test_the_metrics_of_a_checkpoint_are_on_the_disk_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from danlu.train.checkpoint import Saver
    from danlu.train.metrics import MetricsFile

    order = []
    for kind, name in ((MetricsFile, "flush"), (Saver, "save")):
        real = getattr(kind, name)
        monkeypatch.setattr(
            kind, name, lambda self, *a, real=real, name=name, **k: (order.append(name), real(self, *a, **k))[1]
        )
    train(config(steps=4), tmp_path / "run", quiet=True)
    assert order == ["flush", "save"] * 2


def test_a_validation_loss_that_is_not_finite_does_not_keep_a_checkpoint_from_being_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("danlu.train.trainer.evaluate", lambda *_: {"val_loss": float("nan")})
    run = tmp_path / "run"
    assert train(config(steps=4, eval_every=2), run, quiet=True) == 0
    assert checkpoint_steps(run) == [2, 4]
    with pytest.raises(ValueError, match="none was evaluated"):
        load(f"{run}@best")
