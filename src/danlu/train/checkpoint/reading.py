"""Reading a checkpoint: checked, by any number of processes, each of which reads what it needs."""

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors

from danlu.train.checkpoint.layout import SUMS, CheckpointError, candidates, checksum, damage, described
from danlu.train.checkpoint.packing import places, targets, unpack
from danlu.train.distributed import world
from danlu.train.together import everyone, first

__all__ = ["Checkpoint", "Found", "load", "load_latest", "newest"]

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """What was read: the step it was taken after, the run's configuration then, and the state."""

    path: Path
    step: int
    config: dict[str, Any]
    state: dict[str, Any]


@dataclass(frozen=True)
class Found:
    """A checkpoint whose files were checked.

    Attributes:
        path: its folder.
        described: what its ``state.json`` says.
    """

    path: Path
    described: dict[str, Any] = field(repr=False)

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(self.described["step"])

    @property
    def config(self) -> dict[str, Any]:
        """The run's configuration then."""
        return dict(self.described["config"])

    @property
    def sums(self) -> str:
        """SHA-256 of the checksums: two checkpoints that have it in common are the same."""
        file = self.path / SUMS
        return checksum(file) if file.is_file() else ""

    def read(self, *, parts: Sequence[str] | None = None, into: Any = None) -> Checkpoint:
        """Read the state, or only some ``parts``; as :func:`load`."""
        tree = self.described["state"]
        if parts is not None:
            tree = {name: tree[name] for name in parts if name in tree}
        try:
            state = unpack(_tensors(self.path, tree, into), tree)
        except (Exception, CheckpointException) as error:
            raise CheckpointError(f"{self.path} cannot be read: {error}") from error
        return Checkpoint(self.path, self.step, self.config, state)


def load(path: Path, *, parts: Sequence[str] | None = None, into: Any = None) -> Checkpoint:
    """Read a checkpoint, checked by this process.

    Args:
        path: its folder.
        parts: top-level names of the state to read; None for all.
        into: state, as nested as what was saved: each of its tensors whose place and shape are those of a saved one is
            filled and takes its place in the result; of a DTensor only this process's shard is read, however the
            tensor was divided when it was saved. What has no such tensor is read whole, to the CPU.

    Raises:
        CheckpointError: it is incomplete or damaged.
    """
    found = described(path)
    if wrong := damage(path, found):
        raise CheckpointError(wrong)
    return Found(path, found).read(parts=parts, into=into)


def load_latest(run: Path, *, parts: Sequence[str] | None = None) -> Checkpoint | None:
    """Read the newest checkpoint of a run folder that is whole; None where there is none of any kind.

    A damaged one is named in a warning of the logger, and the one before it read.

    Raises:
        CheckpointError: all of them are damaged.
    """
    wrong: CheckpointError | None = None
    for path in reversed(candidates(Path(run) / "checkpoints")):
        try:
            return load(path, parts=parts)
        except CheckpointError as error:
            _LOG.warning("%s; the checkpoint before it is used", error)
            wrong = error
    if wrong is not None:
        raise CheckpointError(f"no checkpoint of {run} can be read; {wrong}")
    return None


def newest(run: Path, *, group: Any = None) -> Found | None:
    """Return the newest checkpoint of a run folder that is whole, the same on all processes; None where there is none.

    The first process chooses, and all of them share the work of checking the files.

    Args:
        run: the run's folder.
        group: of the processes; None for all.

    Raises:
        CheckpointError: there are checkpoints, and all are damaged, or one is not the same for all processes.
    """
    options: dict[str, Any] = {"group": group, "error": CheckpointError}
    names = first(lambda: [path.name for path in candidates(Path(run) / "checkpoints")], **options)
    wrong = ""
    for name in reversed(names):
        path = Path(run) / "checkpoints" / name
        found, problems = _checked(path, options)
        if found is not None:
            return found
        wrong = problems[0]
        if world().main:
            _LOG.warning("%s; the checkpoint before it is used", wrong)
    if names:

        def refuse() -> None:
            raise CheckpointError(f"no checkpoint of {run} can be read; {wrong}")

        first(refuse, **options)
    return None


def _checked(path: Path, options: Mapping[str, Any]) -> tuple[Found | None, list[str]]:
    """Check a checkpoint's files together; return it, or what is wrong with it."""
    found: dict[str, Any] | None = None

    def look() -> str | None:
        nonlocal found
        try:
            found = described(path)
            _headers(path, found)
        except CheckpointError as error:
            return str(error)
        return damage(path, found, rank=world().rank, size=world().size)

    said = everyone(look, **options)
    problems = [text if rank == 0 else f"process {rank}: {text}" for rank, text in enumerate(said) if text]
    return (None, problems) if problems or found is None else (Found(path, found), [])


def _headers(path: Path, found: Mapping[str, Any]) -> None:
    """Look at the headers of tensor files that have no checksum."""
    if (path / SUMS).is_file():
        return
    try:
        HuggingFaceStorageReader(str(path)).read_metadata()
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _tensors(path: Path, tree: Any, into: Any) -> dict[str, Tensor]:
    """The tensors that belong in ``tree``: those of ``into`` filled, others new."""
    reader = HuggingFaceStorageReader(str(path))
    wanted, given = set(places(tree)), targets(tree, into)
    held: dict[str, Tensor] = {}
    for key, entry in reader.read_metadata().state_dict_metadata.items():
        if key not in wanted:
            continue
        dtype = entry.properties.dtype  # type: ignore[union-attr]
        target = given.get(key)
        if target is None:
            held[key] = torch.empty(entry.size, dtype=dtype)  # type: ignore[union-attr]
        elif target.dtype == dtype:
            held[key] = target.detach()
        else:
            held[key] = torch.empty_like(target, dtype=dtype)
    flat = {key: value if value.dim() else value.reshape(1) for key, value in held.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed is (disabled|unavailable).*")
        load_tensors(flat, storage_reader=reader, no_dist=True)
    return held
