"""Surveys of files, remembered: what has the size, the time and the place that it had is not read again.

Of several processes that want the same survey at once, on one machine, one reads and the others wait for it.
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from danlu.data.corpus import Corpus, Survey, survey
from danlu.data.preparing import prepare
from danlu.data.shards import locked, write_whole

__all__ = ["remembered"]

_FORMAT = 2
# A file system's clock is coarse: what was written just before it was read may be written again within the same tick.
_SETTLED_NS = 2_000_000_000


def remembered(corpus: Corpus, options: Sequence[Any], cache: Path) -> Survey:
    """Return the survey of a corpus, from the cache if its files are as they were.

    Args:
        corpus: what to survey; one that names no files is read each time.
        options: what else the survey depends on, in JSON types; the share of validation comes first.
        cache: the folder where surveys are kept.

    Raises:
        ValueError, OSError: as :func:`danlu.data.corpus.survey`.
    """
    if not corpus.files:
        return _read(corpus, options[0])
    began = time.time_ns()
    entry = cache / f"{_key(corpus, options)}.json"
    if (known := _load(entry, began)) is not None:
        return known
    with contextlib.ExitStack() as held:
        # A cache that cannot be written may still hold the tokens; then the survey is made each time.
        with contextlib.suppress(OSError):
            cache.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(entry.with_suffix(".lock")))
        if (known := _load(entry, began)) is not None:
            return known
        before, newest = _key(corpus, options), max(path.stat().st_mtime_ns for path in corpus.files)
        found = _read(corpus, options[0])
        if _key(corpus, options) == before:
            settled = newest < began - _SETTLED_NS
            with contextlib.suppress(OSError):
                write_whole(cache / f"{before}.json", json.dumps({"settled": settled, **found._asdict()}))
        return found


def _read(corpus: Corpus, validation: float) -> Survey:
    def work(progress: Any) -> Survey:
        progress.begin("", 0)
        return survey(corpus, validation, progress)

    return prepare(work)


def _key(corpus: Corpus, options: Sequence[Any]) -> str:
    files = []
    for path in corpus.files:
        stat = path.stat()
        files.append([os.path.realpath(path), stat.st_size, stat.st_mtime_ns, stat.st_ino])
    return hashlib.sha256(json.dumps([_FORMAT, *options, files]).encode()).hexdigest()[:32]


def _load(entry: Path, began: int) -> Survey | None:
    """A survey that still holds: of files that were old when they were read, or made since the caller began."""
    try:
        saved = json.loads(entry.read_text(encoding="utf-8"))
        settled = saved.pop("settled") or entry.stat().st_mtime_ns >= began
        return Survey(**saved) if settled else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
