"""From a configuration to a trained model in a run folder, and back from the folder to the model."""

import contextlib
import json
import shlex
import shutil
import signal
from pathlib import Path

from rich.console import Console

from danlu import config as configs
from danlu import objectives
from danlu.protocols import KeepsFiles, Objective, Reporter
from danlu.train import checkpoint, plan, rng
from danlu.train.assembly import Assembly, assemble
from danlu.train.best import Best, goal_of
from danlu.train.budget import Length
from danlu.train.config import RunConfig
from danlu.train.distributed import barrier, broadcast, init_distributed
from danlu.train.ema import averaged
from danlu.train.folder import claimed
from danlu.train.load import read_config, weights
from danlu.train.metrics import MetricsFile, TensorBoard
from danlu.train.progress import ProgressLine, duration
from danlu.train.signals import Stop
from danlu.train.together import agree
from danlu.train.trainer import Trainer
from danlu.usercode import UserCode, code_words

__all__ = ["evaluate", "restore", "resume", "train"]

# What may differ from the checkpoint's configuration on resume: it changes no number of the training.
_FREE = tuple(
    f"train.{name}"
    for name in (
        "log_every",
        "checkpoint_every",
        "keep",
        "keep_every",
        "keep_best",
        "stop_after",
        "async_save",
        "threads",
        "tensorboard",
    )
)


def train(config: RunConfig, out: Path | str, *, quiet: bool = False, code: UserCode | None = None) -> int:
    """Train a new run in the folder ``out``.

    Args:
        config: what to train.
        out: a folder that does not exist yet, or is empty.
        quiet: print nothing but errors.
        code: recorded in the folder: where components come from that are not danlu's.

    Returns:
        0 when the run is complete, 130 or 143 when it was interrupted and saved.

    Raises:
        FileExistsError: ``out`` holds something, or another process has claimed it; it is left as it is.
        ValueError, TypeError, OSError, FloatingPointError: with a message for the person who started the run.
    """
    out = Path(out)
    console = Console(quiet=quiet)
    configs.to_document(config)  # what could not be written is an error before anything is done
    with (
        init_distributed(config.train.device) as world,
        Stop(patient=world.size > 1) as stop,
        contextlib.ExitStack() as held,
    ):
        out = Path(broadcast(str(out)))
        made = not out.exists()
        if world.main:
            held.enter_context(claimed(out, new=True))
        trainer: Trainer | None = None
        try:
            agree(_options(config))
            with stop.at_once():
                parts = assemble(config, world)
            agree(_content(parts))
            # It tries the first batch: a model that does not fit the data is an error before anything is written.
            sentences = _plan(parts) if world.main and not quiet else []
            if world.main:
                _write_once(out, parts)
                if code is not None:
                    code.write(out)
                for line in sentences:
                    console.print(line, soft_wrap=True, highlight=False)
            barrier()
            trainer = _trainer(parts, out)
            return _fit(trainer, parts, out, console, stop)
        except BaseException:
            if world.main and (trainer is None or trainer.step == 0):
                _clear(out, made)  # nothing was trained: the corrected command can make it again
            raise


def resume(path: Path | str, *, quiet: bool = False) -> int:
    """Resume the run in the folder ``path`` from its newest complete checkpoint (from the start if it has none).

    On one process every number from there on is what the undisturbed run would have given, bit for bit.

    Returns:
        As :func:`train`.

    Raises:
        FileNotFoundError: ``path`` is no run folder.
        FileExistsError: another process trains in it.
        ValueError: its checkpoint is of another configuration (the keys are named), or the data have changed.
        CheckpointError: it has checkpoints, and all are damaged.
    """
    path = Path(path)
    config = read_config(path)
    console = Console(quiet=quiet)
    with (
        init_distributed(config.train.device) as world,
        Stop(patient=world.size > 1) as stop,
        contextlib.ExitStack() as held,
    ):
        if world.main:
            held.enter_context(claimed(path, new=False))
        agree(_options(config))
        saved = checkpoint.newest(path)
        if saved is not None:
            agree({"the step to resume from": str(saved.step), "the checkpoint": saved.sums})
            _check_config(config, saved)
            if why := _complete(config, saved):
                if world.main:
                    console.print(f"{path} is complete: {why}.", soft_wrap=True, highlight=False)
                return 0
        with stop.at_once():
            parts = assemble(config, world)
        _check_data(path, parts)
        agree(_content(parts))
        if world.main:
            where = "its start: there is no complete checkpoint" if saved is None else f"step {saved.step}"
            console.print(f"Resuming {path} from {where}.", soft_wrap=True, highlight=False)
        trainer = _trainer(parts, path)
        if saved is not None:
            trainer.restore(saved)
        return _fit(trainer, parts, path, console, stop)


def restore(path: Path | str) -> Assembly:
    """Return the components of a run with the weights of :func:`load` and its data opened.

    Raises:
        FileNotFoundError: as :func:`load`.
        ValueError: the data have changed since.
    """
    path = Path(path)
    parts = assemble(read_config(path))
    _check_data(path, parts)
    parts.objective.load_state_dict(weights(path, ""))
    parts.objective.eval()
    return parts


def evaluate(run: Path | str | Assembly, *, batches: int | None = None) -> dict[str, float]:
    """Evaluate a run's folder, or what :func:`restore` gave, on its validation data: all, or ``batches`` batches.

    Raises:
        FileNotFoundError, ValueError: as :func:`restore`.
    """
    parts = run if isinstance(run, Assembly) else restore(run)
    device = parts.policy.device
    moved = ({key: value.to(device) for key, value in batch.items()} for batch in parts.data.validation(batches))
    return objectives.evaluate(parts.objective, moved)


def _trainer(parts: Assembly, out: Path) -> Trainer:
    """The loop at its first step."""
    config = parts.config.train
    trainer = Trainer(
        parts.objective,
        parts.optimizer,
        parts.config.schedule,
        parts.data.train,
        config,
        policy=parts.policy,
        validation=parts.data.validation,
        folder=out / "checkpoints",
        described=configs.to_document(parts.config),
        ema=None if config.ema is None else averaged(parts.objective, config.ema),
        flops=plan.training_flops(parts.model, parts.data),
    )
    if parts.world.rank:
        rng.seed_all(config.seed + 1_000_003 * parts.world.rank)  # the weights are equal, what is drawn is not
    return trainer


def _fit(trainer: Trainer, parts: Assembly, out: Path, console: Console, stop: Stop) -> int:
    """Train from where the loop is and say how it ended; return the exit code."""
    main = parts.world.main
    if main:
        trainer.reporters = _reporters(parts, out, console, trainer)
    try:
        trainer.fit(stop)
    finally:
        for reporter in trainer.reporters:
            reporter.close()
    if main:
        if trainer.complete:
            said = f"Trained {trainer.step} steps in {duration(trainer.seconds)}; the run is in {out}"
            if trainer.best.exhausted:
                said = f"Stopped early: {trainer.best.sentence()}. {said}"
        else:
            again = shlex.join(["danlu", "resume", str(out), *code_words(out)])
            said = f"Stopped after step {trainer.step}; everything is saved. Continue with: {again}"
        console.print(said, soft_wrap=True, highlight=False)
    # Of several processes the one that was asked to stop may be another.
    return 0 if trainer.complete else stop.exit_code or 128 + signal.SIGTERM


def _reporters(parts: Assembly, out: Path, console: Console, trainer: Trainer) -> list[Reporter]:
    reporters: list[Reporter] = [MetricsFile(out / "metrics.jsonl", after=trainer.logged)]
    if parts.config.train.tensorboard:
        reporters.append(TensorBoard(out / "tensorboard", after=trainer.logged))
    if not console.quiet:
        objective: Objective = parts.objective
        reporters.append(
            ProgressLine(
                trainer.length.steps, console, start=trainer.logged, unit=objective.unit, labels=objective.labels
            )
        )
    return reporters


def _complete(config: RunConfig, saved: checkpoint.Found) -> str:
    """Why the run that was saved is complete, in a clause; empty if it is not."""
    state = saved.read(parts=("length", "unevaluated", "best")).state
    length = Length(config.train.steps, config.train.minutes, config.schedule)
    if state.get("length") is not None:
        length.load_state_dict(state["length"])
    best = Best(goal_of(config.train.keep_best, None), stop_after=config.train.stop_after)
    best.load_state_dict(state.get("best"))
    if state["unevaluated"] is not None:
        return ""
    if length.reached(saved.step):
        return f"all {saved.step} steps are trained"
    return f"it stopped early after step {saved.step}, {best.sentence()}" if best.exhausted else ""


def _options(config: RunConfig) -> dict[str, str]:
    """What all processes have to be started with."""
    options = {f"option {name}": str(value) for name, value in configs.flatten(config).items()}
    return {name: value for name, value in options.items() if name.removeprefix("option ") not in _FREE}


def _content(parts: Assembly) -> dict[str, str]:
    """What all processes have to read."""
    return {"the SHA-256 of the data": str(parts.data.manifest.get("sha256"))}


def _clear(out: Path, made: bool) -> None:
    """Remove what a run wrote into its folder, and the folder if it made it."""
    for path in out.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    if made:
        with contextlib.suppress(OSError):
            out.rmdir()


def _check_config(config: RunConfig, saved: checkpoint.Found) -> None:
    lines = configs.differences(config, saved.config)
    lines = [line for line in lines if line.partition(":")[0] not in _FREE]
    if lines:
        raise ValueError(
            f"{saved.path} was trained with another configuration (today's value and the checkpoint's): "
            f"{'; '.join(lines)}"
        )


def _check_data(path: Path, parts: Assembly) -> None:
    file = path / "manifest.json"
    then = json.loads(file.read_text()) if file.is_file() else {}
    now = parts.data.manifest
    if "sha256" in then and then["sha256"] != now.get("sha256"):
        raise ValueError(
            f"the data of {path} have changed: {then.get('source', 'they')} had SHA-256 {then['sha256'][:12]}… "
            f"and has {str(now.get('sha256'))[:12]}… now"
        )


def _write_once(out: Path, parts: Assembly) -> None:
    """Write what describes the run and never changes."""
    (out / "config.json").write_text(configs.dumps(parts.config))
    (out / "manifest.json").write_text(json.dumps(dict(parts.data.manifest), indent=2) + "\n")
    if isinstance(parts.data, KeepsFiles):
        parts.data.save(out)


def _plan(parts: Assembly) -> list[str]:
    """What the run is going to do, in sentences."""
    loader, device = parts.data.train, parts.policy.device
    position = loader.state_dict()
    batch = {key: value.to(device) for key, value in next(loader).items()}
    loader.load_state_dict(position)
    try:
        return plan.sentences(
            parts.config.train,
            model=parts.model,
            objective=parts.objective,
            optimizer=parts.optimizer,
            batch=batch,
            policy=parts.policy,
            processes=parts.world.size,
            flops=plan.training_flops(parts.model, parts.data),
            manifest=parts.data.manifest,
        )
    except KeyError as error:
        if error.args[:1] and error.args[0] not in batch:
            kind, data = type(parts.objective).__name__, type(parts.data).__name__
            raise ValueError(f"{kind} needs {error} in a batch, and {data} gives {', '.join(batch)}") from error
        raise
