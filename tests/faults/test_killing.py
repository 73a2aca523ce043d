"""A run killed at any instant and started again is the run that nobody disturbed, bit for bit."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import toy

from danlu.train import train

MANY = os.environ.get("DANLU_FAULTS") == "many"  # the 200 instants of docs/reliability.md
PROGRAM = Path(__file__).with_name("killing.py")
STEPS = (0, 4, 8, 11)  # of the checkpoints; 0 is the start


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory, surroundings: dict[str, str]) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("kills")
    words = [sys.executable, str(PROGRAM), str(folder), "200" if MANY else "12", os.environ.get("DANLU_TEST_SEED", "0")]
    program = subprocess.Popen(words, env=surroundings, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        assert program.wait(timeout=7200 if MANY else 280) == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(program.pid, signal.SIGKILL)
    found: list[dict[str, Any]] = json.loads((folder / "outcomes.json").read_text())
    return found


@pytest.mark.timeout(7500 if MANY else 300)
@pytest.mark.parametrize("processes", [1, 2])
def test_started_again_it_is_the_undisturbed_run_bit_for_bit(outcomes: list[dict[str, Any]], processes: int) -> None:
    mine = [found for found in outcomes if found["processes"] == processes]
    assert len(mine) == len(outcomes) * (3 if processes == 1 else 1) // 4
    assert {found["kind"] for found in mine} == {"time", "call", "save"}
    for found in mine:
        assert found["codes"][found["victim"]] == -signal.SIGKILL
        assert found["differs"] == "", found


def test_no_more_is_lost_than_what_came_after_the_last_complete_checkpoint(outcomes: list[dict[str, Any]]) -> None:
    for found in outcomes:
        assert found["from"] in STEPS
        # Of a kill within a save its checkpoint is not there; the one before is.
        following = STEPS[min(STEPS.index(found["from"]) + 1, 3)]
        assert found["from"] <= found["logged"] + 1 <= following + 1, found


def test_what_is_left_of_two_processes_ends_by_itself(outcomes: list[dict[str, Any]]) -> None:
    for found in outcomes:
        if found["processes"] == 2 and found["logged"]:  # before they have met, torchrun ends the others
            assert found["codes"][1 - found["victim"]] is not None
            assert found["others ended in"] < 60


@pytest.fixture
def _own_cache(surroundings: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DANLU_CACHE", surroundings["DANLU_CACHE"])


@pytest.mark.usefixtures("_own_cache")
def test_what_a_kill_in_the_first_instant_leaves_is_removed_and_nothing_else(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in (".lock", ".history.json.123.tmp"):
        (run / name).write_text("")
    (run / "mine.txt").write_text("")
    with pytest.raises(FileExistsError):
        train(toy.run_config(), run, quiet=True, restartable=True)
    assert len(list(run.iterdir())) == 3
    (run / "mine.txt").unlink()
    assert train(toy.run_config(), run, quiet=True, restartable=True) == 0
    assert not (run / ".history.json.123.tmp").exists()
    # Killed while the last checkpoint but one was removed, the run is complete: its restart clears up.
    (run / "checkpoints" / ".step-00000004.123.tmp-old").mkdir()
    assert train(toy.run_config(), run, quiet=True, restartable=True) == 0
    assert not list((run / "checkpoints").glob(".*"))
