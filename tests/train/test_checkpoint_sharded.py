"""Checkpoints that several processes write and read; the checks are in ``sharded_checkpoints.py``."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import toy

from danlu.train import checkpoint

PROGRAM = Path(__file__).with_name("sharded_checkpoints.py")
CHECKS = [
    line.removeprefix("def ").partition("(")[0]
    for line in PROGRAM.read_text().splitlines()
    if line.startswith("def check_")
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What each check raised on each process; worlds of two and of four are started once for all checks."""
    folder = tmp_path_factory.mktemp("worlds")
    program = subprocess.Popen([sys.executable, str(PROGRAM), str(folder)], start_new_session=True)
    try:
        assert program.wait(timeout=200) == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(program.pid, signal.SIGKILL)
    return folder


@pytest.mark.parametrize("weights", ["copies", "sharded"])
def test_a_run_that_went_on_with_one_two_four_processes_and_one_is_the_one_of_one(weights: str, outcomes: Path) -> None:
    alone, several = outcomes / "undisturbed", outcomes / weights
    for one, other in zip(records(alone), records(several), strict=True):
        assert one.keys() == other.keys()
        for key in ("step", "items", "lr", "best_step"):
            assert one.get(key) == other.get(key)
        for key in {"loss", "grad_norm", "val_loss"} & one.keys():
            assert one[key] == pytest.approx(other[key], rel=1e-10)
    by = {path.name: json.loads((path / "state.json").read_text()) for path in (several / "checkpoints").iterdir()}
    assert {step: by[f"step-{step:08d}"]["processes"] for step in (2, 5, 9, 13)} == {2: 1, 5: 2, 9: 4, 13: 1}
    written = {step: len(list(several.glob(f"checkpoints/step-{step:08d}/*.safetensors"))) for step in (2, 5, 9, 13)}
    assert written == {2: 1, 5: 2, 9: 4, 13: 1}
    states = [checkpoint.load(toy.newest(run)).state for run in (alone, several)]
    for part in ("objective", "ema"):
        for name, value in states[0][part].items():
            if not name.endswith("calls"):  # of several processes each is called
                torch.testing.assert_close(states[1][part][name], value, rtol=1e-10, atol=1e-12)


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("check", CHECKS)
def test_of_several_processes(check: str, outcomes: Path) -> None:
    for rank in range(int(check[-1])):
        outcome = (outcomes / f"{check}.{rank}").read_text()
        assert outcome == "", f"on process {rank}:\n{outcome}"
