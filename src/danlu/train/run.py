"""From a configuration to a trained model in a run folder, and back from the folder to the model."""

import contextlib
import json
import shlex
import signal
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from danlu import config as configs
from danlu import objectives
from danlu.protocols import KeepsFiles, Objective, Paced, Reporter
from danlu.train import checkpoint, plan, rng
from danlu.train.assembly import Assembly, assemble, distribute, prepare
from danlu.train.begin import (
    again,
    begin,
    clear,
    encoded_alike,
    independent,
    load_weights,
    located,
    start_average,
    started,
    with_tokenizer,
)
from danlu.train.best import Best, goal_of
from danlu.train.budget import Length
from danlu.train.change import LENGTH, Going, allowed, check_saved, going_on, set_aside
from danlu.train.checkpoint.layout import sweep
from danlu.train.config import RunConfig
from danlu.train.distributed import barrier, init_distributed, world
from danlu.train.folder import claimed, write_whole
from danlu.train.history import add_event, event
from danlu.train.load import RunAt, find_checkpoint, read_config, run_at, weights
from danlu.train.metrics import MetricsFile, TensorBoard
from danlu.train.progress import ProgressLine, duration
from danlu.train.signals import Stop
from danlu.train.together import agree, first
from danlu.train.trainer import Trainer
from danlu.usercode import UserCode, code_words

__all__ = ["evaluate", "restore", "resume", "train"]


def train(
    config: RunConfig,
    out: Path | str,
    *,
    quiet: bool = False,
    code: UserCode | None = None,
    init: Path | str | RunAt | None = None,
    restartable: bool = False,
) -> int:
    """Train a new run in the folder ``out``.

    Args:
        config: what to train; relative paths in it are made absolute.
        out: a folder that does not exist yet, or is empty.
        quiet: print nothing but errors.
        code: recorded in the folder: where components come from that are not danlu's.
        init: another run, or a checkpoint of it (:func:`danlu.train.load.run_at`), whose weights this one begins with,
            averaged ones if it keeps them. A text is encoded with its tokenizer unless ``config`` names one.
        restartable: continue the run if the folder holds it already, so that the same call can be made again after
            whatever ended it.

    Returns:
        0 when the run is complete, 130 or 143 when it was interrupted and saved.

    Raises:
        FileExistsError: ``out`` holds something, or another process has claimed it; it is left as it is.
        ValueError, TypeError, OSError, FloatingPointError: with a message for the person who started the run.
    """
    out, config = Path(out), configs.absolute_paths(config)
    configs.to_document(config)  # what could not be written is an error before anything is done
    with init_distributed(config.train.device):
        out = Path(first(lambda: str(out)))
        if restartable and first(lambda: started(out)):
            return resume(out, config=first(lambda: again(out, config, init)), quiet=quiet)
        return _train(config, out, Console(quiet=quiet), code, None if init is None else run_at(init))


def _train(config: RunConfig, out: Path, console: Console, code: UserCode | None, init: RunAt | None) -> int:
    place = world()
    with Stop(patient=place.size > 1) as stop, contextlib.ExitStack() as held:
        made = not out.exists()
        first(lambda: _claim(held, out, new=True))
        trainer: Trainer | None = None
        try:
            agree(_options(config))
            config.train.parallel.grid(place.size)
            with stop.at_once():
                parts = prepare(config if init is None else with_tokenizer(config, init), place)
                source = None if init is None else load_weights(parts, init)
                parts = parts if init is None else independent(parts, init, out)
            agree(_content(parts))
            # It tries the first batch: a model that does not fit the data is an error before anything is written.
            sentences = _plan(parts) if place.main and not console.quiet else []
            if place.main:
                begin(out, config)
                _write_once(out, parts, source)
                if code is not None:
                    code.write(out)
                for line in sentences:
                    console.print(line, soft_wrap=True, highlight=False)
            barrier()
            parts = distribute(parts)
            trainer = _trainer(parts, out)
            if init is not None:
                start_average(trainer)
                trainer.save()
                trainer.saver.wait()  # from now on the other run is not needed
            first(lambda: write_whole(out / "config.json", configs.dumps(parts.config)))
            return _fit(trainer, parts, out, console, stop)
        except BaseException:
            if place.main and (trainer is None or trainer.step == 0):
                _clear(out, made)  # nothing was trained: the corrected command can make it again
            raise


def resume(path: Path | str | RunAt, *, config: RunConfig | None = None, quiet: bool = False) -> int:
    """Resume the run in the folder ``path`` from its newest complete checkpoint (from the start if it has none).

    On one process every number from there on is what the undisturbed run would have given, bit for bit.

    Args:
        path: the folder; with ``@600`` the run goes on from its checkpoint of that step, and what came after is moved
            to ``earlier/N`` in the folder.
        config: the run's configuration with other values of what may change: the length (``train.steps``,
            ``train.minutes``), how often things are logged, evaluated and kept, and where the data are.
        quiet: print nothing but errors.

    Returns:
        As :func:`train`.

    Raises:
        FileNotFoundError: ``path`` is no run folder.
        FileExistsError: another process trains in it.
        ValueError: its checkpoint is of another configuration, or ``config`` changes what would make it another run
            (the keys are named), or the data have changed.
        CheckpointError: it has checkpoints, and all are damaged.
    """
    at = run_at(path)
    folder = at.folder
    kept = read_config(folder)
    wanted = kept if config is None else configs.absolute_paths(config)
    console = Console(quiet=quiet)
    with (
        init_distributed(kept.train.device) as place,
        Stop(patient=place.size > 1) as stop,
        contextlib.ExitStack() as held,
    ):
        first(lambda: _claim(held, folder, new=False))
        agree(_options(wanted))
        wanted.train.parallel.grid(place.size)
        saved = find_checkpoint(at)
        changed = first(lambda: allowed(folder, kept, wanted))
        going = None
        if saved is not None:
            agree({"the step to resume from": str(saved.step), "the checkpoint": saved.sums})
            check_saved(folder, kept, saved)
            found = saved
            going = first(lambda: going_on(at, found, kept, wanted))
            if going.step != saved.step:
                saved = find_checkpoint(RunAt(folder, going.step))
            elif going.steps is None and (why := _complete(wanted, saved)):
                if place.main:
                    sweep(folder / "checkpoints")
                    console.print(f"{folder} is complete: {why}.", soft_wrap=True, highlight=False)
                return 0
        elif source := first(lambda: event(folder, "init")):
            raise ValueError(f"{folder} began with the weights of {source['run']} and has no checkpoint left")
        with stop.at_once():
            parts = assemble(located(wanted, folder), place)
        _check_data(folder, parts)
        agree(_content(parts))
        if changed or (going is not None and at.at != "last"):
            first(lambda: _change(folder, parts, changed, going))
        if place.main:
            _restore_files(folder, parts)
            where = "its start: there is no complete checkpoint" if saved is None else f"step {saved.step}"
            for line in (f"Resuming {folder} from {where}.", *(going.said if going else ())):
                console.print(line, soft_wrap=True, highlight=False)
            if going is not None and going.steps is not None and isinstance(parts.objective, Paced):
                console.print("Its objective depends on the length of the run, and has followed the old one so far.")
        trainer = _trainer(parts, folder)
        if saved is not None:
            trainer.restore(saved)
            if going is not None and going.steps is not None:  # a budget is counted anew
                trainer.length.load_state_dict({"steps": going.steps, "settled": False})
            if LENGTH & configs.changes(wanted, saved.config).keys():
                # A rate that was due under the old length becomes that of the new one, also if a kill came between.
                trainer.scheduler.last_epoch -= 1
                trainer.scheduler.step()
        return _fit(trainer, parts, folder, console, stop)


def restore(path: Path | str | RunAt, *, config: RunConfig | None = None) -> Assembly:
    """Return the components of a run with the weights of :func:`load` and its data opened.

    Args:
        path: a run folder, or a checkpoint of it.
        config: the run's configuration with other data, which a text's tokenizer encodes as it did the run's own; None
            for the run's own data.

    Raises:
        FileNotFoundError: as :func:`load`.
        ValueError: the data have changed since, or other ones do not fit the model.
    """
    at = run_at(path)
    kept = read_config(at)
    # The averages are weights like others here: there is nothing to average.
    kept = replace(kept, train=replace(kept.train, ema=None))
    if config is None:
        parts = prepare(located(kept, at.folder))
        _check_data(at.folder, parts)
    else:
        parts = prepare(encoded_alike(config, at.folder))
        lines = configs.differences(parts.config.model, kept.model)
        if lines:
            raise ValueError(f"the data do not fit the model of {at.folder} (theirs and its): {'; '.join(lines)}")
    parts.objective.load_state_dict(weights(at, ""))
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
        ema=parts.ema,
        flops=plan.training_flops(parts.model, parts.data),
        mesh=parts.mesh,
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
    """What all processes have to be started with; machines may have different numbers of processors."""
    return {f"option {name}": str(value) for name, value in configs.flatten(config).items() if name != "train.threads"}


def _content(parts: Assembly) -> dict[str, str]:
    """What all processes have to read."""
    return {"the SHA-256 of the data": str(parts.data.manifest.get("sha256"))}


def _claim(held: contextlib.ExitStack, folder: Path, *, new: bool) -> None:
    held.enter_context(claimed(folder, new=new))


def _change(folder: Path, parts: Assembly, changed: Mapping[str, tuple[Any, Any]], going: Going | None) -> None:
    """Write down what a run goes on with, having put aside what came after the step that it goes on from."""
    step = 0 if going is None else going.step
    add_event(folder, "resume", step=step, changed={key: list(values) for key, values in changed.items()})
    set_aside(folder, step)
    write_whole(folder / "config.json", configs.dumps(parts.config))


def _clear(out: Path, made: bool) -> None:
    """Remove what a run wrote into its folder, and the folder if it made it."""
    clear(out)
    if made:
        with contextlib.suppress(OSError):
            out.rmdir()


def _check_data(path: Path, parts: Assembly) -> None:
    file = path / "manifest.json"
    then = json.loads(file.read_text()) if file.is_file() else {}
    now = parts.data.manifest
    if "sha256" in then and then["sha256"] != now.get("sha256"):
        raise ValueError(
            f"the data of {path} have changed: {then.get('source', 'they')} had SHA-256 {then['sha256'][:12]}… "
            f"and {now.get('source', 'they')} has {str(now.get('sha256'))[:12]}… now"
        )


def _write_once(out: Path, parts: Assembly, source: Mapping[str, Any] | None) -> None:
    """Write what describes the run and never changes."""
    if source is not None:
        add_event(out, "init", **source)
    _restore_files(out, parts)


def _restore_files(folder: Path, parts: Assembly) -> None:
    """Write those files that describe the data which the folder lacks."""
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        write_whole(manifest, json.dumps(dict(parts.data.manifest), indent=2) + "\n")
    if isinstance(parts.data, KeepsFiles):
        with tempfile.TemporaryDirectory(dir=folder, prefix=".") as scratch:
            parts.data.save(Path(scratch))
            for path in Path(scratch).iterdir():
                if not (folder / path.name).exists():
                    path.rename(folder / path.name)


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
