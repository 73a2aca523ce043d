"""Stopping on request: an interrupt or a termination lets the step under way finish and the run be saved."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

__all__ = ["Stop"]


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

    @property
    def exit_code(self) -> int:
        """What a shell reports for a process ended by the signal: 128 + its number; 0 without one."""
        return 128 + self.signal if self.signal else 0

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal = number
        elif number == signal.SIGINT and not self.patient:
            raise KeyboardInterrupt

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
