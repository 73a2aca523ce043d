"""What a person sees while a run goes on: one live line on a terminal, now and then a plain line elsewhere."""

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from danlu.train.metrics import Record

__all__ = ["ProgressLine", "describe", "duration"]

_PLAIN_EVERY = 15.0  # seconds between two lines where nothing can be overwritten


def duration(seconds: float) -> str:
    """Return a time span as people say it.

    >>> duration(42), duration(200), duration(7500)
    ('42 s', '3 min 20 s', '2 h 05 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def describe(shown: Record, *, unit: str = "tokens") -> str:
    """Return the numbers of a record in one line, those that it has; ``unit`` is what the objective counts.

    >>> describe({"step": 5, "loss": 2.5, "val_loss": 2.75, "val_bpb": 1.2, "tokens_per_second": 12345.0, "mfu": 0.42})
    'loss 2.500  val 2.750 (1.200 bits/byte)  12.3k tokens/s  MFU 42%'
    """
    parts = [f"loss {shown['loss']:.3f}"]
    if "val_loss" in shown:
        bits = f" ({shown['val_bpb']:.3f} bits/byte)" if "val_bpb" in shown else ""
        parts.append(f"val {shown['val_loss']:.3f}{bits}")
    if "tokens_per_second" in shown:
        speed = shown["tokens_per_second"]
        parts.append(f"{speed / 1000:.1f}k {unit}/s" if speed >= 1000 else f"{speed:.0f} {unit}/s")
    if "mfu" in shown:
        parts.append(f"MFU {shown['mfu']:.0%}")
    if "max_vio" in shown:
        parts.append(f"imbalance {shown['max_vio']:.2f}")
    if shown.get("skipped"):
        parts.append(f"skipped {shown['skipped']}")
    return "  ".join(parts)


class ProgressLine:
    """Show loss, validation loss, speed, share of the device's speed, expert balance and the time left.

    Args:
        steps: length of the run.
        console: where to.
        start: step that the run continues from.
        unit: what the objective counts.
    """

    def __init__(self, steps: int, console: Console, *, start: int = 0, unit: str = "tokens") -> None:
        self._steps, self._console, self._unit = steps, console, unit
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
        now = time.monotonic()
        self._first = self._first or (step, now)
        speed = record.get("tokens_per_second", 0.0)
        smooth = 0.9 * self._latest["tokens_per_second"] + 0.1 * speed if self._latest else speed
        self._latest = {**self._latest, **record, "tokens_per_second": smooth}
        text = describe(self._latest, unit=self._unit)
        if step > self._first[0] and step < self._steps:
            left = (now - self._first[1]) / (step - self._first[0]) * (self._steps - step)
            text += f"  {duration(left)} left"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)
            if "val_loss" in record:
                self._bar.console.print(f"step {step}: {describe(record, unit=self._unit)}", highlight=False)
        elif "val_loss" in record or step == self._steps or now - self._printed > _PLAIN_EVERY:
            self._printed = now
            self._console.print(f"step {step}/{self._steps}: {text}", highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()
