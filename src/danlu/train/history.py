"""What happened to a run, in its folder's ``history.json``: where it was made, what it began with, what was changed.

The file is one JSON object with a ``format`` and a list of ``events``, each an object with its name under ``event``:

- ``train``: the absolute ``folder`` and the ``config`` as it was asked for;
- ``init``: weights that it began with, of the run and step named, with the ``sha256`` of that checkpoint's sums;
- ``branch``: the run and step that it branched off from, likewise;
- ``resume``: the ``step`` that a changed run went on from, and under ``changed`` both values of every option.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from danlu.train.checkpoint import Found
from danlu.train.folder import write_whole

__all__ = ["FILE", "add_event", "event", "explained", "origin", "read_history"]

FILE = "history.json"
_FORMAT = 1


def read_history(folder: Path) -> list[dict[str, Any]]:
    """Return the events of a run, oldest first; none for a run of an earlier release.

    Raises:
        ValueError: the file is none of this release's.
    """
    path = folder / FILE
    if not path.is_file():
        return []
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        events, number = held["events"], held["format"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if number != _FORMAT or not isinstance(events, list):
        raise ValueError(f"{path} has format {number!r}, this release of danlu reads {_FORMAT}")
    return events


def add_event(folder: Path, name: str, /, **what: Any) -> None:
    """Append an event to a run's history."""
    events = [*read_history(folder), {"event": name, **what}]
    write_whole(folder / FILE, json.dumps({"format": _FORMAT, "events": events}, indent=1, allow_nan=False) + "\n")


def event(folder: Path, name: str) -> dict[str, Any] | None:
    """Return the newest event of a run that has this name."""
    return next((found for found in reversed(read_history(folder)) if found["event"] == name), None)


def origin(found: Found, run: Path, *, averaged: bool | None = None) -> dict[str, Any]:
    """Return what an event says about the checkpoint that another run gave."""
    said = {"run": os.path.abspath(run), "step": found.step, "sha256": found.sums or None}
    return said if averaged is None else {**said, "averaged": averaged}


def explained(folder: Path, changes: Mapping[str, tuple[Any, Any]]) -> set[str]:
    """Return those options whose values were changed as the history says.

    Args:
        folder: of the run.
        changes: by option, the value that a checkpoint was made with, and that of today.
    """
    values = {key: then for key, (then, _) in changes.items()}
    for entry in read_history(folder):
        for key, (before, after) in entry.get("changed", {}).items():
            if key in values and values[key] == before:
                values[key] = after
    return {key for key, (_, now) in changes.items() if values[key] == now}
