"""Interrupted and resumed, a run is the undisturbed run bit for bit."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import toy

from danlu import config as configs
from danlu.train import checkpoint, load, resume, train


def losses(run: Path) -> list[tuple[Any, ...]]:
    """Everything logged that does not depend on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [tuple(sorted((k, v) for k, v in line.items() if k not in ("time", "items_per_second"))) for line in lines]


def final_state(run: Path) -> dict[str, Any]:
    newest = toy.newest(run)
    tensors, tree = checkpoint.pack({**checkpoint.load(newest).state, "seconds": 0})
    return {"tree": json.dumps(tree), **{name: tensor.numpy().tobytes() for name, tensor in tensors.items()}}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    assert train(toy.run_config(ema=0.9), run, quiet=True) == 0
    return run


@pytest.mark.parametrize("at", [1, 2, 6, 9, 11])
def test_a_run_interrupted_at_any_step_and_resumed_is_the_undisturbed_run(
    at: int, undisturbed: Path, tmp_path: Path
) -> None:
    toy.SIGNALS[at] = signal.SIGINT
    run = tmp_path / "run"
    assert train(toy.run_config(ema=0.9), run, quiet=True) == 130
    newest = toy.newest(run)
    assert checkpoint.load(newest).step == at
    torch.rand(at)  # whatever happens between the two processes must not matter
    assert resume(run, quiet=True) == 0
    assert losses(run) == losses(undisturbed)
    assert final_state(run) == final_state(undisturbed)


def test_a_run_interrupted_at_every_step_is_the_undisturbed_run(undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step in range(1, 11):
        toy.SIGNALS[step] = signal.SIGTERM
    assert train(toy.run_config(ema=0.9), run, quiet=True) == 143
    while resume(run, quiet=True) == 143:
        pass
    assert losses(run) == losses(undisturbed)
    assert final_state(run) == final_state(undisturbed)


def test_a_signal_before_the_first_step_is_honoured_too(undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    toy.SIGNALS[1] = signal.SIGINT  # the plan draws a batch to count its memory
    assert train(toy.run_config(ema=0.9), run) == 130
    assert not (run / "metrics.jsonl").read_text()
    assert resume(run, quiet=True) == 0
    assert losses(run) == losses(undisturbed)
    assert final_state(run) == final_state(undisturbed)


def test_a_signal_during_an_evaluation_saves_and_the_evaluation_is_made_on_resume(
    undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    toy.EVALUATION_SIGNALS.append(signal.SIGINT)
    assert train(toy.run_config(ema=0.9), run, quiet=True) == 130
    assert len(losses(run)) == 2
    assert resume(run, quiet=True) == 0
    assert losses(run) == losses(undisturbed)
    assert final_state(run) == final_state(undisturbed)


def test_an_evaluation_that_fails_loses_no_step_and_is_made_on_resume(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: toy.Opened, batches: int | None = None) -> Any:
        raise OSError("a shard is damaged")

    run = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(toy.Opened, "validation", broken)
        with pytest.raises(OSError, match="a shard is damaged"):
            train(toy.run_config(ema=0.9), run, quiet=True)
    assert checkpoint.load(toy.newest(run)).step == 3  # the first that is followed by an evaluation
    assert resume(run, quiet=True) == 0
    assert losses(run) == losses(undisturbed)
    assert final_state(run) == final_state(undisturbed)


def test_a_kill_during_a_save_leaves_the_checkpoint_before_valid_and_found(
    undisturbed: Path, tmp_path: Path, cache: Path
) -> None:
    run, script = tmp_path / "run", Path(toy.__file__)
    environment = {**os.environ, "DANLU_CACHE": str(cache)}
    done = subprocess.run(
        [sys.executable, str(script), "train", str(run), "--kill-in-save", "2"], env=environment, check=False
    )
    assert done.returncode == -signal.SIGKILL
    assert [p.name for p in (run / "checkpoints").iterdir() if p.name.endswith(".tmp")] != []
    newest = toy.newest(run)
    assert newest.name == "step-00000004"
    assert resume(run, quiet=True) == 0
    expected = tmp_path / "expected"
    assert train(toy.run_config(), expected, quiet=True) == 0
    assert losses(run) == losses(expected)
    assert final_state(run) == final_state(expected)
    assert not list((run / "checkpoints").glob(".*"))


def test_the_clock_goes_on_where_it_stopped(tmp_path: Path) -> None:
    toy.SIGNALS[5] = signal.SIGINT
    run = tmp_path / "run"
    train(toy.run_config(), run, quiet=True)
    resume(run, quiet=True)
    times = [json.loads(line)["time"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert times == sorted(times)


def test_a_checkpoint_of_another_configuration_is_refused_by_key(tmp_path: Path) -> None:
    toy.SIGNALS[5] = signal.SIGINT
    run = tmp_path / "run"
    train(toy.run_config(), run, quiet=True)
    before = (run / "metrics.jsonl").read_bytes()
    (run / "config.json").write_text(configs.dumps(toy.run_config(steps=12, muon=False)))
    with pytest.raises(ValueError, match=r"another configuration .*optim\.\S+: .*train\.steps: 12 and 11") as caught:
        resume(run, quiet=True)
    assert "\n" not in str(caught.value)
    assert (run / "metrics.jsonl").read_bytes() == before


def test_what_changes_no_number_may_differ_on_resume(undisturbed: Path, tmp_path: Path) -> None:
    toy.SIGNALS[5] = signal.SIGINT
    run = tmp_path / "run"
    train(toy.run_config(ema=0.9), run, quiet=True)
    (run / "config.json").write_text(configs.dumps(toy.run_config(ema=0.9, keep=1, checkpoint_every=1)))
    assert resume(run, quiet=True) == 0
    assert losses(run) == losses(undisturbed)
    assert len(checkpoint.checkpoints(run / "checkpoints")) == 1


def test_data_that_have_changed_are_refused(tmp_path: Path) -> None:
    toy.SIGNALS[5] = signal.SIGINT
    run = tmp_path / "run"
    train(toy.run_config(), run, quiet=True)
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps({**manifest, "sha256": "f" * 64}))
    with pytest.raises(ValueError, match="have changed: points had SHA-256 ffffffffffff"):
        resume(run, quiet=True)


def test_a_run_without_a_checkpoint_starts_again(undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    toy.SIGNALS[3] = signal.SIGINT
    train(toy.run_config(ema=0.9), run, quiet=True)
    for path in checkpoint.checkpoints(run / "checkpoints"):
        shutil.rmtree(path)
    assert resume(run, quiet=True) == 0
    assert losses(run) == losses(undisturbed)


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_anew(tmp_path: Path) -> None:
    run = tmp_path / "run"
    toy.SIGNALS[3] = signal.SIGINT
    train(toy.run_config(), run, quiet=True)
    (toy.newest(run) / "state.json").write_text("{")
    with pytest.raises(checkpoint.CheckpointError, match=r"no checkpoint of .*; .*step-00000003 is no complete"):
        resume(run, quiet=True)
    assert len(losses(run)) == 2  # the third waits for its evaluation


def test_a_complete_run_is_left_alone(undisturbed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*")}
    assert resume(undisturbed) == 0
    assert "is complete: all 11 steps are trained" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*")} == before


def test_resuming_needs_a_run_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not a run folder: no such folder"):
        resume(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"is not a run folder: it has no config\.json"):
        resume(tmp_path)


def test_the_loaded_model_is_the_average_of_the_weights(undisturbed: Path) -> None:
    model, config = load(undisturbed)
    newest = toy.newest(undisturbed)
    state = checkpoint.load(newest).state
    assert torch.equal(model.first.weight, state["ema"]["module.model.first.weight"])
    assert not torch.equal(model.first.weight, state["objective"]["model.first.weight"])
    assert not model.training
    assert dataclasses.asdict(config) == dataclasses.asdict(toy.run_config(ema=0.9))
