from pathlib import Path

import numpy as np
import pytest

from danlu.report import read_metrics


def folder(tmp_path: Path, text: str) -> Path:
    (tmp_path / "metrics.jsonl").write_text(text, encoding="utf-8")
    return tmp_path


def test_series_hold_the_steps_where_a_quantity_was_logged(tmp_path: Path) -> None:
    metrics = read_metrics(
        folder(
            tmp_path, '{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0, "val_loss": 2.5}\n{"step": 3, "loss": 1}\n'
        )
    )
    np.testing.assert_array_equal(metrics["loss"].steps, [1, 2, 3])
    np.testing.assert_array_equal(metrics["loss"].values, [3.0, 2.0, 1.0])
    np.testing.assert_array_equal(metrics["val_loss"].steps, [2])
    assert len(metrics["never logged"]) == 0


def test_a_step_logged_again_after_a_resume_counts_once_and_as_last_logged(tmp_path: Path) -> None:
    metrics = read_metrics(folder(tmp_path, '{"step": 1, "loss": 3}\n{"step": 2, "loss": 9}\n{"step": 2, "loss": 2}\n'))
    np.testing.assert_array_equal(metrics["loss"].values, [3.0, 2.0])


def test_a_last_line_cut_off_by_a_crash_is_left_out(tmp_path: Path) -> None:
    metrics = read_metrics(folder(tmp_path, '{"step": 1, "loss": 3}\n{"step": 2, "lo'))
    np.testing.assert_array_equal(metrics["loss"].steps, [1])


def test_losses_that_are_not_numbers_survive_reading(tmp_path: Path) -> None:
    metrics = read_metrics(folder(tmp_path, '{"step": 1, "loss": NaN}\n{"step": 2, "loss": 1.5, "note": "x"}\n'))
    assert np.isnan(metrics["loss"].values[0])
    assert "note" not in metrics


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no step yet"),
        ('{"step": 1, "loss": 3}\nnonsense\n{"step": 2, "loss": 3}\n', "line 2"),
        ('[1, 2]\n{"step": 2, "loss": 3}\n', "line 1"),
        ('{"loss": 3}\n{"step": 2, "loss": 3}\n', "line 1"),
    ],
)
def test_a_file_that_holds_no_metrics_is_rejected(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_metrics(folder(tmp_path, text))


def test_a_folder_that_is_no_run_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no metrics\.jsonl"):
        read_metrics(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        read_metrics(tmp_path / "missing")
