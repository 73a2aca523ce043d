import json
import math
from pathlib import Path

import pytest

from danlu.train.metrics import MetricsFile, TensorBoard


def test_going_on_removes_what_came_after(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    for step in range(1, 6):
        file({"step": step, "loss": step / 3})
    file.close()
    file = MetricsFile(path, after=3)
    file({"step": 4, "loss": 0.1})
    file.close()
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(r["step"], r["loss"]) for r in records] == [(1, 1 / 3), (2, 2 / 3), (3, 1.0), (4, 0.1)]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("last", ['{"step": 2, "lo', "", "[]", '{"loss": 1}', "\x00\x00"])
def test_a_last_line_cut_off_by_a_crash_is_removed(last: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n' + last)
    file = MetricsFile(path, after=7)
    file({"step": 2, "loss": 1.0})
    file.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_a_line_is_on_the_disk_as_soon_as_it_is_reported(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file({"step": 1, "loss": math.inf})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": null}\n'
    file.close()


@pytest.fixture
def counted_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of one second are read in the order of a count whose tenth comes before its second."""
    from tensorboard.summary.writer import event_file_writer

    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


@pytest.mark.usefixtures("counted_files")
def test_tensorboard_reads_the_numbers_back_and_hides_what_was_done_again(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = TensorBoard(tmp_path)
    for step in (1, 2, 3):
        board({"step": step, "loss": float(step), "note": "words are passed over"})
    board.close()
    board = TensorBoard(tmp_path, after=1)
    board({"step": 2, "loss": 20.0})
    board.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.0), (2, 20.0)]


@pytest.mark.usefixtures("counted_files")
def test_tensorboard_shows_no_step_twice_after_a_start_from_the_beginning(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for loss in (1.0, 7.0):  # the second start has no checkpoint to go on from
        board = TensorBoard(tmp_path, after=0)
        for step in (1, 2):
            board({"step": step, "loss": loss})
        board.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 7.0), (2, 7.0)]


def test_damaged_bytes_cost_their_own_line_only_and_the_file_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\xff\xfe{"step": 5}\n{"step": 2}\n')
    MetricsFile(path, after=7).close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert [record.getMessage() for record in caplog.records] == [f"{path}: 1 damaged line was left out"]
