"""Long preparations of data: they show how far they are, and end when they are interrupted."""

import logging
import sys
import threading
import time
from collections.abc import Callable
from typing import TypeVar

__all__ = ["Progress", "prepare"]

T = TypeVar("T")

_log = logging.getLogger(__name__)
_LOOK = 0.1  # seconds between two looks at a signal and at the work
_QUIET = 15.0  # seconds between two lines where there is no terminal


class Progress:
    """What the work is at: set by the thread that does it, read by the one that shows it."""

    def __init__(self) -> None:
        self.stage, self.done, self.total = "", 0, 0
        self.cancelled = False

    def begin(self, stage: str, total: int) -> None:
        """Start a stage of ``total`` bytes, 0 if nobody knows."""
        self.stage, self.done, self.total = stage, 0, total

    def advance(self, count: int) -> None:
        """Count bytes that are done.

        Raises:
            InterruptedError: nobody waits for the work any more.
        """
        if self.cancelled:
            raise InterruptedError("the preparation was interrupted")
        self.done += count


def prepare(work: Callable[[Progress], T]) -> T:
    """Return ``work(progress)``, done in a thread of its own, so that an interrupt is answered within a second.

    Native code (training a tokenizer takes minutes in one call) does not look at signals; this thread does. What
    interrupts it is raised from here, and the work ends at its next :meth:`Progress.advance`.

    >>> def work(progress):
    ...     progress.begin("counting", 3)
    ...     for _ in range(3):
    ...         progress.advance(1)
    ...     return progress.done
    >>> prepare(work)
    3
    """
    progress = Progress()
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work(progress))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="danlu-prepare", daemon=True)
    shown = _Shown()
    thread.start()
    try:
        while thread.is_alive():
            thread.join(_LOOK)
            shown.update(progress)
    except BaseException:
        progress.cancelled = True
        raise
    finally:
        shown.clear()
    if errors:
        raise errors[0]
    return results[0]


class _Shown:
    """A line on a terminal that is written over, or now and then a line in the log."""

    def __init__(self) -> None:
        self.stage = ""
        self.since = self.last = time.monotonic()
        self.terminal = sys.stderr is not None and sys.stderr.isatty() and _log.isEnabledFor(logging.INFO)

    def update(self, progress: Progress) -> None:
        now = time.monotonic()
        if progress.stage != self.stage:
            self.clear()
            self.stage, self.since, self.last = progress.stage, now, now
            _log.info("%s", self.stage)
        elif self.terminal:
            print(f"\r\x1b[2K  {self._text(progress, now)}", end="", file=sys.stderr, flush=True)
        elif now - self.last > _QUIET:
            self.last = now
            _log.info("%s: %s", self.stage, self._text(progress, now))

    def _text(self, progress: Progress, now: float) -> str:
        share = "all"
        if not progress.total:
            share = f"{progress.done / 1e6:.1f} MB"
        elif progress.done < progress.total:
            share = f"{progress.done / 1e6:.1f} of {progress.total / 1e6:.1f} MB"
        return f"{share} read, {now - self.since:.0f} s"

    def clear(self) -> None:
        if self.terminal and self.stage:
            print("\r\x1b[2K", end="", file=sys.stderr, flush=True)
