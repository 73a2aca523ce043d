"""The work of `danlu tokenize`, cut into units that any process can do: a unit of input makes a shard of each side.

What a unit is depends on the files alone, and what it makes on the unit alone: so the shards are the same whatever
the number of processes, and one that was killed left whole shards behind.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from danlu.data.corpus import split
from danlu.data.document import Document
from danlu.data.encoding import encode_pieces, marked_pieces
from danlu.data.files import Part, by_line, read_part
from danlu.data.joined import checksums
from danlu.data.shards import token_dtype, write_whole
from danlu.data.shuffle import fraction
from danlu.data.tokenized import SIDES
from danlu.data.tokenizer import Tokenizer

__all__ = ["RECORDS", "Job", "cut", "documents", "encode_unit", "record", "survey_unit", "unit_bytes"]

RECORDS = "units"
"""The folder of what is done, until all is."""

# A unit is at least 16 MiB of input and at most a 4096th of all, so that there are never too many shards to map.
_SMALLEST, _MOST = 2**24, 4096


class Job(NamedTuple):
    """What all units have in common: where the shards go, and how the input is read and split."""

    out: Path
    field: str
    errors: str
    validation: float


def unit_bytes(total: int) -> int:
    """Return how much of ``total`` bytes of input a unit holds."""
    return max(_SMALLEST, -(-total // _MOST))


def cut(files: Sequence[tuple[Path, bool]], sizes: Sequence[int], wanted: int) -> list[list[Part]]:
    """Cut files into units of about ``wanted`` bytes: small files together, large ones of lines into ranges.

    Large files of other kinds are a unit each.

    >>> [len(unit) for unit in cut([(Path(name), True) for name in ("a", "b", "c.jsonl")], [5, 6, 40], 16)]
    [2, 1, 1, 1]
    """
    units, together, held = list[list[Part]](), list[Part](), 0
    for (path, named), size in zip(files, sizes, strict=True):
        ranges = -(-size // wanted) if by_line(path) and size > wanted else 1
        if together and (ranges > 1 or held + size > wanted):
            units.append(together)
            together, held = [], 0
        if ranges > 1:
            edges = [size * n // ranges for n in range(ranges)]
            units += [[Part(path, named, *ends)] for ends in zip(edges, [*edges[1:], None], strict=True)]
        else:
            together.append(Part(path, named))
            held += size
    return [*units, together] if together else units


def documents(job: Job, unit: Sequence[Part], skipped: Counter[str]) -> Iterator[Document]:
    """Yield the documents of a unit."""
    for part in unit:
        yield from read_part(part, field=job.field, errors=job.errors, skipped=skipped)


def record(job: Job, stage: str, number: int) -> Path:
    """Return the file that says that a unit has been through a stage, and what it gave."""
    return job.out / RECORDS / f"{stage}-{number:05}.json"


def survey_unit(job: Job, number: int, unit: Sequence[Part], advance: Callable[[int], None]) -> None:
    """Read a unit and record what it holds."""
    skipped: Counter[str] = Counter()
    contents, found = hashlib.sha256(), Counter[str]()
    longest = 0
    for document in documents(job, unit, skipped):
        data = document.text.encode()
        digest = hashlib.sha256(data).digest()
        contents.update(digest)
        found["documents"] += 1
        found["bytes"] += len(data)
        found["held_out"] += len(data) if fraction(digest) < job.validation else 0
        longest = max(longest, len(document.text))
        advance(len(data))
    said: dict[str, Any] = {name: found[name] for name in ("documents", "bytes", "held_out")}
    said |= {"longest": longest, "skipped": skipped, "sha256": contents.hexdigest()}
    write_whole(record(job, "survey", number), json.dumps(said))


def encode_unit(
    job: Job, number: int, unit: Sequence[Part], whole: bool, tokenizer: Tokenizer, advance: Callable[[int], None]
) -> None:
    """Write the shards of a unit and record them.

    Raises:
        ValueError: the unit is not what it was when it was surveyed.
    """
    contents = hashlib.sha256()
    shards = [_Writer(job.out / f"{side}-{number:05}.bin", tokenizer, advance) for side in SIDES]
    try:
        for document in documents(job, unit, Counter()):
            contents.update(hashlib.sha256(document.text.encode()).digest())
            for shard, text in zip(shards, split(document.text, job.validation, whole=whole), strict=True):
                if text:
                    shard.add(text)
        if contents.hexdigest() != json.loads(record(job, "survey", number).read_text())["sha256"]:
            raise ValueError(f"{unit[0].path} changed while it was read; try again")
        said = {side: shard.finish() for side, shard in zip(SIDES, shards, strict=True)}
    finally:
        for shard in shards:
            shard.close()
    write_whole(record(job, "tokens", number), json.dumps(said))


class _Writer:
    """A shard that grows under another name, with its checksums."""

    def __init__(self, path: Path, tokenizer: Tokenizer, advance: Callable[[int], None]) -> None:
        self.path, self._scratch = path, path.with_suffix(".part")
        self._tokenizer, self._advance = tokenizer, advance
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._file = self._scratch.open("wb")
        self._digest, self._sums, self._rest = hashlib.sha256(), list[Any](), b""
        self._pending: list[tuple[str, bool]] = []
        self._tokens = self._documents = self._bytes = 0

    def add(self, text: str) -> None:
        self._documents += 1
        self._bytes += len(text.encode())
        for piece in marked_pieces(text):
            self._pending.append(piece)
            if len(self._pending) == 64:
                self._encode()

    def _encode(self) -> None:
        arrays = [*encode_pieces(self._pending, self._tokenizer, self._advance)]
        self._pending = []
        if arrays:
            self._write(np.concatenate(arrays).astype(self._dtype).tobytes())
            self._tokens += sum(map(len, arrays))

    def _write(self, data: bytes, *, last: bool = False) -> None:
        self._file.write(data)
        self._digest.update(data)
        data = self._rest + data
        whole = len(data) if last else len(data) // 4096 * 4096
        self._sums.append(checksums(data[:whole]))
        self._rest = data[whole:]

    def finish(self) -> dict[str, Any] | None:
        """Give the shard its name; say what is in it, None for nothing."""
        self._encode()
        if not self._tokens:
            return None
        self._write(b"", last=True)
        self._file.flush()
        os.fsync(self._file.fileno())
        write_whole(self.path.with_suffix(".crc"), np.concatenate(self._sums).tobytes())
        self._scratch.replace(self.path)
        return {
            "file": self.path.name,
            "tokens": self._tokens,
            "documents": self._documents,
            "bytes": self._bytes,
            "sha256": self._digest.hexdigest(),
        }

    def close(self) -> None:
        self._file.close()
        self._scratch.unlink(missing_ok=True)
