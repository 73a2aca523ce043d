"""Stopping on request: an interrupt or a termination lets the step under way finish and the run be saved."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

__all__ = ["Stop"]

_log = logging.getLogger(__name__)


class Stop:
    """Remember SIGINT and SIGTERM for the length of a ``with`` block instead of dying of them.

    ``signal`` is the number of the first signal received, or None. When ``patient`` is false, a second SIGINT raises
    KeyboardInterrupt at once: the user insists. Outside the main thread Python allows no handlers, and none are set.

    >>> with Stop() as stop:
    ...     signal.raise_signal(signal.SIGTERM)
    ...     stop.signal == signal.SIGTERM, stop.exit_code
    (True, 143)
    """

    def __init__(self, *, patient: bool = False) -> None:
        self.signal: int | None = None
        self.patient = patient
        self._before: dict[int, Any] = {}
        self._at_once = False

    @property
    def exit_code(self) -> int:
        """What a shell reports for a process ended by the signal: 128 + its number; 0 without one."""
        return 128 + self.signal if self.signal else 0

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal = number
            if self._at_once:
                self._leave()
        elif number == signal.SIGINT and not self.patient:
            raise KeyboardInterrupt

    def _leave(self) -> None:
        _log.info("interrupted before the training began")
        raise KeyboardInterrupt if self.signal == signal.SIGINT else SystemExit(self.exit_code)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Let a signal end the program right away while there is no step that could be saved.

        SIGINT raises KeyboardInterrupt, SIGTERM SystemExit with its exit code; also one that came before.

        >>> with Stop() as stop, stop.at_once():
        ...     signal.raise_signal(signal.SIGTERM)
        Traceback (most recent call last):
        ...
        SystemExit: 143
        """
        if self.signal is not None:
            self._leave()
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
