"""Experts cut among four processes, which are started once for all the checks of ``exchange_worker.py``."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("exchange_worker.py")
CHECKS = [
    line.removeprefix("def check_").partition("(")[0]
    for line in WORKER.read_text().splitlines()
    if line.startswith("def check_")
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """What each check raised on each of four processes."""
    folder = tmp_path_factory.mktemp("four")
    command = [sys.executable, str(WORKER), str(folder), os.environ.get("DANLU_TEST_SEED", "0")]
    program = subprocess.Popen(command, start_new_session=True)
    try:
        assert program.wait(timeout=240) == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(program.pid, signal.SIGKILL)  # a check that fails on one process leaves others waiting
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(4)]


@pytest.mark.parametrize("check", CHECKS)
def test_on_four_processes(outcomes: list[dict[str, str]], check: str) -> None:
    for rank, outcome in enumerate(outcomes):
        assert outcome[check] == "", f"on process {rank}:\n{outcome[check]}"
