"""Where a run's numbers go: a JSON Lines file, TensorBoard, the terminal.

A reporter is anything that can be called with a record (a dictionary with at least ``step``) and closed. Losses that
are not finite are written as ``null``, for JSON has no word for them.
"""

import json
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from danlu.protocols import Record

__all__ = ["MetricsFile", "TensorBoard", "read_records"]

_LOG = logging.getLogger(__name__)


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a ``metrics.jsonl``; lines that are damaged are passed over, a missing file is empty.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "metrics.jsonl"
    >>> _ = path.write_bytes(b'{"step": 1, "loss": 2.5}\\n\\xff\\n{"step": 2, "lo')
    >>> list(read_records(path))
    [{'step': 1, 'loss': 2.5}]
    """
    for line in _lines(path):
        if math.isfinite(_step(line)):
            yield json.loads(line)


class MetricsFile:
    """Append records to ``metrics.jsonl``, one JSON object a line.

    Args:
        path: the file.
        after: step that the run continues from; later lines (and a last line cut off by a crash) are removed first,
            so that a step that is done again does not stand there twice.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "metrics.jsonl"
    >>> file = MetricsFile(path)
    >>> file({"step": 1, "loss": 2.5}); file({"step": 2, "loss": float("nan")}); file.close()
    >>> path.read_text()
    '{"step": 1, "loss": 2.5}\\n{"step": 2, "loss": null}\\n'
    """

    def __init__(self, path: Path, *, after: int = 0) -> None:
        if path.exists():
            lines = _lines(path)
            kept = [line for line in lines if _step(line) <= after]
            damaged = sum(1 for line in lines if line.strip() and _step(line) == math.inf)
            if damaged:
                _LOG.warning("%s: %d damaged line%s left out", path, damaged, " was" if damaged == 1 else "s were")
            temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
            temporary.write_text("".join(f"{line}\n" for line in kept))
            temporary.replace(path)
        self._file = path.open("a", buffering=1)

    def __call__(self, record: Record) -> None:
        """Write one line."""
        finite = {key: None if _is_nonfinite(value) else value for key, value in record.items()}
        self._file.write(json.dumps(finite, allow_nan=False) + "\n")

    def flush(self) -> None:
        """Have the system write to the disk what was reported, before a checkpoint is written behind it."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoard:
    """Write every number of a record as a scalar that ``tensorboard --logdir`` shows.

    Args:
        folder: where event files go.
        after: step that the run continues from; what was written of later steps is hidden.
    """

    def __init__(self, folder: Path, *, after: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter  # imported late: it takes a third of a second

        begun = folder.is_dir() and any(folder.iterdir())
        self._writer = SummaryWriter(str(folder), purge_step=after + 1 if begun else None)

    def __call__(self, record: Record) -> None:
        """Write one step's numbers."""
        for key, value in record.items():
            if key != "step" and isinstance(value, (int, float)):
                self._writer.add_scalar(key, value, record["step"])

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


def _lines(path: Path) -> list[str]:
    """The lines of a file; bytes that are not UTF-8 damage their own line only."""
    return path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []


def _step(line: str) -> float:
    """The step of a line; infinity for a line that is no record, so that it is removed."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _is_nonfinite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
