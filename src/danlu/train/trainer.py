"""The training loop. It knows no task: an objective gives the summed loss of a batch and what to divide it by.

With ``S_i`` the summed loss of micro-batch ``i`` and ``n_i`` its denominator (tokens with a target, images, ...), a
step follows the gradient of ``sum S_i / sum n_i`` over all micro-batches of all processes: accumulating, or sharing the
work among processes, gives the step of one large batch, however unevenly the targets are spread.

A step's record goes through three states: its numbers wait on the device (``_pending``, so that the step does not wait
for them), it is read and reported, or it is read and waits for its evaluation (``_unevaluated``). The last one is part
of the checkpoint: a run that is interrupted in an evaluation begins with that evaluation when it is resumed.
"""

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

from danlu._draws import start
from danlu.objectives import evaluate
from danlu.optim import NonFiniteGuard, clip_grad_norm_, grad_norm, limited_step
from danlu.protocols import Batch, Durable, Loader, Paced, Record, Reporter, ScheduleConfig
from danlu.train import checkpoint, rng
from danlu.train.best import Best, goal_of
from danlu.train.budget import Length
from danlu.train.config import TrainConfig
from danlu.train.device import Policy, choose
from danlu.train.distributed import gather, sum_over_ranks, world
from danlu.train.divergence import check_finite
from danlu.train.migrations import upgraded_state
from danlu.train.parallel import Mesh
from danlu.train.sharded import optimizer_state, placed
from danlu.train.signals import Stop

__all__ = ["TrainConfig", "Trainer"]

_FLUSH_EVERY = {"cpu": 1, "cuda": 16}  # steps whose numbers wait on the device before they are read together


class _InterruptedError(Exception):
    """An evaluation was given up because the run was asked to stop."""


@dataclass(frozen=True)
class _Pending:
    """Numbers of a step that may still be on their way from the device."""

    step: int
    loss: Tensor  # summed over this process's targets
    items: Tensor  # targets of all processes
    norm: Tensor
    lr: float
    skipped: int
    time: float
    seconds: float


class Trainer:
    """Train ``objective`` for ``config.steps`` steps, or for ``config.minutes``.

    Args:
        objective: a module that fits :class:`danlu.protocols.Objective`.
        optimizer: of its parameters.
        schedule: of the learning rate, a factor on every group's own.
        loader: training batches.
        config: the loop.
        policy: arithmetic; None chooses by ``config.precision``.
        validation: called with a number of batches (None: all), gives this process's share of the validation batches.
        folder: where checkpoints go; None keeps none.
        described: the configuration stored in checkpoints.
        reporters: receive the record of every logged step, on rank 0.
        ema: moving average of ``objective`` (:func:`danlu.train.ema.averaged`), evaluated in its place.
        flops: floating-point operations of training one of what the loss is divided by, for the share of the device's
            speed that is used.
        mesh: from :func:`danlu.train.parallel.parallelize`, which several processes call before they make the
            optimizer.

    Raises:
        ValueError: there are several processes, and ``objective`` was not placed on them.

    Example::

        trainer = Trainer(objective, optimizer, Cosine(), loader, TrainConfig(steps=100))
        trainer.fit()
    """

    def __init__(
        self,
        objective: nn.Module,
        optimizer: Optimizer,
        schedule: ScheduleConfig,
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
        mesh: Mesh | None = None,
    ) -> None:
        mesh = mesh or Mesh()
        if world().size != mesh.world.size:
            raise ValueError(
                f"mesh must be what parallelize(objective, ...) returned for {world().size} processes, got one of "
                f"{mesh.world.size}"
            )
        self.objective: Any = objective
        self.optimizer, self.loader = optimizer, loader
        self.length = Length(config.steps, config.minutes, schedule)
        self.scheduler = LambdaLR(optimizer, lambda step: schedule.factor(step, self.length.steps))
        self.config, self.validation = config, validation
        self.described = dict(described or {})
        self.reporters, self.ema, self.flops = list(reporters), ema, flops
        self.policy = policy or choose(config.precision, device=config.device, threads=config.threads)
        self.world, self.mesh = mesh.world, mesh
        if config.compile:
            objective.compile()
        self.parameters = [p for p in objective.parameters() if p.requires_grad]
        self.guard = NonFiniteGuard(config.patience)
        self.deferred = self.policy.device.type != "cpu"
        self.step = 0
        self.items = 0
        self.seconds = 0.0
        self.best = Best(goal_of(config.keep_best, objective), stop_after=config.stop_after)
        self.saver = checkpoint.Saver(
            folder,
            background=config.async_save,
            config=self.described,
            keep=config.keep,
            keep_every=config.keep_every,
            goal=self.best.goal,
        )
        self._metrics_of: dict[str, Any] | None = None  # the last evaluation and its step
        self._saved: int | None = None  # step of the newest checkpoint
        self._pending: list[_Pending] = []
        self._unevaluated: dict[str, Any] | None = None
        self._start = time.perf_counter()
        self._stop_agreed = False  # by all processes, in the last step
        self._save_failed = False  # a save in the background, on any process

    @property
    def finished(self) -> bool:
        """Whether the last step has been taken."""
        return self.length.reached(self.step) or self.best.exhausted

    @property
    def complete(self) -> bool:
        """Whether the last step has been taken and everything about it was reported."""
        return self.finished and self._unevaluated is None

    @property
    def logged(self) -> int:
        """The last step whose record is final: one that still waits for its evaluation will be reported again."""
        return self.step if self._unevaluated is None else self.step - 1

    def fit(self, stop: Stop | None = None) -> None:
        """Train to the last step, or until ``stop`` has received a signal; then the state has been saved.

        Raises:
            FloatingPointError: too many steps in a row had a gradient that is not finite, or a weight is not.
            CheckpointError: a checkpoint could not be written.
        """
        stop = stop or Stop()
        self._start = time.perf_counter() - self.seconds
        try:
            while True:
                if self._unevaluated is not None:
                    self._evaluate(stop)
                ending = self.finished or self._stopping(stop)
                best = self.step == self.best.step
                if ending or best or (self.step and _due(self.step, self.config.checkpoint_every)):
                    self.save()
                if ending or self._save_failed:
                    self.saver.wait()
                if ending:
                    return
                self._train_step(stop)
        except BaseException as error:
            if self.world.size == 1:  # alone, no other process has to take part in reading the last numbers
                self._report_pending()
                if self._unevaluated is not None and isinstance(error, Exception):
                    with suppress(OSError, FloatingPointError):  # the evaluation's own error is to be read
                        self.save()  # the steps before it did not fail
            if isinstance(error, Exception):
                self.saver.settle()
            raise

    def _stopping(self, stop: Stop) -> bool:
        return stop.signal is not None if self.world.size == 1 else self._stop_agreed

    def save(self) -> None:
        """Write a checkpoint of the present state, or begin to, unless the newest one is of this step already.

        Raises:
            FloatingPointError: a weight is not finite: what was saved before stays the last good state.
            CheckpointError: it could not be written.
        """
        self._report_pending()
        if self._saved == self.step:
            return
        check_finite(self.objective.named_parameters(), self.step)
        for reporter in self.reporters:
            if isinstance(reporter, Durable):
                reporter.flush()
        self.saver.save(self.step, self.state_dict(), metrics=self._metrics_of)
        self._saved = self.step

    def state_dict(self) -> dict[str, Any]:
        """Return everything the run depends on."""
        self.seconds = time.perf_counter() - self._start
        return {
            "step": self.step,
            "items": self.items,
            "seconds": self.seconds,
            "length": self.length.state_dict(),
            "best": self.best.state_dict(),
            "metrics": self._metrics_of,
            "unevaluated": self._unevaluated,
            "objective": self.objective.state_dict(),
            "optimizer": checkpoint.plain_groups(self.optimizer.state_dict()),
            "schedule": self.scheduler.state_dict(),
            "loader": dict(self.loader.state_dict()),
            "guard": self.guard.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "rng": gather(rng.snapshot()),
        }

    def restore(self, found: checkpoint.Found) -> None:
        """Continue where a checkpoint was taken; of weights that are divided each process reads what it holds."""
        into = {
            "objective": self.objective.state_dict(),
            "optimizer": optimizer_state(self.optimizer),
            "ema": None if self.ema is None else self.ema.state_dict(),
        }
        self.load_state_dict(found.read(into=into).state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where :meth:`state_dict` was taken, by this release or the one before.

        With as many processes as then, every later number is the same bit for bit; with another number the random
        generators of the processes are seeded anew.
        """
        state = upgraded_state(state, self.optimizer)
        state["optimizer"] = placed(state["optimizer"], optimizer_state(self.optimizer))
        self.step, self.items, self.seconds = state["step"], state["items"], state["seconds"]
        self._saved = self.step
        self._unevaluated, self._metrics_of = state["unevaluated"], state.get("metrics")
        self.best.load_state_dict(state.get("best"))
        if state["length"] is not None:  # a checkpoint of the release before has none
            self.length.load_state_dict(state["length"])
        self.objective.load_state_dict(state["objective"])
        saved = state["optimizer"]
        groups = zip(self.optimizer.state_dict()["param_groups"], saved["param_groups"], strict=True)
        self.optimizer.load_state_dict({**saved, "param_groups": [{**now, **then} for now, then in groups]})
        self.scheduler.load_state_dict(state["schedule"])
        self.loader.load_state_dict(state["loader"])
        self.guard.load_state_dict(state["guard"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        if len(state["rng"]) == self.world.size:
            rng.restore(state["rng"][self.world.rank])
        else:
            rng.seed_all(self.config.seed + 1_000_003 * (self.world.rank + self.world.size * self.step))

    def _train_step(self, stop: Stop) -> None:
        began = time.perf_counter()
        loss, items, elapsed = self._forward_backward(stop)
        norm, lr = self._apply(elapsed)
        self.step += 1
        now = time.perf_counter()
        self._pending.append(
            _Pending(self.step, loss, items, norm, lr, self.guard.skipped, now - self._start, now - began)
        )
        if self.validation is not None and (self.finished or _due(self.step, self.config.eval_every)):
            self._unevaluated = self._report_pending(hold=True)
        elif len(self._pending) >= _FLUSH_EVERY.get(self.policy.device.type, 1):
            self._report_pending()

    def _forward_backward(self, stop: Stop) -> tuple[Tensor, Tensor, float]:
        """Accumulate the gradient of a step; return the summed loss, the denominator of all, and the seconds so far.

        One collective adds up what every process has to know: the denominators, whether one was asked to stop, and the
        time, which has to be the same for all because it may decide on the length of the run.
        """
        device = self.policy.device
        self.objective.train()
        batches = [_to(self._numbered(next(self.loader), micro), device) for micro in range(self.config.accumulate)]
        items = torch.stack([self.objective.denominator(batch) for batch in batches]).sum().double()
        elapsed, self._save_failed = time.perf_counter() - self._start, self.saver.failed
        if self.world.size > 1:
            mine = [stop.signal is not None, elapsed / self.world.size, self._save_failed]
            asked = torch.tensor(mine, dtype=items.dtype, device=device)
            items, others = (totals := sum_over_ranks(torch.cat([items[None], asked])))[0], totals[1:].tolist()
            self._stop_agreed, elapsed, self._save_failed = others[0] > 0, others[1], others[2] > 0
        scale = 1 / items.clamp_min(1)
        loss = torch.zeros((), dtype=torch.float64, device=device)
        for index, batch in enumerate(batches):
            self.mesh.accumulate(last=index == len(batches) - 1)
            part = self.objective(batch)
            (part * scale.to(part.dtype)).backward()
            loss += part.detach()
        self.mesh.reduce_own()
        return loss, items, elapsed

    def _numbered(self, batch: Batch, micro: int) -> Batch:
        """Return the batch with the numbers of its examples among all of the run, of which what is drawn depends."""
        rows = len(next(iter(batch.values())))
        first = (self.step * self.config.accumulate + micro) * self.world.size + self.world.rank
        return {**batch, "position": start("train", self.config.seed) + torch.arange(rows) + first * rows}

    def _apply(self, elapsed: float) -> tuple[Tensor, float]:
        """Clip, step and schedule; return the gradient's norm and the learning rate that was used."""
        clip = self.config.clip
        norm = grad_norm(self.parameters) if clip is None else clip_grad_norm_(self.parameters, clip)
        lr = float(self.optimizer.param_groups[0]["lr"])
        allowed = True
        if self.deferred:  # decided on the device, read with the other numbers
            self.guard.screen(norm, self.objective.named_parameters())
        else:
            allowed = self.guard.allows(norm, self.objective.named_parameters())
        if allowed:
            if self.config.descent is None:
                self.optimizer.step()
            else:
                limited_step(self.optimizer, self.config.descent)
            if self.ema is not None:
                self.ema.update_parameters(self.objective)
        self.optimizer.zero_grad(set_to_none=True)
        self.length.update(self.step, elapsed)
        if self.config.minutes is not None and isinstance(self.objective, Paced):
            self.objective.pace(self.step / self.length.steps)
        with warnings.catch_warnings():
            if not allowed:  # a skipped first step is no mistake in the order of calls
                warnings.simplefilter("ignore")
            self.scheduler.step()
        return norm, lr

    def _report_pending(self, *, hold: bool = False) -> dict[str, Any] | None:
        """Read the numbers that wait on the device in one go and report them; ``hold`` back the last and return it."""
        if not self._pending:
            return None
        rows = torch.stack([torch.stack([p.loss, p.items, p.norm.double()]) for p in self._pending])
        rows[:, 0] = sum_over_ranks(rows[:, 0].contiguous())
        record: dict[str, Any] = {}
        waiting, self._pending = self._pending, []
        for pending, (loss, items, norm) in zip(waiting, rows.tolist(), strict=True):
            last = pending is waiting[-1]
            if self.deferred:
                self.guard.settle(norm)
                pending = replace(pending, skipped=self.guard.skipped)
            self.items += int(items)
            record = self._record(pending, loss, items, norm)
            if last:
                record |= self._metrics(record)
            logged = pending.step % self.config.log_every == 0 or self.length.reached(pending.step)
            if logged and not (hold and last):
                self._report(record)
        return record if hold else None

    def _metrics(self, record: Record) -> Mapping[str, float]:
        found, kind = self.objective.metrics(), type(self.objective).__name__
        if not isinstance(found, Mapping):
            raise TypeError(f"{kind}.metrics must return numbers by name, got {found!r:.60}")
        if taken := record.keys() & found.keys():
            raise ValueError(f"{kind}.metrics must leave these names to the loop: {', '.join(sorted(taken))}")
        return found

    def _record(self, pending: _Pending, loss: float, items: float, norm: float) -> dict[str, Any]:
        speed = items / pending.seconds
        record = {
            "step": pending.step,
            "loss": loss / max(items, 1),
            "items": self.items,
            "time": pending.time,
            "items_per_second": speed,
            "lr": pending.lr,
            "grad_norm": norm,
        }
        if self.flops:
            record["mfu"] = speed * self.flops / (self.policy.rate * self.world.size)
        if pending.skipped:
            record["skipped"] = pending.skipped
        if self.config.minutes is not None:
            record["steps"] = self.length.steps
            if not self.length.settled:
                record["seconds_left"] = max(0.0, 60 * self.config.minutes - pending.time)
        return record

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

        def batches() -> Iterator[Batch]:
            for batch in islice(validation(self.config.eval_batches), self.config.eval_batches):
                if stop.signal is not None and self.world.size == 1:
                    raise _InterruptedError
                yield _to(batch, self.policy.device)

        before = rng.snapshot()
        try:
            found = evaluate(evaluated, batches())
        except _InterruptedError:
            return
        finally:
            rng.restore(before)
            self.mesh.release(evaluated)
        self.best.update(self.step, found)
        self._metrics_of = {"step": self.step, **found}
        said = {} if self.best.step is None else {"best_step": self.best.step}
        self._report({**record, **found, **said})
        self._unevaluated = None
        self._saved = None  # a checkpoint that still asks for this evaluation is out of date


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _to(batch: Batch, device: torch.device) -> Batch:
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}
