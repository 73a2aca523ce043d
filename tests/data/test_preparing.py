"""Preparing data: it says how far it is, and an interrupt ends it at once."""

import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from danlu.data import preparing
from danlu.data.preparing import Progress, prepare


def test_the_result_or_the_error_of_the_work_is_given_back() -> None:
    assert prepare(lambda progress: 3) == 3

    def fails(progress: Progress) -> None:
        raise ValueError("no text")

    with pytest.raises(ValueError, match="no text"):
        prepare(fails)


def test_stages_are_logged_and_where_there_is_no_terminal_now_and_then_how_far_they_are(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparing, "_QUIET", 0.2)

    def work(progress: Progress) -> None:
        progress.begin("reading", 2_000_000)
        progress.advance(1_000_000)
        time.sleep(0.8)

    with caplog.at_level(logging.INFO):
        prepare(work)
    said = [record.getMessage() for record in caplog.records]
    assert said[0] == "reading"
    assert said[1].startswith("reading: 1.0 of 2.0 MB read")


def test_an_interrupt_leaves_at_once_and_ends_the_work() -> None:
    ended = threading.Event()

    def work(progress: Progress) -> None:
        try:
            while True:
                progress.advance(1)
                time.sleep(0.01)
        finally:
            ended.set()

    threading.Timer(0.3, signal.raise_signal, [signal.SIGINT]).start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        prepare(work)
    assert time.monotonic() - started < 2
    assert ended.wait(2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_training_that_prepares_its_data_ends_within_seconds_and_leaves_nothing(
    number: signal.Signals, tmp_path: Path
) -> None:
    draw = random.Random(0)
    # Letters without a space are the slowest text for a tokenizer's training: one call of half a minute.
    (tmp_path / "letters.txt").write_text("".join(draw.choices("ACGT", k=4_000_000)))
    words = ["train", "lm-dense", "--data", "letters.txt", "--out", "run"]
    process = subprocess.Popen(
        [sys.executable, "-m", "danlu", *words],
        cwd=tmp_path,
        env={**os.environ, "DANLU_CACHE": str(tmp_path / "cache")},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    while "training a tokenizer" not in process.stderr.readline():
        assert process.poll() is None
    time.sleep(1)
    process.send_signal(number)
    code = process.wait(20)  # a second on a quiet machine; the call alone takes half a minute
    assert code == 128 + number
    assert "interrupted before the training began" in process.stderr.read()
    assert not (tmp_path / "run").exists()
    assert not [path for path in (tmp_path / "cache" / "text").iterdir() if path.is_dir()]
