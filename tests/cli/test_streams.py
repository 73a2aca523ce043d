"""What happens when nobody reads the output, and what an error says."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from danlu.cli import _sentence, main

SMALL = [
    "--data.vocab_size=300",
    "--data.length=32",
    "--data.batch=2",
    "--model.dim=32",
    "--model.layers=1",
    "--model.hidden=48",
    "--model.attention.num_heads=2",
    "--train.steps=6",
    "--train.eval_every=2",
    "--train.precision=float32",
    "--train.threads=1",
]


@pytest.mark.parametrize("shell", ["| head -1", ">&-", ">&- 2>&-"])
def test_a_training_goes_on_when_nobody_reads_it(shell: str, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("".join(f"line {i} of the text, and {i * i % 97} more\n" for i in range(400)))
    words = " ".join(["train", "lm-dense", "--data", "text.txt", "--out", "run", *SMALL])
    script = f"export DANLU_CACHE=cache; set -o pipefail; {sys.executable} -m danlu {words} {shell}"
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "run" / "report.html").is_file()
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 6


def test_a_command_that_only_prints_ends_with_its_reader() -> None:
    script = f"set -o pipefail; {sys.executable} -m danlu show lm | head -1"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert done.stderr == ""


def test_the_notes_of_an_error_are_printed_with_it() -> None:
    error = PermissionError(errno.EACCES, "Permission denied", "/cache")
    error.add_note("Set DANLU_CACHE to keep it elsewhere.")
    assert _sentence(error) == "/cache: Permission denied; Set DANLU_CACHE to keep it elsewhere."


def test_an_error_cannot_take_a_terminal_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"\\u001b[2J": 1}')
    assert main(["train", "lm", "--config", str(tmp_path / "config.json")]) == 2
    assert "\x1b" not in capsys.readouterr().err


def test_memory_that_cannot_be_had_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DANLU_CACHE", str(tmp_path / "cache"))
    assert main(["train", "lm-dense", "--out", str(tmp_path / "run"), "--model.dim", "1000000000"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("danlu: out of memory: ")
    assert "GB were asked for at once" in error
    assert ".cpp" not in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_user_without_a_home_is_told_how_to_name_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    from danlu._cache import cache_folder

    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("DANLU_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", unknown)
    with pytest.raises(OSError, match="no home folder to keep the cache in: set DANLU_CACHE"):
        cache_folder()


def test_a_cache_that_cannot_be_written_is_named_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("one two three four five six seven eight nine ten\n" * 40)
    (tmp_path / "cache").write_text("a file where the folder should be")
    monkeypatch.setenv("DANLU_CACHE", str(tmp_path / "cache"))
    words = ["train", "lm-dense", "--data", str(tmp_path / "text.txt"), "--out", str(tmp_path / "run"), *SMALL]
    assert main(words) == 2
    assert "set DANLU_CACHE to keep it elsewhere" in capsys.readouterr().err
