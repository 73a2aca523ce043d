"""Saving off the training thread gives the same checkpoints, loses no error, and leaves the one before."""

import errno
import json
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import toy

from danlu.train import checkpoint, resume, train
from danlu.train.checkpoint import CheckpointError, Saver, writing


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """An event that every write of tensors waits for."""
    event, real = threading.Event(), writing.save_file

    def wait(*words: Any, **more: Any) -> None:
        assert event.wait(60)
        real(*words, **more)

    monkeypatch.setattr(writing, "save_file", wait)
    return event


def fail(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_save_in_the_background_keeps_what_the_state_was(tmp_path: Path, held: threading.Event) -> None:
    state = {"w": torch.full((13, 5), 1.0), "tied": torch.zeros(3), "step": 1, "list": [1]}
    saver = Saver(tmp_path, background=True, config={}, keep=2)
    saver.save(1, state, metrics={"step": 1, "val_loss": 2.0})
    assert checkpoint.checkpoints(tmp_path) == []  # it is being written
    state["w"].fill_(2.0)  # as the next step would
    state["list"].append(2)  # type: ignore[attr-defined]
    held.set()
    saver.save(2, state)  # waits for the one before
    saver.wait()
    first, second = (checkpoint.load(path).state for path in checkpoint.checkpoints(tmp_path))
    assert (float(first["w"].unique()), first["list"]) == (1.0, [1])
    assert (float(second["w"].unique()), second["list"]) == (2.0, [1, 2])


def test_the_run_is_the_one_that_saves_on_its_own_thread(tmp_path: Path) -> None:
    runs = [tmp_path / "own", tmp_path / "background"]
    for run, background in zip(runs, (False, True)):
        assert train(toy.run_config(ema=0.9, checkpoint_every=2, async_save=background), run, quiet=True) == 0
    states = [checkpoint.load(toy.newest(run)).state for run in runs]
    (a, left), (b, right) = (checkpoint.pack({**state, "seconds": 0}) for state in states)
    assert left == right
    assert all(torch.equal(a[name], b[name]) for name in a)
    lines = [[json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()] for run in runs]
    assert lines[0] == lines[1]
    assert [path.name for path in checkpoint.checkpoints(runs[1] / "checkpoints")] == ["step-00000010", "step-00000011"]


def test_an_error_in_the_background_ends_the_run_at_a_later_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "save_file", fail)
    run = tmp_path / "run"
    with pytest.raises(
        CheckpointError, match=r"no space left on the disk to save .*step-00000002; no earlier checkpoint"
    ):
        train(toy.run_config(steps=10_000, checkpoint_every=2, async_save=True, eval_every=None), run, quiet=True)
    assert len((run / "metrics.jsonl").read_text().splitlines()) < 1000
    assert list((run / "checkpoints").iterdir()) == []


def test_an_error_in_the_last_save_is_raised_before_the_run_says_that_it_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(writing, "save_file", fail)
    with pytest.raises(CheckpointError, match=r"no space left on the disk to save .*step-00000003"):
        train(toy.run_config(steps=3, checkpoint_every=None, async_save=True), tmp_path / "run")
    assert "the run is in" not in capsys.readouterr().out


def test_an_error_of_the_training_is_raised_after_the_save_under_way(tmp_path: Path, held: threading.Event) -> None:
    held.set()
    run = tmp_path / "run"
    config = toy.run_config(steps=9, checkpoint_every=2, eval_every=5, keep_best="bpb", async_save=True)
    with pytest.raises(ValueError, match=r"train\.keep_best must be"):
        train(config, run, quiet=True)
    assert toy.newest(run).name == "step-00000005"
    assert checkpoint.load(toy.newest(run)).step == 5
    assert not list((run / "checkpoints").glob(".*"))


def test_a_kill_during_a_background_save_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = [sys.executable, str(toy.__file__), "train", str(run), "--kill-in-save", "2", "--async-save"]
    assert subprocess.run(words, check=False).returncode == -signal.SIGKILL
    assert toy.newest(run).name == "step-00000004"
    assert resume(run, quiet=True) == 0
    assert not list((run / "checkpoints").glob(".*"))
