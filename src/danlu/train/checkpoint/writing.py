"""Writing a checkpoint, by one process or by all: complete or not there.

Every process writes the shards that it holds into one file of its own, flushes it and takes its SHA-256; replicas are
written once, their work shared. The first process then writes ``state.json`` and ``SHA256SUMS`` and renames the folder.
"""

import contextlib
import errno
import io
import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from danlu.optim._sharded import local
from danlu.train.checkpoint.keeping import Goal, prune
from danlu.train.checkpoint.layout import (
    FORMAT,
    STATE,
    SUMS,
    CheckpointError,
    candidates,
    checkpoints,
    checksum,
    flush,
    free_name,
    remove,
    step_of,
    sweep,
)
from danlu.train.checkpoint.packing import pack
from danlu.train.distributed import world
from danlu.train.together import everyone, first

__all__ = ["Packed", "save", "write"]

_NUMBER = re.compile(r"os error (\d+)")  # how safetensors says what the system said


@dataclass(frozen=True)
class Packed:
    """State that is ready to be written.

    Attributes:
        tensors: by path, DTensors among them.
        held: what this process holds of each, the live memory or a copy of it.
        tree: the rest.
    """

    tensors: Mapping[str, Tensor]
    held: Mapping[str, Tensor]
    tree: Any

    @classmethod
    def of(cls, state: Any) -> "Packed":
        """Pack ``state`` without a copy."""
        tensors, tree = pack(state)
        return cls(tensors, {path: local(tensor) for path, tensor in tensors.items()}, tree)


def save(folder: Path, step: int, state: Any, **options: Any) -> Path:
    """Write ``folder/step-…`` and remove the checkpoints that need not stay; call it on all processes.

    Args:
        folder: the run's ``checkpoints`` folder; created if absent.
        step: optimizer steps done.
        state: what to keep; plain values and plain tensors are the first process's.
        options: as of :func:`write`.

    Returns:
        The folder written.

    Raises:
        CheckpointError: the disk is full or cannot be written; nothing that was there has changed.
        TypeError: the state holds something that is neither tensor nor plain.
    """
    return write(folder, step, Packed.of(state), **options)


def write(
    folder: Path,
    step: int,
    packed: Packed,
    *,
    config: Mapping[str, Any],
    keep: int,
    keep_every: int | None = None,
    goal: Goal | None = None,
    metrics: Mapping[str, Any] | None = None,
    group: Any = None,
) -> Path:
    """Write what was packed.

    Args:
        folder: as of :func:`save`.
        step: as of :func:`save`.
        packed: the state.
        config: the run's configuration as a tree, compared on resume.
        keep: checkpoints to keep, this one included.
        keep_every: further ones to keep: those of steps that it divides.
        goal: the best by it is kept too.
        metrics: numbers of the last evaluation, its ``step`` among them.
        group: of the processes; None for all.

    Returns:
        The folder written.
    """
    size = world().size

    def prepare() -> tuple[str, str, list[str]]:
        final = free_name(folder, step)
        temporary = folder / f".{final.name}.{os.getpid()}.tmp"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            sweep(folder)
            temporary.mkdir()
        except OSError as error:
            raise _explained(error, final, folder) from error
        return final.name, temporary.name, list(packed.tensors)

    def shards() -> dict[str, tuple[int, str]]:
        """Write this process's file; return size and SHA-256 of each, by name."""
        before = set(temporary.iterdir()) if size == 1 else None
        tensors = {path: packed.tensors[path] for path in paths if path in packed.tensors}
        if not world().main:
            tensors = {path: tensor for path, tensor in tensors.items() if isinstance(tensor, DTensor)}
        try:
            _write_tensors(temporary, tensors, packed.held, group)
            mine = temporary.glob(f"shard-{world().rank + 1:05d}-*") if before is None else temporary.iterdir()
            sums = {path.name: (path.stat().st_size, checksum(path)) for path in sorted(mine)}
            for name in sums:
                flush(temporary / name)
        except (Exception, CheckpointException) as error:  # the latter is no Exception
            raise _explained(error, final, folder) from error
        return sums

    def publish() -> None:
        sums = {name: entry for part in written for name, entry in part.items()}
        lacking = [name for name, (length, _) in sums.items() if not _has(temporary / name, length)]
        if lacking:
            raise CheckpointError(f"{lacking[0]} of another process is not in {temporary}: the folder must be shared")
        described = {
            "format": FORMAT,
            "step": step,
            "config": config,
            "processes": size,
            "metrics": None if metrics is None else {key: _finite(value) for key, value in metrics.items()},
            "goal": None if goal is None else asdict(goal),
            "files": {name: length for name, (length, _) in sums.items()},
            "state": packed.tree,
        }
        try:
            (temporary / STATE).write_text(json.dumps(described, allow_nan=False))
            digests = {STATE: checksum(temporary / STATE), **{name: digest for name, (_, digest) in sums.items()}}
            (temporary / SUMS).write_text("".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items())))
            flush(temporary / STATE)
            flush(temporary / SUMS)
            flush(temporary)
            os.rename(temporary, final)
            flush(folder)
        except OSError as error:
            raise _explained(error, final, folder) from error

    options: dict[str, Any] = {"group": group, "error": CheckpointError}
    chosen = first(prepare, **options)
    final, temporary, paths = folder / chosen[0], folder / chosen[1], chosen[2]
    try:
        written = everyone(shards, **options)
        first(publish, **options)
    except BaseException:
        if world().main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise

    def clear() -> None:
        try:
            for path in candidates(folder):
                if step_of(path) == step and path != final:
                    remove(path)
            prune(folder, last=keep, every=keep_every, goal=goal)
        except OSError as error:
            raise CheckpointError(
                f"{final} was written; one that it replaces could not be removed ({error})"
            ) from error

    first(clear, **options)
    return final


class _Held(DefaultSavePlanner):
    """Plans by the tensors, and gives what this process holds of them to be written."""

    def __init__(self, held: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.held = held

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self.held[write_item.index.fqn]


class _Writer(HuggingFaceStorageWriter):
    """Writes a process's file straight from memory: neither a second copy of it nor Python's lock is held meanwhile."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        shard = plan.storage_data.get("shard_index")
        name = ("" if shard is None else f"shard-{shard:05d}-") + "model-00001-of-00001.safetensors"
        done: Future[list[WriteResult]] = Future()
        tensors = {item.index.fqn: _tensor(planner.resolve_data(item)) for item in plan.items}
        offsets = {item.index.fqn: {"saved_offsets": list(_chunk(item).offsets)} for item in plan.items}
        if tensors:
            described = {"DCP_SHARDING_INFO": json.dumps(offsets), "DCP_VERSION": "1.0", "format": "pt"}
            save_file(tensors, str(Path(self.path) / name), metadata=described)
        done.set_result(
            [
                WriteResult(item.index, tensor.nbytes, SimpleNamespace(relative_path=name, length=tensor.nbytes))
                for item, tensor in zip(plan.items, tensors.values(), strict=True)
            ]
        )
        return done


def _tensor(data: Tensor | io.BytesIO) -> Tensor:
    if not isinstance(data, Tensor):
        raise TypeError(f"a checkpoint's files hold tensors, got {type(data).__name__}")
    return data.cpu()


def _chunk(item: WriteItem) -> ChunkStorageMetadata:
    if item.tensor_data is None:
        raise TypeError(f"{item.index.fqn} is no tensor")
    return item.tensor_data.chunk


def _write_tensors(folder: Path, tensors: Mapping[str, Tensor], held: Mapping[str, Tensor], group: Any) -> None:
    several = world().size > 1
    writer = _Writer(str(folder), save_distributed=several)
    with _quiet():
        save_tensors(
            dict(tensors), storage_writer=writer, planner=_Held(held), process_group=group, no_dist=not several
        )


def _has(path: Path, length: int) -> bool:
    return path.is_file() and path.stat().st_size == length


def _explained(error: BaseException, final: Path, folder: Path) -> Exception:
    """Turn a failed write into one sentence; programming errors stay what they are."""
    causes: list[BaseException] = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    failures = getattr(error, "failures", {})
    causes += [entry[0] if isinstance(entry, tuple) else entry for entry in failures.values()]
    system = next((cause for cause in causes if isinstance(cause, OSError)), None)
    number = next((int(m[1]) for cause in causes if (m := _NUMBER.search(str(cause)))), None)
    number = number if system is None else system.errno
    if system is None and number is None:
        return error if isinstance(error, Exception) else RuntimeError(str(causes[-1]))
    left = checkpoints(folder)
    kept = f"the checkpoint {left[-1].name} is intact" if left else "no earlier checkpoint exists"
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return CheckpointError(f"no space left on the disk to save {final}; {kept}")
    return CheckpointError(f"{final} could not be written ({system or os.strerror(number or 0)}); {kept}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the remark that no process group is in use: that is the intention here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed is (disabled|unavailable).*")
        yield


def _finite(value: Any) -> Any:
    """A number as JSON may hold it: None for one that is not finite."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
