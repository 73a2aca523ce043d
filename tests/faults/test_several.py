"""Several processes end together, within seconds, and one of them says why."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import toy

from danlu.train import checkpoint, train

HERE = Path(__file__).parent
RECIPE = str(HERE / "killed_once.py")
WRONG = {
    "batch": (["--data.batch", "3"], "batch is shared among 2 processes and must be a multiple of 2, got 3"),
    "replicas": (
        ["--train.parallel.replicas", "3"],
        "train.parallel.replicas must divide the 2 processes",
    ),
    "experts": (["--train.parallel.experts", "2"], "train.parallel.experts = 2 needs a model with experts"),
    "option": (["--train.stepps", "3"], "stepps"),
    "folder": (["--out", "TAKEN"], "exists and is left as it is"),
}


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory, surroundings: dict[str, str]) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("commands")
    (folder / "taken").mkdir()
    (folder / "taken" / "mine.txt").write_text("mine")
    text = folder / "text.txt"
    text.write_text("".join(f"{n} times {n} is {n * n}.\n" for n in range(300)))
    tiny = ["--data", str(text), "--data.vocab_size", "270", "--data.length", "12", "--model.dim", "16", "--steps", "2"]
    cases: dict[str, Any] = {}
    for name, (words, _) in WRONG.items():
        out = [] if "--out" in words else ["--out", str(folder / name)]
        words = [str(folder / "taken") if word == "TAKEN" else word for word in words]
        cases[name] = {"words": ["train", "lm-dense", *tiny, *out, *words]}
    cases["hung"] = {"words": ["train", RECIPE, "--out", str(folder / "hung")], "hang": 6}
    program = subprocess.Popen(
        [sys.executable, str(HERE / "commands.py"), str(folder), json.dumps(cases)],
        env=surroundings,
        start_new_session=True,
    )
    try:
        assert program.wait(timeout=280) == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(program.pid, signal.SIGKILL)
    return folder, json.loads((folder / "ended.json").read_text())


def said(folder: Path, name: str) -> list[str]:
    """The errors of both processes."""
    text = "".join((folder / f"{name}.{rank}").read_text() for rank in range(2))
    return [line for line in text.splitlines() if line.startswith("danlu: ")]


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_one_line_and_exit_code_two(ended: tuple[Path, dict[str, Any]], name: str) -> None:
    folder, all_of_them = ended
    lines = said(folder, name)
    assert len(lines) == 1, lines
    assert WRONG[name][1] in lines[0]
    assert all_of_them[name]["codes"] == [2, 2]
    assert all_of_them[name]["seconds"] < 50
    assert "Traceback" not in (folder / f"{name}.1").read_text()
    if name == "folder":
        assert [path.name for path in (folder / "taken").iterdir()] == ["mine.txt"]
    else:
        assert not (folder / name).exists()


def test_a_process_that_hangs_ends_the_others_with_one_line_and_what_was_saved_stays(
    ended: tuple[Path, dict[str, Any]],
) -> None:
    folder, all_of_them = ended
    (line,) = said(folder, "hung")
    assert "another process has not answered in 6 s (DANLU_TIMEOUT)" in line
    assert all_of_them["hung"]["codes"] == [2, None]
    assert toy.newest(folder / "hung").name == "step-00000004"


def test_a_process_killed_under_torchrun_is_started_again_and_the_run_is_the_undisturbed_one(
    tmp_path: Path, surroundings: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DANLU_CACHE", surroundings["DANLU_CACHE"])
    run, mark = tmp_path / "run", tmp_path / "killed"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1", "--master-port", port]
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "danlu", "train", RECIPE, "--out", str(run), "--resume"],
        env={**surroundings, "DANLU_MARK": str(mark)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert mark.exists()
    assert "Resuming" in done.stdout
    assert "from step 4" in done.stdout
    assert train(toy.plain_config(), tmp_path / "alone", quiet=True) == 0
    lines = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (run, tmp_path / "alone")
    ]
    for one, other in zip(*lines, strict=True):
        assert one["step"] == other["step"]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
    assert checkpoint.load(toy.newest(run)).step == 11
