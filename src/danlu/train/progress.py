"""What a person sees while a run trains: one live line on a terminal, a plain line now and then elsewhere."""

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from danlu.protocols import Record

__all__ = ["ProgressLine", "describe", "duration"]

_PLAIN_EVERY = 15.0  # seconds between two lines where nothing can be overwritten


def duration(seconds: float) -> str:
    """Return a time span as people say it.

    >>> duration(42), duration(200), duration(7500)
    ('42 s', '3 min 20 s', '2 h 05 min')
    """
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60:02} s"
    return f"{total // 3600} h {total % 3600 // 60:02} min"


def describe(shown: Record, *, unit: str = "items", labels: Mapping[str, str] | None = None) -> str:
    """Return the numbers of a record in one line, those that it has.

    Args:
        shown: the record.
        unit: what the loss is divided by, in the plural.
        labels: names of further numbers and how to call them, as the objective has them.

    >>> record = {"step": 5, "loss": 2.5, "val_loss": 2.75, "val_bpb": 1.2, "items_per_second": 12345.0, "mfu": 0.42}
    >>> describe(record, unit="tokens", labels={"val_bpb": "bits/byte"})
    'loss 2.500  val 2.750  bits/byte 1.200  12.3k tokens/s  MFU 42%'
    """
    parts = [f"loss {shown['loss']:.3f}"]
    if "val_loss" in shown:
        parts.append(f"val {shown['val_loss']:.3f}")
    parts += [f"{label} {shown[name]:.3f}" for name, label in (labels or {}).items() if name in shown]
    if "items_per_second" in shown:
        speed = shown["items_per_second"]
        parts.append(f"{speed / 1000:.1f}k {unit}/s" if speed >= 1000 else f"{speed:.0f} {unit}/s")
    if "mfu" in shown:
        parts.append(f"MFU {shown['mfu']:.0%}")
    if shown.get("skipped"):
        parts.append(f"skipped {shown['skipped']}")
    return "  ".join(parts)


class ProgressLine:
    """Show loss, validation loss, the objective's own numbers, speed, share of the device's speed and the time left.

    The records of a run with a time budget name the number of ``steps``, which changes what is shown, and until that
    is settled the ``seconds_left``.

    Args:
        steps: length of the run.
        console: where to.
        start: step that the run continues from.
        unit: what the loss is divided by, in the plural.
        labels: as of :func:`describe`.
    """

    def __init__(
        self,
        steps: int,
        console: Console,
        *,
        start: int = 0,
        unit: str = "items",
        labels: Mapping[str, str] | None = None,
    ) -> None:
        self._steps, self._console = steps, console
        self._unit, self._labels = unit, labels
        self._first: tuple[int, float] | None = None
        self._latest: dict[str, Any] = {}
        self._printed = time.monotonic()
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = TextColumn("step {task.completed}/{task.total}"), BarColumn(24), TextColumn("{task.description}")
            self._bar = Progress(*columns, console=console, refresh_per_second=4)
            self._task = self._bar.add_task("first step", total=steps, completed=start)
            self._bar.start()

    def __call__(self, record: Record) -> None:
        """Show a record."""
        step = int(record["step"])
        self._steps = int(record.get("steps", self._steps))
        now = time.monotonic()
        self._first = self._first or (step, now)
        speed = record.get("items_per_second", 0.0)
        smooth = 0.9 * self._latest["items_per_second"] + 0.1 * speed if self._latest else speed
        self._latest = {**self._latest, **record, "items_per_second": smooth}
        text = self._describe(self._latest)
        budget = record.get("seconds_left")
        if budget is not None:
            text += f"  {duration(budget)} left of the time budget"
        elif step > self._first[0] and step < self._steps:
            left = (now - self._first[1]) / (step - self._first[0]) * (self._steps - step)
            text += f"  {duration(left)} left"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, total=self._steps, description=text)
            if "val_loss" in record:
                self._bar.console.print(f"step {step}: {self._describe(record)}", highlight=False)
        elif "val_loss" in record or step == self._steps or now - self._printed > _PLAIN_EVERY:
            self._printed = now
            about = "" if budget is None else "about "
            self._console.print(f"step {step}/{about}{self._steps}: {text}", highlight=False, soft_wrap=True)

    def _describe(self, record: Record) -> str:
        return describe(record, unit=self._unit, labels=self._labels)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()
