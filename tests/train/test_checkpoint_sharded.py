"""Checkpoints that several processes write and read; the checks are in ``sharded_checkpoints.py``."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

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
        assert program.wait(timeout=280) == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(program.pid, signal.SIGKILL)
    return folder


@pytest.mark.parametrize("check", CHECKS)
def test_of_several_processes(check: str, outcomes: Path) -> None:
    for rank in range(int(check[-1])):
        outcome = (outcomes / f"{check}.{rank}").read_text()
        assert outcome == "", f"on process {rank}:\n{outcome}"
