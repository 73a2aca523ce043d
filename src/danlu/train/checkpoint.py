"""Checkpoints that are complete or not there, readable without unpickling anything.

A checkpoint is a folder ``step-00000100``: the tensors, written by torch.distributed.checkpoint as safetensors,
``state.json``, which holds everything else and says where each tensor belongs, and ``SHA256SUMS`` of these files, which
``sha256sum -c`` reads and every load checks. It is written under a temporary name, flushed to the disk, and only then
renamed: whatever interrupts a save, the previous checkpoint stays.

State is nested dictionaries, lists and tuples of tensors and plain values, as ``state_dict`` methods return it.
"""

import contextlib
import errno
import hashlib
import json
import logging
import math
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "checkpoints",
    "latest",
    "load",
    "load_latest",
    "pack",
    "plain_groups",
    "save",
    "unpack",
]

_LOG = logging.getLogger(__name__)
_FORMAT = 2
_WITHOUT_SUMS = 1
"""The format of release 0.1, whose files have no checksums."""
_NAME = re.compile(r"step-(\d{8,})(?:\.(\d+))?")
_STATE, _SUMS = "state.json", "SHA256SUMS"


class CheckpointError(OSError):
    """A checkpoint could not be written or read; the message says what is left."""


@dataclass(frozen=True)
class Checkpoint:
    """What was read: the step it was taken after, the run's configuration then, and the state."""

    path: Path
    step: int
    config: dict[str, Any]
    state: dict[str, Any]


def pack(state: Any) -> tuple[dict[str, Tensor], Any]:
    """Separate the tensors of ``state`` from the rest: ``(tensors by path, JSON tree with their places)``.

    Raises:
        TypeError: a value is neither a tensor nor plain.

    >>> tensors, tree = pack({"step": 3, "weight": torch.zeros(2)})
    >>> list(tensors), tree
    (['weight'], {'step': 3, 'weight': {'$tensor': 'weight', 'shape': [2]}})
    """
    tensors: dict[str, Tensor] = {}
    places: dict[tuple[Any, ...], str] = {}  # tied weights are one tensor under two names
    storages: set[int] = set()

    def place(tensor: Tensor, path: str) -> str:
        identity = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel() and identity in places:
            return places[identity]
        if path in tensors:
            raise TypeError(f"two tensors of the state share the path {path!r}")
        # A scalar is kept as one element: not every reader of the file format slices zero dimensions.
        kept = tensor.reshape(1) if tensor.dim() == 0 else tensor.contiguous()
        storage = kept.untyped_storage().data_ptr()
        tensors[path] = kept.clone() if storage in storages else kept  # the file format takes no overlapping memory
        storages.add(storage)
        places[identity] = path
        return path

    def walk(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            return {"$tensor": place(value.detach(), path), "shape": list(value.shape)}
        if isinstance(value, float) and not math.isfinite(value):
            return {"$float": repr(value)}
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, Mapping):
            if all(isinstance(key, str) and not key.startswith("$") for key in value):
                return {key: walk(item, _join(path, key)) for key, item in value.items()}
            return {"$dict": [[walk(key, path), walk(item, _join(path, key))] for key, item in value.items()]}
        if isinstance(value, (list, tuple)):
            items = [walk(item, _join(path, i)) for i, item in enumerate(value)]
            return {"$tuple": items} if isinstance(value, tuple) else items
        raise TypeError(f"state {path!r} must hold tensors and plain values, got {type(value).__name__}")

    tree = walk(state, "")
    return tensors, tree


def unpack(tensors: Mapping[str, Tensor], tree: Any) -> Any:
    """Put together what :func:`pack` separated."""
    if isinstance(tree, list):
        return [unpack(tensors, item) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if "$tensor" in tree:
        return tensors[tree["$tensor"]].reshape(tree["shape"])
    if "$float" in tree:
        return float(tree["$float"])
    if "$tuple" in tree:
        return tuple(unpack(tensors, item) for item in tree["$tuple"])
    if "$dict" in tree:
        return {unpack(tensors, key): unpack(tensors, item) for key, item in tree["$dict"]}
    return {key: unpack(tensors, item) for key, item in tree.items()}


def save(folder: Path, step: int, state: Any, *, config: Mapping[str, Any], keep: int) -> Path:
    """Write ``folder/step-…`` and remove all but the last ``keep`` checkpoints; call it on one process only.

    Args:
        folder: the run's ``checkpoints`` folder; created if absent.
        step: optimizer steps done.
        state: what to keep.
        config: the run's configuration as a tree, compared on resume.
        keep: checkpoints to keep, this one included.

    Returns:
        The folder written.

    Raises:
        CheckpointError: the disk is full or cannot be written; nothing that was there has changed.
        TypeError: the state holds something that is neither tensor nor plain.
    """
    final = _free_name(folder, step)
    temporary = folder / f".{final.name}.{os.getpid()}.tmp"
    tensors, tree = pack(state)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        temporary.mkdir()
        with _quiet():
            save_tensors(tensors, storage_writer=HuggingFaceStorageWriter(str(temporary)), no_dist=True)
        files = {path.name: path.stat().st_size for path in sorted(temporary.iterdir())}
        described = {"format": _FORMAT, "step": step, "config": config, "files": files, "state": tree}
        (temporary / _STATE).write_text(json.dumps(described, allow_nan=False))
        sums = {path.name: _sha256(path) for path in sorted(temporary.iterdir())}
        (temporary / _SUMS).write_text("".join(f"{digest}  {name}\n" for name, digest in sums.items()))
        for path in temporary.iterdir():
            _flush(path)
        _flush(temporary)
        os.rename(temporary, final)
        _flush(folder)
    except (Exception, CheckpointException) as error:  # the latter is no Exception
        shutil.rmtree(temporary, ignore_errors=True)
        raise _explained(error, final, folder) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    replaced = [path for path in folder.glob(f"step-{step:08d}*") if path != final]
    for path in replaced + [path for path in checkpoints(folder) if path not in replaced][:-keep]:
        _remove(path)
    return final


def checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints in ``folder``, oldest first; what is half written or damaged is passed over."""
    if not folder.is_dir():
        return []
    found = [(int(m[1]), int(m[2] or 0), path) for path in folder.iterdir() if (m := _NAME.fullmatch(path.name))]
    return [path for *_, path in sorted(found) if _described(path) is not None]


def latest(run: Path) -> Path | None:
    """Return the newest complete checkpoint of a run folder, or None."""
    found = checkpoints(Path(run) / "checkpoints")
    return found[-1] if found else None


def load_latest(run: Path, *, parts: Sequence[str] | None = None) -> Checkpoint | None:
    """Read the newest checkpoint of a run folder that is whole; None where there is none of any kind.

    A damaged one is named in a warning of the logger, and the one before it read.

    Raises:
        CheckpointError: all of them are damaged.
    """
    damaged: CheckpointError | None = None
    for path in reversed(checkpoints(Path(run) / "checkpoints")):
        try:
            saved = load(path, parts=parts)
        except CheckpointError as error:
            _LOG.warning("%s; the checkpoint before it is used", error)
            damaged = error
        else:
            return saved
    if damaged is not None:
        raise CheckpointError(f"no checkpoint of {run} can be read; {damaged}")
    return None


def load(path: Path, *, parts: Sequence[str] | None = None) -> Checkpoint:
    """Read a checkpoint, or only the named top-level ``parts`` of its state; its tensors are on the CPU.

    Raises:
        CheckpointError: it is incomplete or damaged.
    """
    described = _described(path)
    if described is None:
        raise CheckpointError(f"{path} is no complete checkpoint: {_STATE}, or a file that it names, is missing or cut")
    _verify(path, described)
    reader = HuggingFaceStorageReader(str(path))
    tree = described["state"]
    if parts is not None:
        tree = {name: tree[name] for name in parts if name in tree}
    wanted = set(_places(tree))
    try:
        with _quiet():
            metadata = reader.read_metadata().state_dict_metadata
            tensors: dict[str, Tensor] = {
                key: torch.empty(entry.size, dtype=entry.properties.dtype)  # type: ignore[union-attr]
                for key, entry in metadata.items()
                if key in wanted
            }
            load_tensors(tensors, storage_reader=reader, no_dist=True)
        state = unpack(tensors, tree)
    except (Exception, CheckpointException) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return Checkpoint(path, described["step"], described["config"], state)


def plain_groups(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return an optimizer's state without the settings that are no plain values: the configuration gives those again.

    >>> plain_groups({"state": {}, "param_groups": [{"lr": 0.1, "dtype": torch.float32, "params": [0]}]})
    {'state': {}, 'param_groups': [{'lr': 0.1, 'params': [0]}]}
    """
    groups = [{key: value for key, value in group.items() if _is_plain(value)} for group in state["param_groups"]]
    return {**state, "param_groups": groups}


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str, Tensor))


def _places(tree: Any) -> Iterator[str]:
    """The paths of the tensors that belong in a packed tree."""
    if isinstance(tree, list):
        for item in tree:
            yield from _places(item)
    elif isinstance(tree, dict):
        if "$tensor" in tree:
            yield tree["$tensor"]
        else:
            yield from _places(list(tree.values()))


def _join(path: str, key: Any) -> str:
    return f"{path}/{key}" if path else str(key)


def _described(path: Path) -> dict[str, Any] | None:
    """The contents of ``state.json`` if every file it names is there at its full size, else None."""
    try:
        described: dict[str, Any] = json.loads((path / _STATE).read_text())
        if described["format"] not in (_FORMAT, _WITHOUT_SUMS):
            return None
        complete = all((path / name).stat().st_size == size for name, size in described["files"].items())
        complete = complete and (described["format"] == _WITHOUT_SUMS or (path / _SUMS).is_file())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return described if complete else None


def _verify(path: Path, described: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless the files are those that were written, for this step."""
    name = _NAME.fullmatch(path.name)
    if name is not None and int(name[1]) != described["step"]:
        raise CheckpointError(f"{path} is damaged: {_STATE} is of step {described['step']}")
    if described["format"] == _WITHOUT_SUMS:
        return
    try:
        lines = (path / _SUMS).read_text().splitlines()
        sums = {file: digest for digest, _, file in (line.partition("  ") for line in lines)}
        wrong = [file for file in (*described["files"], _STATE) if sums.get(file) != _sha256(path / file)]
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if wrong:
        raise CheckpointError(f"{path} is damaged: {wrong[0]} is not what {_SUMS} says")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _free_name(folder: Path, step: int) -> Path:
    """``step-00000100``, with a number behind it where the step was saved before: that stays until this is complete."""
    final, number = folder / f"step-{step:08d}", 0
    while final.exists():
        number += 1
        final = folder / f"step-{step:08d}.{number}"
    return final


def _flush(path: Path) -> None:
    """Have the system write ``path`` to the disk before anything that comes after."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    """Take a checkpoint's name away before its files, so that it is never half there under its name."""
    doomed = path.with_name(f".{path.name}.{os.getpid()}.tmp-old")
    os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _sweep(folder: Path) -> None:
    """Remove what an interrupted save or removal left."""
    for path in [*folder.glob(".step-*.tmp"), *folder.glob(".step-*.tmp-old")]:
        shutil.rmtree(path, ignore_errors=True)


def _explained(error: BaseException, final: Path, folder: Path) -> BaseException:
    """Turn a failed write into one sentence; programming errors stay what they are."""
    causes: list[BaseException] = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    failures = getattr(error, "failures", {})
    causes += [entry[0] if isinstance(entry, tuple) else entry for entry in failures.values()]
    system = next((cause for cause in causes if isinstance(cause, OSError)), None)
    full = any("No space left" in str(cause) for cause in causes)
    if system is None and not full:
        return error
    left = checkpoints(folder)
    kept = f"the checkpoint {left[-1].name} is intact" if left else "no earlier checkpoint exists"
    if full or (system is not None and system.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)):
        return CheckpointError(f"no space left on the disk to save {final}; {kept}")
    return CheckpointError(f"{final} could not be written ({system}); {kept}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the remark that no process group is in use: that is the intention here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed is (disabled|unavailable).*")
        yield
