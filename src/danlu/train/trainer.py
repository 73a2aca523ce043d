"""The training loop. It knows no task: an objective gives the summed loss of a batch and counts its units.

With ``S_i`` the summed loss of micro-batch ``i`` and ``n_i`` its units (tokens, images, ...), a step follows the
gradient of ``sum S_i / sum n_i`` over all micro-batches of all processes: accumulating, or sharing the work among
processes, gives the step of one large batch, however unevenly the units are spread.
"""

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel

from danlu._validate import choice, integer, number, positive
from danlu.optim import NonFiniteGuard, clip_grad_norm_, grad_norm
from danlu.train import checkpoint, rng
from danlu.train.device import Policy, choose
from danlu.train.distributed import barrier, gather, sum_over_ranks, world, wrap
from danlu.train.metrics import Record, Reporter
from danlu.train.signals import Stop

__all__ = ["Batch", "Loader", "TrainConfig", "Trainer"]

Batch = Mapping[str, Tensor]

_FLUSH_EVERY = {"cpu": 1, "cuda": 16}  # steps whose numbers wait on the device before they are read together


class Loader(Protocol):
    """An endless stream of batches whose position is a small state."""

    def __next__(self) -> Batch:
        """Return the next batch."""

    def state_dict(self) -> Mapping[str, Any]:
        """Return the position."""

    def load_state_dict(self, state: Any) -> None:
        """Go to a position."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop of a run.

    Attributes:
        steps: optimizer steps.
        accumulate: micro-batches in a step.
        seed: of the weights, the order of the data and everything drawn.
        clip: largest global norm of the gradient; None leaves it as it is.
        patience: steps in a row that may be skipped because a gradient is not finite before the run stops.
        log_every: steps between two logged ones.
        eval_every: steps between evaluations (the last step is always evaluated); None for the last only.
        eval_batches: validation batches of an evaluation; None for all.
        checkpoint_every: steps between checkpoints (the end is always saved); None for the end only.
        keep: checkpoints kept.
        precision: of activations and their matrix products; "auto" takes what was measured to be best here.
        device: "auto" takes a GPU if there is one.
        threads: CPU threads; None for the physical cores available.
        compile: run the objective through torch.compile: the first step then takes a minute or so.
        ema: decay of a moving average of the weights, evaluated and sampled in their place; None for none.
        tensorboard: write TensorBoard event files.
    """

    steps: int = 1000
    accumulate: int = 1
    seed: int = 0
    clip: float | None = 1.0
    patience: int = 10
    log_every: int = 1
    eval_every: int | None = 100
    eval_batches: int | None = 16
    checkpoint_every: int | None = 200
    keep: int = 2
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = None
    compile: bool = False
    ema: float | None = None
    tensorboard: bool = True

    def __post_init__(self) -> None:
        for name in ("steps", "accumulate", "patience", "log_every", "keep"):
            integer(name, getattr(self, name))
        for name in ("eval_every", "eval_batches", "checkpoint_every"):
            if getattr(self, name) is not None:
                integer(name, getattr(self, name))
        if self.threads is not None:
            integer("threads", self.threads, high=1024)
        integer("seed", self.seed, low=0, high=2**63 - 1)
        if self.clip is not None:
            positive("clip", self.clip)
        if self.ema is not None:
            number("ema", self.ema, low=0, high=1, high_open=True)
        choice("precision", self.precision, ("auto", "float32", "bfloat16"))
        choice("device", self.device, ("auto", "cpu", "cuda"))

    @property
    def batches(self) -> int:
        """Training batches of a run."""
        return self.steps * self.accumulate


class _InterruptedError(Exception):
    """An evaluation was given up because the run was asked to stop."""


@dataclass(frozen=True)
class _Pending:
    """Numbers of a step that may still be on their way from the device."""

    step: int
    loss: Tensor  # summed over this process's units
    units: Tensor  # of all processes
    norm: Tensor
    lr: float
    skipped: int
    time: float
    seconds: float


class Trainer:
    """Train ``objective`` for ``config.steps`` steps.

    Args:
        objective: a module: ``objective(batch)`` is a summed loss, ``objective.count(batch)`` its units,
            ``objective.evaluate(batches)`` a dictionary of numbers, ``objective.metrics()`` another.
        optimizers: stepped in order.
        schedules: stepped after them.
        loader: training batches: dictionaries of tensors.
        config: the loop.
        policy: arithmetic; None chooses by ``config.precision``.
        validation: called with a number of batches (None: all), gives this process's share of the validation batches.
        folder: where checkpoints go; None keeps none.
        described: the configuration stored in checkpoints.
        reporters: receive the record of every logged step, on rank 0.
        ema: moving average of ``objective`` (:func:`danlu.train.ema.averaged`), evaluated in its place.
        flops: floating point operations of training a unit, for the share of the device's speed that is used.

    Example::

        trainer = Trainer(objective, [optimizer], [schedule], loader, TrainConfig(steps=100))
        trainer.fit()
    """

    def __init__(
        self,
        objective: nn.Module,
        optimizers: Sequence[Optimizer],
        schedules: Sequence[LRScheduler],
        loader: Loader,
        config: TrainConfig,
        *,
        policy: Policy | None = None,
        validation: Callable[[int | None], Iterable[Batch]] | None = None,
        folder: Path | None = None,
        described: Mapping[str, Any] | None = None,
        reporters: Sequence[Reporter] = (),
        ema: AveragedModel | None = None,
        flops: float | None = None,
    ) -> None:
        self.objective: Any = objective
        self.optimizers, self.schedules, self.loader = list(optimizers), list(schedules), loader
        self.config, self.validation, self.folder = config, validation, folder
        self.described = dict(described or {})
        self.reporters, self.ema, self.flops = list(reporters), ema, flops
        self.policy = policy or choose(config.precision, device=config.device, threads=config.threads)
        self.world = world()
        if config.compile:
            objective.compile()
        self.called: Any = wrap(objective)
        self.parameters = [p for p in objective.parameters() if p.requires_grad]
        self.guard = NonFiniteGuard(config.patience)
        self.step = 0
        self.tokens = 0
        self.seconds = 0.0
        self.saved: int | None = None
        self._pending: list[_Pending] = []
        self._unevaluated: dict[str, Any] | None = None  # record of a step whose evaluation is still to come
        self._start = time.perf_counter()
        self._stopping = False

    def fit(self, stop: Stop | None = None) -> None:
        """Train to the last step, or until ``stop`` has received a signal; then the state has been saved.

        Raises:
            FloatingPointError: too many steps in a row had a gradient that is not finite.
            CheckpointError: a checkpoint could not be written.
        """
        stop = stop or Stop()
        config = self.config
        self._start = time.perf_counter() - self.seconds
        try:
            while True:
                if self._unevaluated is not None:
                    self._evaluate(stop)
                finished = self.step >= config.steps
                if self.world.size == 1:
                    self._stopping = stop.signal is not None
                if finished or self._stopping or (self.step and _due(self.step, config.checkpoint_every)):
                    self.save()
                if finished or self._stopping:
                    return
                self._train_step(stop)
        except BaseException:
            if self.world.size == 1:  # alone, no other process has to take part in reading the last numbers
                self._report_pending()
            raise

    def save(self) -> None:
        """Write a checkpoint of the present state, unless the newest one is of this step already."""
        self._report_pending()
        if self.folder is None or self.saved == self.step:
            return
        state = self.state_dict()  # every process contributes its generators
        if self.world.main:
            checkpoint.save(self.folder, self.step, state, config=self.described, keep=self.config.keep)
        barrier()
        self.saved = self.step

    def state_dict(self) -> dict[str, Any]:
        """Return everything the run depends on."""
        self.seconds = time.perf_counter() - self._start
        return {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "unevaluated": self._unevaluated,
            "objective": self.objective.state_dict(),
            "optimizers": [checkpoint.plain_groups(optimizer.state_dict()) for optimizer in self.optimizers],
            "schedules": [schedule.state_dict() for schedule in self.schedules],
            "loader": dict(self.loader.state_dict()),
            "guard": self.guard.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "rng": gather(rng.snapshot()),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where :meth:`state_dict` was taken.

        With as many processes as then, every later number is the same bit for bit; with another number the random
        generators of the processes are seeded anew.
        """
        self.step, self.tokens, self.seconds = state["step"], state["tokens"], state["seconds"]
        self.saved = self.step
        self._unevaluated = state["unevaluated"]
        self.objective.load_state_dict(state["objective"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            groups = zip(optimizer.state_dict()["param_groups"], saved["param_groups"], strict=True)
            optimizer.load_state_dict({**saved, "param_groups": [{**now, **then} for now, then in groups]})
        for schedule, saved in zip(self.schedules, state["schedules"], strict=True):
            schedule.load_state_dict(saved)
        self.loader.load_state_dict(state["loader"])
        self.guard.load_state_dict(state["guard"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        if len(state["rng"]) == self.world.size:
            rng.restore(state["rng"][self.world.rank])
        else:
            rng.seed_all(self.config.seed + 1_000_003 * (self.world.rank + self.world.size * self.step))

    @property
    def logged(self) -> int:
        """The last step whose record is final: one that still waits for its evaluation will be reported again."""
        return self.step if self._unevaluated is None else self.step - 1

    def _train_step(self, stop: Stop) -> None:
        config, began = self.config, time.perf_counter()
        self.objective.train()
        batches = [_to(next(self.loader), self.policy.device) for _ in range(config.accumulate)]
        units = torch.stack([self.objective.count(batch) for batch in batches]).sum().double()
        asked = torch.full_like(units, float(stop.signal is not None))
        totals = sum_over_ranks(torch.stack([units, asked]))
        scale = self.world.size / totals[0].clamp_min(1)  # data parallelism averages gradients over processes
        loss = torch.zeros((), dtype=torch.float64, device=self.policy.device)
        for index, batch in enumerate(batches):
            alone = self.world.size > 1 and index < len(batches) - 1
            with self.called.no_sync() if alone else nullcontext():
                part = self.called(batch)
                (part * scale.to(part.dtype)).backward()
            loss += part.detach()
        norm = grad_norm(self.parameters) if config.clip is None else clip_grad_norm_(self.parameters, config.clip)
        lr = float(self.optimizers[0].param_groups[0]["lr"])
        allowed = self.guard.allows(norm, self.objective.named_parameters())
        if allowed:
            for optimizer in self.optimizers:
                optimizer.step()
            if self.ema is not None:
                self.ema.update_parameters(self.objective)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        with warnings.catch_warnings():
            if not allowed:  # a skipped first step is no mistake in the order of calls
                warnings.simplefilter("ignore")
            for schedule in self.schedules:
                schedule.step()
        if self.world.size > 1:
            self._stopping = bool(totals[1] > 0)
        self.step += 1
        now = time.perf_counter()
        self._pending.append(
            _Pending(self.step, loss, totals[0], norm, lr, self.guard.skipped, now - self._start, now - began)
        )
        due = self.step == config.steps or _due(self.step, config.eval_every)
        if self.validation is not None and due:
            self._unevaluated = self._report_pending(hold=True)
        elif len(self._pending) >= _FLUSH_EVERY.get(self.policy.device.type, 1):
            self._report_pending()

    def _report_pending(self, *, hold: bool = False) -> dict[str, Any] | None:
        """Read the numbers that wait on the device in one go and report them; ``hold`` back the last and return it."""
        if not self._pending:
            return None
        rows = torch.stack([torch.stack([p.loss, p.units, p.norm.double()]) for p in self._pending])
        rows[:, 0] = sum_over_ranks(rows[:, 0].contiguous())
        last = self._pending[-1]
        record: dict[str, Any] = {}
        for pending, (loss, units, norm) in zip(self._pending, rows.tolist(), strict=True):
            self.tokens += int(units)
            speed = units / pending.seconds
            record = {
                "step": pending.step,
                "loss": loss / max(units, 1),
                "tokens": self.tokens,
                "time": pending.time,
                "tokens_per_second": speed,
                "lr": pending.lr,
                "grad_norm": norm,
            }
            if self.flops:
                record["mfu"] = speed * self.flops / (self.policy.rate * self.world.size)
            if pending.skipped:
                record["skipped"] = pending.skipped
            if pending is last:
                record |= self.objective.metrics()
            logged = pending.step % self.config.log_every == 0 or pending.step == self.config.steps
            if logged and not (hold and pending is last):
                self._report(record)
        self._pending.clear()
        return record if hold else None

    def _report(self, record: Record) -> None:
        if self.world.main:
            for reporter in self.reporters:
                reporter(record)

    def _evaluate(self, stop: Stop) -> None:
        """Evaluate and report the step's record with the result; when interrupted, leave both for the next start.

        Random numbers drawn here are given back, so that evaluating more or less often trains the same weights.
        """
        validation, record = self.validation, self._unevaluated
        if validation is None or record is None:
            return
        evaluated: Any = self.objective if self.ema is None else self.ema.module
        units = torch.zeros((), dtype=torch.float64, device=self.policy.device)

        def batches() -> Iterator[Batch]:
            nonlocal units
            for batch in islice(validation(self.config.eval_batches), self.config.eval_batches):
                if stop.signal is not None and self.world.size == 1:
                    raise _InterruptedError
                moved = _to(batch, self.policy.device)
                units = units + evaluated.count(moved)
                yield moved

        before = rng.snapshot()
        try:
            found: dict[str, float] = evaluated.evaluate(batches())
        except _InterruptedError:
            return
        finally:
            rng.restore(before)
        if self.world.size > 1:  # every process has evaluated its share
            names = sorted(found)
            sums = torch.stack([units * found[name] for name in names] + [units])
            *means, total = sum_over_ranks(sums).tolist()
            found = {name: mean / max(total, 1) for name, mean in zip(names, means, strict=True)}
        self._report({**record, **found})
        self._unevaluated = None
        self.saved = None  # a checkpoint that still asks for this evaluation is out of date


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _to(batch: Batch, device: torch.device) -> Batch:
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}
