"""From a configuration to a trained model in a run folder, and back from the folder to the model.

A run's components are found beside their configurations: for ``TransformerConfig`` the class ``Transformer`` of the
same module, for ``TextConfig`` the function ``open_text``. What an objective's constructor asks for beyond the model
and its own configuration is taken by name from the opened data (``byte_lengths``, say) or the loop's configuration
(``batches``), or is the trained objective of another run where its configuration has a
:class:`danlu.config.Pretrained` of that name. So a new model, objective or data set is used by naming its configuration
in a recipe, and nothing here changes.
"""

import dataclasses
import inspect
import json
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn
from torch.optim import Optimizer

from danlu import config as configs
from danlu.nn import balance
from danlu.optim import build_optimizers, schedule
from danlu.train import checkpoint, plan, rng
from danlu.train.component import component, opener
from danlu.train.device import Policy, choose
from danlu.train.distributed import World, barrier, broadcast, group, joined
from danlu.train.ema import averaged
from danlu.train.metrics import MetricsFile, Reporter, TensorBoard
from danlu.train.progress import ProgressLine, duration
from danlu.train.signals import Stop
from danlu.train.trainer import TrainConfig, Trainer
from danlu.usercode import UserCode

__all__ = ["RunConfig", "assemble", "evaluate", "load", "load_objective", "read_config", "restore", "resume", "train"]

# What may differ from the checkpoint's configuration on resume: it changes no number of the training.
_FREE = ("train.log_every", "train.checkpoint_every", "train.keep", "train.threads", "train.tensorboard")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that makes a run: the configurations of its components.

    Attributes:
        recipe: name of the recipe it came from.
        model: configuration of the network, e.g. ``TransformerConfig``.
        objective: of what is minimised, e.g. ``CausalLMConfig``.
        data: of the data, e.g. ``TextConfig``.
        optim: ``MuonConfig`` or ``AdamWConfig``.
        schedule: of the learning rate, e.g. ``WarmupStableDecay``.
        train: the loop.
    """

    recipe: str
    model: Any
    objective: Any
    data: Any
    optim: Any
    schedule: Any
    train: TrainConfig = TrainConfig()


@dataclass(frozen=True)
class Assembly:
    """The components of a run, made and fitted together; ``config`` is the configuration with the sizes fitted."""

    config: RunConfig
    data: Any
    model: nn.Module
    objective: Any
    optimizers: list[Optimizer]
    policy: Policy
    world: World


def assemble(config: RunConfig, world: World | None = None) -> Assembly:
    """Open the data and make model, objective and optimizers, seeded by ``config.train.seed``.

    The model's fields that the data's ``sizes`` name (a vocabulary, the size of images) take those values, known only
    once the data were read; a field that is 0 (no classes, say) is a choice and stays.

    Raises:
        ValueError, TypeError, OSError: a component refuses its configuration.
    """
    world = world or World()
    policy = choose(config.train.precision, device=config.train.device, threads=config.train.threads)
    policy.apply()
    data = opener(config.data)(config.data, seed=config.train.seed, rank=world.rank, world=world.size)
    sizes = {name: size for name, size in getattr(data, "sizes", {}).items() if getattr(config.model, name, 0)}
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **sizes))
    rng.seed_all(config.train.seed)
    model = component(config.model)(config.model)
    model.compute_dtype = policy.dtype
    objective = _objective(config, model, data).to(policy.device)
    optimizers = build_optimizers(objective, config.optim, process_group=group())
    balance.attach(model, optimizers[-1], summed_loss=objective)
    return Assembly(config, data, model, objective, optimizers, policy, world)


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
        FileExistsError: ``out`` holds something; it is left as it is.
        ValueError, TypeError, OSError, FloatingPointError: with a message for the person who started the run.
    """
    out = Path(out)
    console = Console(quiet=quiet)
    with joined(config.train.device) as world, Stop(patient=world.size > 1) as stop:
        out = Path(broadcast(str(out)))
        _refuse_existing(out, world)
        parts = assemble(config, world)
        if world.main:
            out.mkdir(parents=True, exist_ok=True)
            _write_once(out, parts)
            if code is not None:
                code.write(out)
            if not quiet:
                _say_plan(console, parts)
        barrier()
        return _fit(parts, out, console, stop, None)


def resume(path: Path | str, *, quiet: bool = False) -> int:
    """Go on with the run in the folder ``path`` from its newest whole checkpoint (from the start if it has none).

    On one process every number from there on is what the undisturbed run would have given, bit for bit.

    Returns:
        As :func:`train`.

    Raises:
        FileNotFoundError: ``path`` is no run folder.
        ValueError: its checkpoint is of another configuration (the keys are named), or the data have changed.
    """
    path = Path(path)
    config = read_config(path)
    console = Console(quiet=quiet)
    with joined(config.train.device) as world, Stop(patient=world.size > 1) as stop:
        newest = checkpoint.latest(path)
        saved = None if newest is None else checkpoint.load(newest)
        if saved is not None:
            _refuse_other(config, saved)
            if saved.step >= config.train.steps and saved.state["unevaluated"] is None:
                if world.main:
                    console.print(f"{path} is complete: {saved.step} of {config.train.steps} steps.", soft_wrap=True)
                return 0
        parts = assemble(config, world)
        _refuse_other_data(path, parts)
        if world.main:
            where = "its start: there is no whole checkpoint" if saved is None else f"step {saved.step}"
            console.print(f"Going on with {path} from {where}.", soft_wrap=True, highlight=False)
        return _fit(parts, path, console, stop, saved)


def load(path: Path | str) -> tuple[nn.Module, Any, RunConfig]:
    """Return the model of a run (its moving average if it keeps one), its tokenizer and its configuration.

    The model is in evaluation mode, on the device and in the arithmetic chosen for this machine. The tokenizer is None
    for data without one.

    Raises:
        FileNotFoundError: ``path`` is no run folder, or holds no whole checkpoint.
    """
    path = Path(path)
    config = read_config(path)
    policy = choose(config.train.precision, device=config.train.device, threads=config.train.threads)
    policy.apply()
    model: nn.Module = component(config.model)(config.model)
    model.compute_dtype = policy.dtype  # type: ignore[assignment]
    model.load_state_dict(_weights(path, "model."))
    tokenizer = None
    if (path / "tokenizer.json").exists():
        from danlu.data import load_tokenizer  # only text has one

        tokenizer = load_tokenizer(path / "tokenizer.json")
    return model.to(policy.device).eval(), tokenizer, config


def load_objective(path: Path | str) -> tuple[Any, RunConfig]:
    """Return the objective of a run with its trained weights (averaged ones if it keeps them), and its configuration.

    It is in evaluation mode, on the device and in the arithmetic chosen for this machine. What its constructor would
    take from the data or from other runs is left out: it can sample, but need not be able to train.

    Raises:
        FileNotFoundError: ``path`` is no run folder, or holds no whole checkpoint.
    """
    path = Path(path)
    config = read_config(path)
    policy = choose(config.train.precision, device=config.train.device, threads=config.train.threads)
    policy.apply()
    model = component(config.model)(config.model)
    model.compute_dtype = policy.dtype
    objective = component(config.objective)(model, config.objective)
    objective.load_state_dict(_weights(path, ""))
    return objective.to(policy.device).eval(), config


def restore(path: Path | str) -> Assembly:
    """Return the components of a run with the weights of :func:`load` and its data opened.

    Raises:
        FileNotFoundError: as :func:`load`.
        ValueError: the data have changed since.
    """
    path = Path(path)
    parts = assemble(read_config(path))
    _refuse_other_data(path, parts)
    parts.objective.load_state_dict(_weights(path, ""))
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
    found: dict[str, float] = parts.objective.evaluate(moved)
    return found


def read_config(path: Path | str) -> RunConfig:
    """Return the configuration of the run in ``path``.

    Raises:
        FileNotFoundError: no such folder, or no ``config.json`` in it.
        ValueError: the file is no configuration.
    """
    file = Path(path) / "config.json"
    if not file.is_file():
        what = f"it has no {file.name}" if Path(path).is_dir() else "no such folder"
        raise FileNotFoundError(f"{path} is not a run folder: {what}")
    return configs.loads(RunConfig, file.read_text(), name=str(file))


def _fit(parts: Assembly, out: Path, console: Console, stop: Stop, saved: checkpoint.Checkpoint | None) -> int:
    config = parts.config.train
    trainer = Trainer(
        parts.objective,
        parts.optimizers,
        [schedule(optimizer, parts.config.schedule, config.steps) for optimizer in parts.optimizers],
        parts.data.train,
        config,
        policy=parts.policy,
        validation=parts.data.validation,
        folder=out / "checkpoints",
        described=configs.to_document(parts.config),
        ema=None if config.ema is None else averaged(parts.objective, config.ema),
        flops=plan.training_flops(parts.model, parts.data),
    )
    if saved is not None:
        trainer.load_state_dict(saved.state)
    elif parts.world.rank:
        rng.seed_all(config.seed + 1_000_003 * parts.world.rank)  # the weights are equal, what is drawn is not
    if parts.world.main:
        trainer.reporters = _reporters(config, out, console, trainer.logged, _unit(parts.data))
    try:
        trainer.fit(stop)
    finally:
        for reporter in trainer.reporters:
            reporter.close()
    complete = trainer.step == config.steps and trainer.logged == trainer.step
    if parts.world.main:
        if not complete:
            console.print(
                f"Stopped after step {trainer.step} of {config.steps}; everything is saved. "
                f"Go on with: danlu resume {out}",
                soft_wrap=True,
                highlight=False,
            )
        else:
            console.print(
                f"Trained {config.steps} steps in {duration(trainer.seconds)}; the run is in {out}",
                soft_wrap=True,
                highlight=False,
            )
    # Of several processes the one that was asked to stop may be another.
    return 0 if complete else stop.exit_code or 128 + signal.SIGTERM


def _reporters(config: TrainConfig, out: Path, console: Console, after: int, unit: str) -> list[Reporter]:
    reporters: list[Reporter] = [MetricsFile(out / "metrics.jsonl", after=after)]
    if config.tensorboard:
        reporters.append(TensorBoard(out / "tensorboard", after=after))
    if not console.quiet:
        reporters.append(ProgressLine(config.steps, console, start=after, unit=unit))
    return reporters


def _unit(data: Any) -> str:
    """What the data consist of, in the plural: what an objective counts."""
    return str(getattr(data, "manifest", {}).get("unit", "tokens"))


def _objective(config: RunConfig, model: nn.Module, data: Any) -> Any:
    kind = component(config.objective)
    asked = list(inspect.signature(kind).parameters)[2:]
    given = {name: getattr(source, name) for source in (config.train, data) for name in asked if hasattr(source, name)}
    for name in asked:
        other = getattr(config.objective, name, None)
        if isinstance(other, configs.Pretrained):
            given[name], _ = load_objective(other.run)
    return kind(model, config.objective, **given)


def _refuse_existing(out: Path, world: World) -> None:
    if world.main and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is left as it is; choose another folder, or: danlu resume {out}")


def _refuse_other(config: RunConfig, saved: checkpoint.Checkpoint) -> None:
    lines = configs.differences(config, saved.config)
    lines = [line for line in lines if line.partition(":")[0] not in _FREE]
    if lines:
        raise ValueError(f"{saved.path} is of another configuration (now and then): {'; '.join(lines)}")


def _refuse_other_data(path: Path, parts: Assembly) -> None:
    file = path / "manifest.json"
    then = json.loads(file.read_text()) if file.is_file() else {}
    now = getattr(parts.data, "manifest", {})
    if "sha256" in then and then["sha256"] != now.get("sha256"):
        raise ValueError(
            f"the data of {path} have changed: {then.get('source', 'they')} had SHA-256 {then['sha256'][:12]}… "
            f"and has {str(now.get('sha256'))[:12]}… now"
        )


def _write_once(out: Path, parts: Assembly) -> None:
    """Write what describes the run and never changes."""
    (out / "config.json").write_text(configs.dumps(parts.config))
    manifest = getattr(parts.data, "manifest", None)
    if manifest is not None:
        (out / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    tokenizer = getattr(parts.data, "tokenizer", None)
    if tokenizer is not None:
        tokenizer.save(out / "tokenizer.json")


def _say_plan(console: Console, parts: Assembly) -> None:
    loader, device = parts.data.train, parts.policy.device
    position = loader.state_dict()
    batch = {key: value.to(device) for key, value in next(loader).items()}
    loader.load_state_dict(position)
    for line in plan.sentences(
        parts.config.train,
        model=parts.model,
        objective=parts.objective,
        optimizers=parts.optimizers,
        batch=batch,
        policy=parts.policy,
        processes=parts.world.size,
        flops=plan.training_flops(parts.model, parts.data),
        manifest=getattr(parts.data, "manifest", None),
    ):
        console.print(line, soft_wrap=True, highlight=False)


def _weights(path: Path, prefix: str) -> dict[str, Any]:
    """The newest weights of a run whose names begin with ``prefix``, without it; averaged ones if there are any."""
    newest = checkpoint.latest(path)
    if newest is None:
        raise FileNotFoundError(f"{path} holds no whole checkpoint yet")
    state = checkpoint.load(newest, parts=("objective", "ema")).state
    weights, prefix = (state["objective"], prefix) if state["ema"] is None else (state["ema"], "module." + prefix)
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
