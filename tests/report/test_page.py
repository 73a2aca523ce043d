import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from danlu.report import Metrics, Series, loss_figure, throughput_figure, write
from danlu.report.plots import _running_median

PNG = b"\x89PNG\r\n\x1a\n"


def run_folder(tmp_path: Path, steps: int = 120) -> Path:
    run = tmp_path / "lm-1"
    run.mkdir()
    lines = []
    for step in range(1, steps + 1):
        record = {
            "step": step,
            "loss": 2 + 6 * step**-0.5,
            "items": step * 512,
            "time": step * 0.25,
            "items_per_second": 2048.0,
        }
        if step % 40 == 0:
            record |= {"val_loss": 2.1 + 6 * step**-0.5, "val_bpb": 1.5}
        lines.append(json.dumps(record))
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return run


def test_the_page_needs_no_other_file_and_no_network(tmp_path: Path) -> None:
    run = run_folder(tmp_path)
    (run / "samples.txt").write_text("def f(x): return x < 3 & <script>")
    (run / "config.json").write_text('{"model": {"dim": 64}}')
    page = write(run)
    text = page.read_text()
    sources: list[str] = []

    class Sources(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            assert tag not in ("script", "link")
            sources.extend(str(value) for name, value in attrs if name in ("src", "href"))

    Sources().feed(text)
    assert len(sources) == 2
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "x &lt; 3 &amp; &lt;script&gt;" in text
    assert re.search(r"validation loss</td><td>2\.6477 \(lowest 2\.6477 at step 120\)", text)
    for name in ("loss", "throughput"):
        assert (run / "plots" / f"{name}.png").read_bytes().startswith(PNG)


def test_a_run_that_logged_only_its_loss_is_drawn(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n')
    assert write(tmp_path).is_file()
    assert not (tmp_path / "plots" / "throughput.png").exists()


def test_the_loss_is_drawn_on_linear_and_on_logarithmic_axes_with_every_validation_point(tmp_path: Path) -> None:
    steps = np.arange(1, 201)
    loss = Series(steps, 5 * steps**-0.3)
    validation = Series(steps[49::50], 5.5 * steps[49::50] ** -0.3)
    figure = loss_figure(Metrics({"loss": loss, "val_loss": validation}))
    assert [axes.get_xscale() for axes in figure.axes] == ["linear", "log"]
    for axes in figure.axes:
        drawn = {line.get_label(): line for line in axes.get_lines()}
        np.testing.assert_array_equal(drawn["each step"].get_ydata(), loss.values)
        np.testing.assert_array_equal(drawn["validation"].get_xdata(), validation.steps)


def test_losses_that_are_not_finite_leave_a_gap_instead_of_an_empty_plot() -> None:
    loss = Series(np.array([1, 2, 3]), np.array([3.0, np.nan, 2.0]))
    figure = loss_figure(Metrics({"loss": loss}))
    np.testing.assert_array_equal(figure.axes[0].get_lines()[0].get_xdata(), [1, 3])
    with pytest.raises(ValueError, match="no finite loss"):
        loss_figure(Metrics({"loss": Series(np.array([1]), np.array([np.inf]))}))


def test_throughput_needs_items_per_second_or_items_over_time() -> None:
    with pytest.raises(ValueError, match="neither"):
        throughput_figure(Metrics({"loss": Series(np.array([1]), np.array([3.0]))}))


def test_the_running_median_ignores_a_lone_spike_and_keeps_a_constant() -> None:
    values = np.full(97, 2.0)
    values[50] = 1000.0
    np.testing.assert_array_equal(_running_median(values), np.full(97, 2.0))


def test_the_page_names_the_time_budget_of_a_run_that_had_one(tmp_path: Path) -> None:
    run = run_folder(tmp_path)
    (run / "config.json").write_text('{"train": {"steps": 600, "minutes": 8}}')
    assert "<tr><td>time budget</td><td>8 minutes</td></tr>" in write(run).read_text()
    (run / "config.json").write_text('{"train": {"steps": 600, "minutes": null}}')
    assert "time budget" not in write(run).read_text()


def test_numbers_that_release_0_1_called_tokens_are_drawn(tmp_path: Path) -> None:
    from danlu.report import read_metrics

    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 3.0, "tokens": 7, "time": 2, "tokens_per_second": 3.5}\n'
    )
    found = read_metrics(tmp_path)
    assert (found["items"].values.tolist(), found["items_per_second"].values.tolist()) == ([7.0], [3.5])
