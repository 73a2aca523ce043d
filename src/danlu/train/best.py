"""The best evaluation of a run, and when nothing better is to be expected."""

from collections.abc import Mapping
from typing import Any

from danlu.protocols import Scored
from danlu.train.checkpoint import Goal

__all__ = ["Best", "goal_of"]


def goal_of(metric: str | None, objective: object) -> Goal | None:
    """Return what ``train.keep_best`` asks for, in the direction that the objective gives that metric."""
    if metric is None:
        return None
    return Goal(metric, higher=isinstance(objective, Scored) and metric in objective.scores)


class Best:
    """The best value of a metric so far, and how many evaluations have not improved on it.

    Args:
        goal: the metric; None for none, then there is no best.
        stop_after: evaluations without improvement after which a run has come to its end; None for never.

    >>> best = Best(Goal("val_loss"), stop_after=2)
    >>> [best.update(step, {"val_loss": loss}) for step, loss in ((10, 2.0), (20, 1.5), (30, 1.6))]
    [True, True, False]
    >>> best.exhausted, best.update(40, {"val_loss": 1.5}), best.exhausted
    (False, False, True)
    >>> best.sentence()
    'val_loss was best after step 20 (1.5) and has not improved in 2 evaluations since'
    """

    def __init__(self, goal: Goal | None = None, *, stop_after: int | None = None) -> None:
        self.goal, self.stop_after = goal, stop_after
        self.value: float | None = None
        self.step: int | None = None
        self.since = 0
        self._known = False

    @property
    def exhausted(self) -> bool:
        """Whether the run should end because nothing has become better for long enough."""
        return self.stop_after is not None and self.since >= self.stop_after

    def update(self, step: int, found: Mapping[str, float]) -> bool:
        """Take note of an evaluation; return whether it is the best so far.

        Raises:
            ValueError: the first evaluation has no such metric.
        """
        if self.goal is None:
            return False
        value = found.get(self.goal.metric)
        if value is None and not self._known:
            known = ", ".join(sorted(found))
            raise ValueError(f"train.keep_best must be a number of the evaluation ({known}), got {self.goal.metric!r}")
        self._known = True
        if value is not None and self.goal.better(value, self.value):
            self.value, self.step, self.since = value, step, 0
            return True
        self.since += 1
        return False

    def sentence(self) -> str:
        """Say what was best, and for how long nothing was better."""
        if self.goal is None:
            return "no metric was followed"
        if self.step is None:
            return f"{self.goal.metric} was never finite in {self.since} evaluations"
        best = f"{self.goal.metric} was best after step {self.step} ({self.value:.4g})"
        return f"{best} and has not improved in {self.since} evaluations since" if self.since else best

    def state_dict(self) -> dict[str, Any] | None:
        """Return the best so far, None where there is no metric."""
        if self.goal is None:
            return None
        return {"metric": self.goal.metric, "value": self.value, "step": self.step, "since": self.since}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Go on from what was best; a run that followed another metric, or none, begins to look."""
        if self.goal is not None and state is not None and state["metric"] == self.goal.metric:
            self.value, self.step, self.since = state["value"], state["step"], state["since"]
            self._known = True
