"""What a run did, drawn: loss and throughput as PNG and a page that needs no other file.

``write(run)`` does it all; the parts are ``read_metrics`` (``metrics.jsonl`` as series), ``loss_figure`` and
``throughput_figure`` (matplotlib figures). ``write_images`` draws a generator's images; `danlu.report.generation`
measures them.
"""

from danlu.report.grid import grid, write_images
from danlu.report.metrics import Metrics, Series, read_metrics
from danlu.report.page import write
from danlu.report.plots import loss_figure, throughput_figure

__all__ = ["Metrics", "Series", "grid", "loss_figure", "read_metrics", "throughput_figure", "write", "write_images"]
