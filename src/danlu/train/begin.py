"""How a run begins: in a new folder, again in its own, or with the weights of another run."""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from danlu import config as configs
from danlu.config.draft import Draft
from danlu.protocols import TakesTokenizer
from danlu.train import history
from danlu.train.assembly import Assembly
from danlu.train.change import FREE
from danlu.train.config import RunConfig
from danlu.train.folder import LOCK, claimed
from danlu.train.load import RunAt, find_checkpoint, nonfinite, read_config, run_at
from danlu.train.trainer import Trainer

__all__ = [
    "again",
    "begin",
    "clear",
    "encoded_alike",
    "independent",
    "load_weights",
    "located",
    "start_average",
    "started",
    "with_tokenizer",
]

_TOKENIZER = "tokenizer.json"


def started(out: Path) -> bool:
    """Whether a folder holds a run; what a process left that was killed before it had one is removed.

    Raises:
        FileExistsError: another process trains in it.
    """
    if (out / "config.json").is_file():
        return True
    if out.is_dir() and _never_began(out):
        with claimed(out, new=False):
            if not (out / "config.json").is_file() and _never_began(out):
                clear(out)
    return (out / "config.json").is_file()


def again(out: Path, config: RunConfig, init: Path | str | RunAt | None) -> RunConfig:
    """Return the configuration to continue a run with that was asked for again.

    Raises:
        ValueError: the folder holds another run; the keys that differ are named.
    """
    kept = read_config(out)
    asked = history.event(out, "train")
    then: Any = kept if asked is None else asked["config"]
    changed = configs.changes(config, then)
    differing = [line for line in configs.differences(config, then) if line.partition(":")[0] not in FREE]
    if init is not None:
        source = (history.event(out, "init") or {}).get("run")
        if source != os.path.abspath(run_at(init).folder):
            differing.append(f"init: {init} and {source}")
    if differing:
        raise ValueError(
            f"{out} holds a run of another configuration (asked for now and then): {'; '.join(differing)}; choose "
            f"another folder, or continue it as it is: danlu resume {out}"
        )
    draft = Draft.of(kept)
    for key in changed.keys() & FREE:
        draft.set(key, changed[key][0])
    built: RunConfig = draft.build()
    return built


def begin(out: Path, config: RunConfig) -> None:
    """Note in a new folder what was asked for."""
    history.add_event(out, "train", folder=os.path.abspath(out), config=configs.to_document(config))


def clear(out: Path) -> None:
    """Remove what a run that did not begin has written; what tells that it is one goes last, should this be killed."""
    for path in sorted(out.iterdir(), key=lambda path: history.FILE in path.name):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _never_began(out: Path) -> bool:
    """Whether a folder holds what a process wrote before its run had a configuration, the history first of all."""
    names = {path.name for path in out.iterdir()} - {LOCK}
    return history.FILE in names or (bool(names) and all(name.startswith(f".{history.FILE}.") for name in names))


def located(config: RunConfig, folder: Path) -> RunConfig:
    """Return a run's configuration with what was moved together with its folder found where it is now.

    A tokenizer that is gone is that of the folder.
    """
    made = history.event(folder, "train") or history.event(folder, "branch") or {}
    if "folder" in made:
        config = configs.moved_paths(config, made["folder"], os.path.abspath(folder))
    data, own = config.data, folder / _TOKENIZER
    if isinstance(data, TakesTokenizer) and data.tokenizer and not Path(data.tokenizer).exists() and own.is_file():
        config = replace(config, data=data.encoded_by(os.path.abspath(own)))
    return config


def encoded_alike(config: RunConfig, folder: Path, *, there: bool = True) -> RunConfig:
    """Return a configuration whose text is encoded by the tokenizer of the run in ``folder``, if it is ``there``."""
    own = folder / _TOKENIZER
    if not isinstance(config.data, TakesTokenizer) or (there and not own.is_file()):
        return config
    return replace(config, data=config.data.encoded_by(os.path.abspath(own)))


def with_tokenizer(config: RunConfig, source: RunAt) -> RunConfig:
    """Return a configuration whose text is encoded by the tokenizer of another run, unless it names one itself."""
    named = isinstance(config.data, TakesTokenizer) and config.data.tokenizer
    return config if named else encoded_alike(config, source.folder)


def independent(parts: Assembly, source: RunAt, out: Path) -> Assembly:
    """Return a new run's parts, configured by the tokenizer in its own folder instead of that of another run."""
    data = parts.config.data
    if not isinstance(data, TakesTokenizer) or data.tokenizer != os.path.abspath(source.folder / _TOKENIZER):
        return parts
    return replace(parts, config=encoded_alike(parts.config, out, there=False))


def load_weights(parts: Assembly, source: RunAt) -> dict[str, Any]:
    """Give a new run's model the weights of another run, averaged ones if it keeps them; return where they are from.

    Raises:
        FileNotFoundError: there is no such run, or it has no checkpoint.
        ValueError: the models, or the vocabularies, do not fit, or the weights are not finite.
    """
    theirs = read_config(source.folder)
    _same_vocabulary(parts.data.manifest, source.folder)
    found = find_checkpoint(source)
    if found is None:
        raise FileNotFoundError(f"{source.folder} holds no complete checkpoint yet")
    averaged = found.described["state"].get("ema") is not None
    part, prefix = ("ema", "module.model.") if averaged else ("objective", "model.")
    ours = parts.model.state_dict()
    state = found.read(parts=(part,), into={part: {prefix + name: value for name, value in ours.items()}}).state[part]
    given = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    misfits = _misfits(ours, given)
    if misfits:
        lines = configs.differences(parts.config.model, theirs.model)
        fit = f" What differs (here and there): {'; '.join(lines[:4])}." if lines else ""
        more = f" and {len(misfits) - 3} more" if len(misfits) > 3 else ""
        raise ValueError(
            f"the weights of {source} do not fit: {'; '.join(misfits[:3])}{more}.{fit} A model that fits: "
            f"danlu train RECIPE --config {source.folder / 'config.json'} --init {source}"
        )
    wrong = nonfinite(given)
    if wrong:
        raise ValueError(f"the weights of {source} are not finite ({wrong[0]}): that run has diverged")
    with torch.no_grad():
        for name, value in ours.items():
            if given[name] is not value:
                value.copy_(given[name])
    return history.origin(found, source.folder, averaged=averaged)


def start_average(trainer: Trainer) -> None:
    """Have the moving average of a new run begin at its weights."""
    if trainer.ema is not None:
        trainer.ema.module.load_state_dict(trainer.objective.state_dict())


def _same_vocabulary(manifest: Mapping[str, Any], folder: Path) -> None:
    file = folder / "manifest.json"
    theirs = json.loads(file.read_text()) if file.is_file() else {}
    ours, other = manifest.get("tokenizer_sha256"), theirs.get("tokenizer_sha256")
    if ours != other and None not in (ours, other):
        raise ValueError(
            f"the text is encoded by another tokenizer than that of {folder}: leave data.tokenizer out and its "
            f"vocabulary is taken, or give {folder / _TOKENIZER}"
        )


def _misfits(ours: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    """What keeps the weights from fitting, name by name."""
    missing = [f"{name} is not among them" for name in ours if name not in given]
    unknown = [f"there is no {name} here" for name in given if name not in ours]
    shapes = [
        f"{name} is {tuple(given[name].shape)} there and {tuple(value.shape)} here"
        for name, value in ours.items()
        if name in given and given[name].shape != value.shape
    ]
    return [*shapes, *missing, *unknown]
