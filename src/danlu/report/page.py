"""The page of one run: a self-contained HTML file with the plots, and the plots as PNG files."""

import base64
import html
import io
import json
import os
from pathlib import Path

from matplotlib.figure import Figure

from danlu.report.metrics import Metrics, read_metrics
from danlu.report.plots import loss_figure, throughput_figure

__all__ = ["write"]

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #202124; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
img { max-width: 100%; height: auto; }
table { border-collapse: collapse; } td { padding: .15rem 1.5rem .15rem 0; vertical-align: top; }
td + td { font-variant-numeric: tabular-nums; }
pre { background: #f6f7f8; padding: 1rem; overflow-x: auto; white-space: pre-wrap; font-size: .85rem; }
"""


def write(run: str | os.PathLike[str]) -> Path:
    """Draw a run folder's plots and write its page.

    Writes ``report.html``, ``plots/loss.png`` and, if the run logged throughput, ``plots/throughput.png`` into the run
    folder. The page needs no other file and no network connection.

    Args:
        run: a run folder with ``metrics.jsonl``; ``config.json``, ``samples.txt`` and ``samples.png`` are shown if they
            exist.

    Returns:
        The page's path.

    Raises:
        FileNotFoundError: ``run`` is not a run folder.
        ValueError: the metrics cannot be read, or there are none.
    """
    folder = Path(run)
    metrics = read_metrics(folder)
    name = folder.resolve().name
    figures = {"loss": loss_figure(metrics, title=f"{name}: loss")}
    if "items_per_second" in metrics or ("items" in metrics and "time" in metrics):
        figures["throughput"] = throughput_figure(metrics, title=f"{name}: throughput", unit=_unit(folder))
    (folder / "plots").mkdir(exist_ok=True)
    images = []
    for plot, figure in figures.items():
        png = _png(figure)
        (folder / "plots" / f"{plot}.png").write_bytes(png)
        encoded = base64.b64encode(png).decode("ascii")
        images.append(f'<h2>{plot.capitalize()}</h2>\n<img alt="{plot}" src="data:image/png;base64,{encoded}">')
    samples, config, pictures = (folder / name for name in ("samples.txt", "config.json", "samples.png"))
    rows = summary(metrics, unit=_unit(folder)) | _budget(config)
    body = [f"<h1>{html.escape(name)}</h1>", _table(rows), *images]
    if pictures.is_file():
        encoded = base64.b64encode(pictures.read_bytes()).decode("ascii")
        body.append(f'<h2>Samples</h2>\n<img alt="samples" src="data:image/png;base64,{encoded}">')
    if samples.is_file():
        body.append(
            f"<h2>Samples</h2>\n<pre>{html.escape(samples.read_text(encoding='utf-8', errors='replace'))}</pre>"
        )
    if config.is_file():
        text = json.dumps(json.loads(config.read_text(encoding="utf-8")), indent=2, ensure_ascii=False)
        body.append(f"<h2>Configuration</h2>\n<pre>{html.escape(text)}</pre>")
    page = folder / "report.html"
    page.write_text(
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{html.escape(name)}</title>\n'
        f"<style>{_STYLE}</style>\n" + "\n".join(body) + "\n</html>\n",
        encoding="utf-8",
    )
    return page


def summary(metrics: Metrics, *, unit: str = "tokens") -> dict[str, str]:
    """Return a run's main results as text: last and best losses, items, time and the median throughput.

    >>> import numpy as np
    >>> from danlu.report.metrics import Series
    >>> steps = np.array([1, 2])
    >>> summary(Metrics({"loss": Series(steps, np.array([3.0, 2.0])), "items": Series(steps, np.array([9.0, 18.0]))}))
    {'steps': '2', 'last training loss': '2.0000', 'tokens': '18'}
    """
    found: dict[str, str] = {}
    loss, speed = metrics["loss"], metrics["items_per_second"]
    if len(loss):
        found["steps"] = f"{loss.steps[-1]:,}"
        found["last training loss"] = f"{loss.values[-1]:.4f}"
    for name, words in (("val_loss", "validation loss"), ("val_bpb", "validation bits per byte")):
        values = metrics[name]
        if len(values):
            best = int(values.values.argmin())
            found[words] = f"{values.values[-1]:.4f} (lowest {values.values[best]:.4f} at step {values.steps[best]:,})"
    if len(metrics["items"]):
        found[unit] = f"{metrics['items'].values[-1]:,.0f}"
    if len(metrics["time"]):
        found["training time"] = f"{metrics['time'].values[-1] / 60:.1f} minutes"
    if len(speed):
        found[f"median {unit} per second"] = f"{sorted(speed.values)[len(speed) // 2]:,.0f}"
    return found


def _unit(folder: Path) -> str:
    """Return what the items of the run are: tokens, unless the manifest says otherwise."""
    manifest = folder / "manifest.json"
    return str(json.loads(manifest.read_text()).get("unit", "tokens")) if manifest.is_file() else "tokens"


def _budget(config: Path) -> dict[str, str]:
    """Return the run's time budget, if it had one."""
    loop = json.loads(config.read_text(encoding="utf-8")).get("train", {}) if config.is_file() else {}
    return {"time budget": f"{loop['minutes']:g} minutes"} if loop.get("minutes") else {}


def _table(rows: dict[str, str]) -> str:
    cells = "\n".join(f"<tr><td>{html.escape(k)}</td><td>{html.escape(v)}</td></tr>" for k, v in rows.items())
    return f"<table>\n{cells}\n</table>"


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()
