"""A run's ``metrics.jsonl`` as series of numbers over steps."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Metrics", "Series", "read_metrics"]

FILE = "metrics.jsonl"
_RENAMED = {"tokens": "items", "tokens_per_second": "items_per_second"}  # as release 0.1 wrote them


@dataclass(frozen=True)
class Series:
    """One quantity at the steps where it was logged: ``steps`` (n,) int64 and ``values`` (n,) float64."""

    steps: NDArray[np.int64]
    values: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.steps)


@dataclass(frozen=True)
class Metrics:
    """Every logged quantity of one run, by name."""

    series: dict[str, Series]

    def __getitem__(self, name: str) -> Series:
        """Return one quantity; it is empty where the run never logged it."""
        empty = Series(np.empty(0, dtype=np.int64), np.empty(0))
        return self.series.get(name, empty)

    def __contains__(self, name: str) -> bool:
        return name in self.series


def read_metrics(run: str | os.PathLike[str]) -> Metrics:
    """Read the metrics of a run folder.

    For a step that is in the file twice (because the run was resumed from an earlier checkpoint) the last values count.
    An incomplete last line, from a write that was interrupted, is left out.

    Args:
        run: a run folder.

    Returns:
        The numeric quantities of ``metrics.jsonl``, each sorted by step.

    Raises:
        FileNotFoundError: no such folder, or no ``metrics.jsonl`` in it.
        ValueError: a line that is not a JSON object with a ``step``, or a file without any step.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\\n{"step": 2, "loss": 2.0}\\n')
    >>> read_metrics(folder)["loss"].values
    array([2.5, 2. ])
    """
    folder = Path(run)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a run folder: no such folder")
    path = folder / FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a run folder: it has no {FILE}")
    found: dict[str, dict[int, float]] = {}
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        record = _record(line)
        if record is None:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number}: expected a JSON object with a step, got {line[:60]!r}")
        step = int(record["step"])
        for name, value in record.items():
            if name != "step" and isinstance(value, (int, float)) and not isinstance(value, bool):
                found.setdefault(_RENAMED.get(name, name), {})[step] = float(value)
    if not found:
        raise ValueError(f"{path} has no step yet: nothing to report")
    return Metrics({name: _sorted(values) for name, values in found.items()})


def _record(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _sorted(values: dict[int, float]) -> Series:
    steps = np.array(sorted(values), dtype=np.int64)
    return Series(steps, np.array([values[int(step)] for step in steps]))
