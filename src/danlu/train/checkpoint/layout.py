"""What a checkpoint is on the disk: names, format, which folders are complete."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = [
    "FORMAT",
    "STATE",
    "SUMS",
    "CheckpointError",
    "candidates",
    "checkpoints",
    "checksum",
    "damage",
    "described",
    "flush",
    "free_name",
    "remove",
    "step_of",
    "sweep",
]

FORMAT = 3
_WITHOUT_SUMS = 1
"""The format of release 0.1, whose files have no checksums."""
_READ = (_WITHOUT_SUMS, 2, FORMAT)
_NAME = re.compile(r"step-(\d{8,})(?:\.(\d+))?")
STATE, SUMS = "state.json", "SHA256SUMS"


class CheckpointError(OSError):
    """A checkpoint could not be written or read; the message says what is left."""


def candidates(folder: Path) -> list[Path]:
    """Return everything in ``folder`` that has a checkpoint's name, oldest first, whole or not."""
    if not folder.is_dir():
        return []
    found = [(int(m[1]), int(m[2] or 0), path) for path in folder.iterdir() if (m := _NAME.fullmatch(path.name))]
    return [path for *_, path in sorted(found)]


def checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints in ``folder``, oldest first; what lacks a file or was cut is passed over."""
    found = []
    for path in candidates(folder):
        try:
            described(path)
        except CheckpointError:
            continue
        found.append(path)
    return found


def step_of(path: Path) -> int | None:
    """Return the step in a checkpoint's name, None for another name."""
    name = _NAME.fullmatch(path.name)
    return None if name is None else int(name[1])


def described(path: Path) -> dict[str, Any]:
    """Return the contents of ``state.json``, every file that it names being there at its full size.

    Raises:
        CheckpointError: it is not a checkpoint, or one of its files is missing or cut.
    """
    incomplete = f"{path} is no complete checkpoint"
    try:
        found: dict[str, Any] = json.loads((path / STATE).read_text())
        if found["format"] not in _READ:
            raise CheckpointError(f"{path} has format {found['format']}, and {', '.join(map(str, _READ))} are read")
        sizes = {**found["files"], **({} if found["format"] == _WITHOUT_SUMS else {SUMS: None})}
        for name, size in sizes.items():
            if not (path / name).is_file():
                shards = found.get("processes", 1)
                of = f", one of those that {shards} processes wrote" if shards > 1 and name != SUMS else ""
                raise CheckpointError(f"{incomplete}: {name} is missing{of}")
            if size is not None and (path / name).stat().st_size != size:
                raise CheckpointError(f"{incomplete}: {name} is not {size} bytes long, it was cut")
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{incomplete}: {STATE} is missing or no longer what was written") from error
    return found


def damage(path: Path, found: Mapping[str, Any], *, rank: int = 0, size: int = 1) -> str | None:
    """Return what is wrong with a checkpoint's files in a sentence, or None; of ``size`` processes each checks a share.

    Args:
        path: the checkpoint.
        found: what :func:`described` gave.
        rank: which share.
        size: number of shares.
    """
    step = step_of(path)
    if step is not None and step != found["step"]:
        return f"{path} is damaged: {STATE} is of step {found['step']}"
    if found["format"] == _WITHOUT_SUMS:
        return None
    try:
        lines = (path / SUMS).read_text().splitlines()
        sums = {file: digest for digest, _, file in (line.partition("  ") for line in lines)}
        for file in (STATE, *found["files"])[rank::size]:
            if sums.get(file) != checksum(path / file):
                return f"{path} is damaged: {file} is not what {SUMS} says"
    except (OSError, ValueError) as error:
        return f"{path} cannot be read: {error}"
    return None


def checksum(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def free_name(folder: Path, step: int) -> Path:
    """``step-00000100``, with a number behind it where the step was saved before: that stays until this is complete."""
    final, number = folder / f"step-{step:08d}", 0
    while final.exists():
        number += 1
        final = folder / f"step-{step:08d}.{number}"
    return final


def flush(path: Path) -> None:
    """Have the system write ``path`` to the disk before anything that comes after."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Take a checkpoint's name away before its files, so that it is never half there under its name."""
    doomed = path.with_name(f".{path.name}.{os.getpid()}.tmp-old")
    os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove what an interrupted save or removal left."""
    for path in [*folder.glob(".step-*.tmp"), *folder.glob(".step-*.tmp-old")]:
        shutil.rmtree(path, ignore_errors=True)
