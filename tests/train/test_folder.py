"""One process a run folder: claimed before anything is prepared, locked while it trains, free when it ends."""

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import toy

from danlu.train import resume, train
from danlu.train.folder import LOCK, claimed, new_folder

HOLD = """
import sys, time
from pathlib import Path
from danlu.train.folder import claimed
with claimed(Path(sys.argv[1]), new=False):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def held(tmp_path: Path):
    """A complete run whose folder another process holds."""
    run = tmp_path / "run"
    assert train(toy.run_config(), run, quiet=True) == 0
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(run)], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    yield run, other
    other.kill()
    other.wait()


def test_a_run_that_another_process_trains_is_not_resumed_until_that_process_has_ended(held) -> None:
    run, other = held
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != LOCK}
    with pytest.raises(FileExistsError, match=r"run is being trained by another process; wait for it, or stop it"):
        resume(run, quiet=True)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != LOCK} == before
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    assert resume(run, quiet=True) == 0


def test_a_folder_is_claimed_before_the_data_are_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    def second(*arguments, **options):
        opened.append(True)
        with pytest.raises(FileExistsError, match="is being trained by another process"):
            train(toy.run_config(), tmp_path / "run", quiet=True)
        raise RuntimeError("the data cannot be read")

    monkeypatch.setattr("danlu.train.run.prepare", second)
    with pytest.raises(RuntimeError, match="cannot be read"):
        train(toy.run_config(), tmp_path / "run", quiet=True)
    assert len(opened) == 1
    assert not (tmp_path / "run").exists()


def test_a_run_that_fails_before_its_first_step_leaves_somebody_s_empty_folder_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("danlu.train.run.prepare", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(toy.run_config(), tmp_path, quiet=True)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_was_claimed_and_left_is_as_good_as_new(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).touch()
    assert train(toy.run_config(), tmp_path / "run", quiet=True) == 0


def _claim(parent: str) -> str:
    return new_folder(Path(parent), "lm").name


def test_two_processes_never_get_one_new_folder(tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(4) as pool:
        names = pool.map(_claim, [str(tmp_path / "runs")] * 40, chunksize=1)
    assert sorted(names) == sorted(f"lm-{i}" for i in range(1, 41))


def test_a_claim_ends_with_its_block_and_a_folder_with_files_is_not_claimed_as_new(tmp_path: Path) -> None:
    for _ in range(2):
        with claimed(tmp_path / "run", new=True):
            pass
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with (
        pytest.raises(FileExistsError, match="exists and is left as it is; choose another folder"),
        claimed(tmp_path / "run", new=True),
    ):
        pass
    with claimed(tmp_path / "run", new=False):
        pass
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
