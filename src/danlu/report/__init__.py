"""Reports of a run: plots of loss and throughput as PNG, and one self-contained HTML page.

``write(run)`` writes all of it; the parts are ``read_metrics`` (``metrics.jsonl`` as series), ``loss_figure`` and
``throughput_figure`` (matplotlib figures). ``write_images`` writes the images of a generator; `danlu.evaluation`
measures them.
"""

from danlu.report.grid import grid, write_images
from danlu.report.metrics import Metrics, Series, read_metrics
from danlu.report.page import write
from danlu.report.plots import loss_figure, throughput_figure

__all__ = ["Metrics", "Series", "grid", "loss_figure", "read_metrics", "throughput_figure", "write", "write_images"]
