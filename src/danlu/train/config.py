"""The configuration of a run and of its loop."""

from dataclasses import dataclass, is_dataclass
from typing import Annotated, Literal

from danlu._validate import integer, literals, number, positive
from danlu.config import Known
from danlu.protocols import DataConfig, ModelConfig, ObjectiveConfig, OptimizerConfig, ScheduleConfig
from danlu.train.parallel import ParallelConfig

__all__ = ["RunConfig", "TrainConfig"]

# What makes the component of each field; danlu.protocols says with which arguments.
_METHODS = {"model": "build", "objective": "build", "data": "open", "optim": "build", "schedule": "factor"}
_YEAR = 525_600  # minutes
_UNBOUNDED = 2**31


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop of a run.

    Attributes:
        steps: optimizer steps, with minutes the most of them; None for as many as the minutes allow.
        minutes: time that the run may take on this machine, evaluations included; the number of steps follows from it
            (:class:`danlu.train.budget.Length`). None for exactly ``steps``.
        accumulate: micro-batches in a step.
        seed: of the weights, the order of the data and everything drawn.
        clip: largest global norm of the gradient; None leaves it as it is.
        descent: largest product of update and gradient: a step that would lower the loss by more than it times the
            learning rate is made shorter (:func:`danlu.optim.limited_step`); None leaves steps as they are.
        patience: steps in a row that may be skipped because a gradient is not finite before the run stops.
        log_every: steps between two logged ones.
        eval_every: steps between evaluations (the last step is always evaluated); None for the last only.
        eval_batches: validation batches of an evaluation; None for all.
        checkpoint_every: steps between checkpoints (the end is always saved); None for the end only.
        keep: checkpoints kept, the newest ones.
        keep_every: further ones kept: those of steps that it divides; None for none.
        keep_best: a number of the evaluation, such as val_loss: the checkpoint where it was best is kept too, and an
            evaluation that improves on it is followed by a save; None keeps none for being good.
        stop_after: evaluations without an improvement of ``keep_best`` after which the run is complete; None for never.
        async_save: write checkpoints while the training goes on, from a copy of the state in the host's memory.
        precision: of activations and their matrix products; "auto" takes what was measured to be best here.
        device: "auto" takes a GPU if there is one.
        threads: CPU threads; None for the physical cores available.
        compile: run the objective through torch.compile: the first step then takes a minute or so.
        ema: decay of a moving average of the weights, evaluated and sampled in their place; None for none.
        tensorboard: write TensorBoard event files.
        parallel: how several processes share the model.
    """

    steps: int | None = 1000
    minutes: float | None = None
    accumulate: int = 1
    seed: int = 0
    clip: float | None = 1.0
    descent: float | None = None
    patience: int = 10
    log_every: int = 1
    eval_every: int | None = 100
    eval_batches: int | None = 16
    checkpoint_every: int | None = 200
    keep: int = 2
    keep_every: int | None = None
    keep_best: str | None = None
    stop_after: int | None = None
    async_save: bool = False
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = None
    compile: bool = False
    ema: float | None = None
    tensorboard: bool = True
    parallel: ParallelConfig = ParallelConfig()

    def __post_init__(self) -> None:
        for name in ("accumulate", "patience", "log_every", "keep"):
            integer(name, getattr(self, name))
        for name in ("steps", "eval_every", "eval_batches", "checkpoint_every", "keep_every", "stop_after"):
            if getattr(self, name) is not None:
                integer(name, getattr(self, name))
        if self.keep_best is not None and not (isinstance(self.keep_best, str) and self.keep_best):
            raise TypeError(f"keep_best must be the name of a number of the evaluation, got {self.keep_best!r}")
        if self.stop_after is not None and (self.keep_best is None or self.eval_every is None):
            lacking = "keep_best" if self.keep_best is None else "eval_every"
            raise ValueError(f"stop_after counts evaluations that do not improve keep_best, got {lacking} = None")
        if self.minutes is not None:
            number("minutes", self.minutes, low=0, high=_YEAR, low_open=True)
        elif self.steps is None:
            raise ValueError("steps and minutes are both None: give one of them, a run needs an end")
        if self.threads is not None:
            integer("threads", self.threads, high=1024)
        integer("seed", self.seed, low=0, high=2**63 - 1)
        if self.clip is not None:
            positive("clip", self.clip)
        if self.descent is not None:
            positive("descent", self.descent)
        if self.ema is not None:
            number("ema", self.ema, low=0, high=1, high_open=True)
        literals(self)

    @property
    def batches(self) -> int:
        """Training batches of a run, at most."""
        return (_UNBOUNDED if self.steps is None else self.steps) * self.accumulate


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that makes a run: the configurations of its components.

    Every field is open: a dataclass of your own with the protocol's method takes the place of one of danlu's.

    Attributes:
        recipe: name of the recipe it came from.
        model: the network, e.g. ``TransformerConfig``.
        objective: what is minimised, e.g. ``CausalLMConfig``.
        data: what to train on, e.g. ``TextConfig``.
        optim: the optimizer, e.g. ``MuonConfig``.
        schedule: the learning rate over time, e.g. ``WarmupStableDecay``.
        train: the loop.
    """

    recipe: str
    model: Annotated[ModelConfig, Known("danlu.models")]
    objective: Annotated[ObjectiveConfig, Known("danlu.objectives")]
    data: Annotated[DataConfig, Known("danlu.data")]
    optim: Annotated[OptimizerConfig, Known("danlu.optim")]
    schedule: Annotated[ScheduleConfig, Known("danlu.optim")]
    train: TrainConfig = TrainConfig()

    def __post_init__(self) -> None:
        if not isinstance(self.recipe, str):
            raise TypeError(f"recipe must be a name, got {self.recipe!r}")
        for name, method in _METHODS.items():
            value = getattr(self, name)
            if isinstance(value, type) or not (is_dataclass(value) and callable(getattr(value, method, None))):
                what = value.__name__ if isinstance(value, type) else type(value).__name__
                raise TypeError(f"{name} must be a dataclass with a method {method}, got {what} (see danlu.protocols)")
        if not isinstance(self.train, TrainConfig):
            raise TypeError(f"train must be a TrainConfig, got {type(self.train).__name__}")
