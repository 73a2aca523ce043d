"""How many steps a run has: given, or what fits into a number of minutes."""

from typing import Any

from danlu.protocols import ScheduleConfig, SettlesLate

__all__ = ["Length"]

# Before so many measured steps a step's duration is not known well enough to count on, unless time presses.
_MEASURED_STEPS = 9
_PRESSING = 0.5  # share of the time
_GUESS = 1000


class Length:
    """The length of a run in steps, which follows from a time budget while the run goes on.

    Without a budget it is the number of steps given. With one, the length is estimated anew after every step from the
    time that is left and the mean duration of the steps, the first one left out because it may compile the model. It
    is *settled* once and for all as soon as the schedule depends on it: warm-up-stable-decay settles it when the share
    of its decay is left, so that the decay ends with the budget; a cosine settles it after the first ten steps; a
    constant learning rate when the time is over. A settled length is part of the checkpoint, so that a resumed run
    takes the same steps.

    Args:
        steps: the most steps; None for as many as there is time for.
        minutes: the budget, evaluations and checkpoints included; None for none.
        schedule: whose dependence on the length decides when it is settled.

    >>> from danlu.optim import WarmupStableDecay
    >>> length = Length(600, 1.0, WarmupStableDecay(warmup=0, decay=0.4))
    >>> for step in range(1, 101):
    ...     length.update(step, 0.18 * step)
    >>> length.steps, length.settled  # 30 % of the time
    (333, False)
    >>> for step in range(101, 201):
    ...     length.update(step, 0.18 * step)
    >>> length.steps, length.settled  # 60 %: the decay begins
    (333, True)
    """

    def __init__(self, steps: int | None, minutes: float | None, schedule: ScheduleConfig) -> None:
        self.most, self.seconds, self.schedule = steps, None if minutes is None else 60 * minutes, schedule
        self.steps = steps if steps is not None else _GUESS
        self.settled = minutes is None
        self._first: tuple[int, float] | None = None  # step and time after the first step of this process

    def reached(self, step: int) -> bool:
        """Whether ``step`` is the last of the run, or beyond."""
        return step >= self.steps if self.settled else step == self.most

    def update(self, step: int, elapsed: float) -> None:
        """Take note that ``step`` steps took ``elapsed`` seconds, and another is under way.

        Every process has to pass the same.
        """
        if self.settled or self.seconds is None or step == 0:
            return
        first, began = self._first = self._first or (step, elapsed)
        left = self.seconds - elapsed
        if left <= 0:
            self.steps, self.settled = step + 1, True
            return
        measured = step - first
        if not measured or (measured < _MEASURED_STEPS and left > (1 - _PRESSING) * self.seconds):
            return
        estimate = max(step + 1, round(step + left * measured / (elapsed - began)))
        self.steps = estimate if self.most is None else min(self.most, estimate)
        self.settled = step >= self.steps * self._settles_at()

    def _settles_at(self) -> float:
        return min(1.0, self.schedule.settles_at(self.steps)) if isinstance(self.schedule, SettlesLate) else 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return the length and whether it is final."""
        return {"steps": self.steps, "settled": self.settled}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the length of a run with a budget; one without has what its configuration says."""
        if self.seconds is not None:
            self.steps, self.settled = state["steps"], state["settled"]
